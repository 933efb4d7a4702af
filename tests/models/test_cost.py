"""FLOPs from shapes: against sums done by hand, and against what XLA counts in the compiled gradient step."""

from __future__ import annotations

import dataclasses

import pytest

from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.cost import (
    GroupShape,
    Widths,
    group_flops,
    group_parts,
    pairs_flops,
    tile_flops,
    token_flops,
)
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.siglip.config import SiglipConfig

HALF = Qwen2Config(vocab=151936, embed=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864, tied=True)
PAIRS = [(i, j) for i in range(4) for j in range(i + 1, 4)]
TINY = LlavaOnevisionConfig(
    tower=SiglipConfig(embed=64, layers=2, heads=2, mlp=128, image_size=112),
    decoder=Qwen2Config(vocab=512, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=192),
)


def test_known_sizes():
    assert token_flops(HALF) == pytest.approx(0.716e9, rel=1e-3)
    assert token_flops(Qwen2Config()) == pytest.approx(13.05e9, rel=1e-3)
    assert tile_flops(SiglipConfig()) == pytest.approx(642e9, rel=2e-3)


def test_by_hand():
    d = Qwen2Config(vocab=10, embed=4, layers=3, heads=2, kv_heads=1, head_dim=2, mlp=5)
    config = LlavaOnevisionConfig(tower=SiglipConfig(embed=6, layers=1, heads=1, mlp=7, image_size=28), decoder=d)
    flops = group_flops(config, GroupShape(2, 6, (2, 3)))
    assert flops.linear == 3 * 11 * 3 * 2 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 5)  # trained, tokens, layers, weights
    assert flops.attention == 3 * 3 * 4 * 4 * (6 * 7 / 2 + 2 * 6 + 3 + 3 * 6 + 6)
    assert flops.head == 3 * 5 * 2 * 4 * 10
    assert flops.projector == 3 * 2 * 4 * 2 * (6 * 4 + 4 * 4)
    assert flops.tower == 2 * (2 * 4 * (4 * 36 + 2 * 42) + 4 * 16 * 6 + 2 * 4 * 588 * 6)
    assert flops.reference == 0


def test_what_trains_costs_three_forwards_and_what_gradients_pass_through_two():
    shape = GroupShape(1, 100, (10, 20))
    trained, frozen = group_flops(TINY, shape), group_flops(TINY, shape, decoder=False)
    assert frozen.linear == trained.linear * 2 / 3
    assert frozen.attention == trained.attention  # scores and values have no weights of their own
    assert group_flops(TINY, shape, tower=True).tower == 3 * trained.tower
    assert group_flops(TINY, shape, recompute=True).linear == trained.linear * 4 / 3


def test_the_parts_of_a_group_add_up_to_it():
    shape = GroupShape(2, 100, (10, 20), scored=25)
    parts = group_parts(TINY, shape, Widths(2, 4, 2, 4), tower_weight=2)
    assert sum(part.both.flops for part in parts.values()) == pytest.approx(group_flops(TINY, shape).total)
    whole = group_flops(TINY, shape, reference=True, tower=True)
    assert sum(part.forward.flops for part in parts.values()) == pytest.approx(whole.reference)


def test_bytes_by_hand():
    shape = GroupShape(2, 100, (10, 20))
    parts = group_parts(TINY, shape, Widths(2, 4, 2, 4), tower_weight=2)
    table, tokens = 512 * 64, 30
    head = parts["log-probs"]
    assert head.forward.bytes == tokens * 64 * 2 + table * 4
    assert head.both.bytes == 3 * tokens * 64 * 2 + 2 * table * 4 + table * 4
    queries, keys = 2 * 4 * 16 * 2, 2 * 2 * 16 * 2  # a token's in a layer: in and out
    attention = parts["responses, attention"]
    assert attention.forward.bytes == 2 * (tokens * queries + (100 + tokens) * keys)
    assert attention.both.bytes == 3 * attention.forward.bytes


def test_under_adapters_no_gradient_of_a_weight_is_computed_or_written():
    shape = GroupShape(2, 100, (10, 20))
    trained, frozen = (
        group_parts(TINY, shape, Widths(2, 2, gradient, gradient), tower_weight=2) for gradient in (4, 0)
    )
    linear = frozen["prompt, linear"]
    assert linear.both.flops == 2 * linear.forward.flops
    assert linear.both.bytes == 2 * linear.forward.bytes
    assert frozen["prompt, attention"] == trained["prompt, attention"]
    assert frozen["tower"] == trained["tower"]


def test_a_frozen_tower_is_looked_through_once_for_policy_and_reference():
    shape = GroupShape(5, 100, (10, 20))
    once = group_flops(TINY, shape, reference=True)
    twice = group_flops(TINY, shape, tower=True, reference=True)
    assert twice.reference - once.reference == 5 * tile_flops(TINY.tower)


@pytest.mark.parametrize(
    ("decoder", "responses", "ratio"),
    [(HALF, 2, 2.1), (HALF, 4, 10.6), (Qwen2Config(), 2, 1.8), (Qwen2Config(), 4, 9.4)],
)
def test_ratios_of_the_published_sizes(decoder, responses, ratio):
    """Worked out independently for a 336 x 336 picture and answers of 150 tokens, rematerialised, online reference."""
    config = LlavaOnevisionConfig(decoder=decoder)
    shape = GroupShape(2, 1525, (150,) * responses)
    pairs = [(i, j) for i, j in PAIRS if j < responses]
    told = pairs_flops(config, shape, pairs, recompute=True).total
    assert told / group_flops(config, shape, recompute=True, reference=True).total == pytest.approx(ratio, rel=0.04)


def test_logits_of_every_position_are_the_vocabulary_s_share_more():
    shape = GroupShape(1, 100, (10, 20))
    answers, all_of_it = (pairs_flops(TINY, shape, [(0, 1)], every_position=every) for every in (False, True))
    assert all_of_it.head == answers.head * 2 * 120 / 30
    assert all_of_it.linear == answers.linear


def test_xla_counts_the_same():
    """One layer each: XLA counts the body of a scan once, whatever the layers."""
    import jax

    from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh
    from mmrlhf_jax.objectives import DPO
    from mmrlhf_jax.training.planning import lower_accumulate
    from mmrlhf_jax.training.recipe import ComputeConfig, OptimizerConfig, PartRates, Recipe

    everything = OptimizerConfig(rates=PartRates(tower=1.0))
    recipe = Recipe(
        objective=DPO(), optimizer=everything, compute=ComputeConfig(dtype="float32", remat="none", vocab_chunk=512)
    )
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    shape = GroupShape(2, 128, (64, 64))

    def one_layer(config):
        tower, decoder = (dataclasses.replace(part, layers=1) for part in (config.tower, config.decoder))
        return dataclasses.replace(config, tower=tower, decoder=decoder)

    config = one_layer(TINY)
    lowered = lower_accumulate(recipe, config, Bucket(1, 2, 128, 128), mesh, responses=2)
    counted = lowered.compile().cost_analysis()["flops"]
    told = group_flops(config, shape, tower=True, square=True)
    assert counted == pytest.approx(told.total, rel=0.1)

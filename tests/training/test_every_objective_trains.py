"""Every objective through the trainer's own step, on a tiny model: what the step hands it, and that it moves."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_groups
from tiny import TINY, random_params
from tiny_reward import random_head

from mmrlhf_jax.batch import pack
from mmrlhf_jax.data.diff import changed_tokens
from mmrlhf_jax.data.pipeline import MissingVisits, Selection, check_visits
from mmrlhf_jax.groups import Bucket, Group, Origin, Pair, Response, Turn
from mmrlhf_jax.models.critique_reward.model import with_head
from mmrlhf_jax.models.families import reward_config
from mmrlhf_jax.models.llava_onevision.model import Compute, collisions_of, hidden_states
from mmrlhf_jax.models.qwen2.model import unembedding
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.objectives import (
    AOT,
    DDPO,
    DPO,
    MMDPO,
    OBJECTIVES,
    AttributeObjective,
    BetaDPO,
    CritiqueReward,
    MultiObjectiveReward,
    PlackettLuce,
    QuantileReward,
    RewardObjective,
    ScalarReward,
    StepDPO,
    TokenwiseReward,
    VisitDPO,
)
from mmrlhf_jax.training.data import selection_of
from mmrlhf_jax.training.recipe import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    PartRates,
    Recipe,
    RewardConfig,
)
from mmrlhf_jax.training.state import TrainState, partition
from mmrlhf_jax.training.step import (
    initial_averages,
    loss_and_metrics,
    make_accumulate,
    make_apply,
    make_zero_sums,
    metric_names,
)

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
REWARD = with_head(random_params(), random_head("linear"))


def edited(rng, base, times):
    """`base` with a token exchanged, inserted and cut, each `times` times."""
    out = list(base)
    for _ in range(times):
        out[rng.integers(len(out))] = rng.integers(0, TINY.decoder.vocab)
        out.insert(rng.integers(len(out)), rng.integers(0, TINY.decoder.vocab))
        del out[rng.integers(len(out))]
    return np.array(out, np.int32)


@functools.cache
def entries(segments="exact"):
    """Two groups of ragged answers that are corrections of each other, with visits for scores."""
    rng, out = np.random.default_rng(0), []
    for row, (tiles, text, lengths) in enumerate([(1, 8, (6, 6, 6)), (0, 5, (5, 5))]):
        group = random_groups.rendered(rng, TINY, tiles=tiles, text=text, lengths=lengths)
        base = group.branches[0].token
        texts = [edited(rng, base, 2 * i)[: len(base) - i] for i in range(len(lengths))]
        branches = tuple(dataclasses.replace(b, token=t, loss_weight=np.ones(len(t), np.float32))
                         for b, t in zip(group.branches, texts, strict=True))  # fmt: skip
        made = random_groups.entry(rng, dataclasses.replace(group, branches=branches), row)
        out.append(dataclasses.replace(made, score=np.arange(len(lengths), dtype=np.float32)))
    return [with_changes(entry, segments) for entry in out]


def with_changes(entry, segments="exact"):
    return dataclasses.replace(entry, changed=changed_tokens([b.token for b in entry.rendered.branches], segments))


def batch_of(chosen, bucket, responses, separate=False, totals=None, attributes=0):
    return pack(
        chosen,
        bucket,
        totals or random_groups.totals(entries()),
        responses=responses,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
        separate=separate,
        changed=True,
        attributes=attributes,
    )


def as_groups():
    return batch_of(entries(), Bucket(2, 1, 24, 20), 3)


def as_rated():
    """The groups with ratings in two attributes, of which the first response is not rated in one."""
    rated = [
        dataclasses.replace(entry, rating=np.array([[np.nan, 1.0], [0.5, 0.2], [0.1, 0.0]][: len(entry.score)]))
        for entry in entries()
    ]
    totals = dataclasses.replace(random_groups.totals(rated), ratings=8.0)
    return batch_of(rated, Bucket(2, 1, 24, 20), 3, totals=totals, attributes=2)


def as_pairs():
    pairs = [with_changes(pair) for entry in entries() for pair in random_groups.split_pairs(entry)]
    return batch_of(pairs, Bucket(len(pairs), 1, 24, 8), 2, separate=True)


BY_TOKEN = [DDPO(), StepDPO(), DPO(ld_alpha=0.3, wpo=True), DPO(gamma=0.2)]


def test_a_group_is_its_pairs_token_by_token_too():
    """Segments, first differences, lengths and whole distributions seen from groups and from two rows a pair."""

    @quick
    def losses(params, batch):
        return [
            loss_and_metrics(params, None, batch, jax.random.key(0), config=TINY, compute=Compute(), objective=o)[0]
            for o in BY_TOKEN
        ]

    params = jax.tree.map(jnp.asarray, random_params())
    together, apart = losses(params, as_groups()), losses(params, as_pairs())
    np.testing.assert_allclose(together, apart, rtol=2e-5)
    assert len({round(float(x), 4) for x in together}) == len(BY_TOKEN)


def test_collisions_are_those_of_the_whole_distribution():
    params, batch = jax.tree.map(jnp.asarray, random_params()), as_groups()
    hidden = hidden_states(params, TINY, batch, Compute())
    found = collisions_of(params, hidden, batch, Compute(vocab_chunk=7))
    picked = np.take_along_axis(np.asarray(hidden), np.asarray(batch.predictor)[:, :, None], 1)
    probability = jax.nn.softmax(picked @ unembedding(params.decoder, "float32").T, axis=-1)
    np.testing.assert_allclose(found, np.log((np.asarray(probability) ** 2).sum(-1)), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_steps_of_every_objective_move_the_model(name):
    objective = OBJECTIVES[name]()
    start = REWARD if isinstance(objective, RewardObjective) else random_params()
    config, compute, batch = TINY, Compute(), as_groups()
    if isinstance(objective, AttributeObjective):
        config = reward_config(TINY, "linear", ("helpful", "brief"), 3 if isinstance(objective, QuantileReward) else 0)
        start, batch = with_head(random_params(), random_head("linear", outputs=config.outputs)), as_rated()
    trainable, frozen = partition(jax.tree.map(jnp.asarray, start), lambda leaf: not leaf.startswith("tower."))
    # squares are steep: at ten times that they overshoot
    optimizer = optax.adam(1e-4 if isinstance(objective, AttributeObjective) else 1e-3)
    accumulate = make_accumulate(config, compute, objective, sums_sharding=None)
    apply = make_apply(optimizer, state_sharding=None)
    averages = initial_averages(objective, TINY.decoder.vocab)
    zeros = make_zero_sums(trainable, metric_names(objective), sums_sharding=None, averages=averages)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable), averages)
    before = {leaf: np.asarray(value) for leaf, value in named_leaves(trainable)}
    losses = []
    for _ in range(2):
        sums, seen = accumulate(state.trainable, state.frozen, None, zeros(), batch, jax.random.key(0), state.averages)
        assert np.asarray(seen.finite).all()
        state, metrics = apply(state, sums)
        losses.append(float(metrics["loss"]))
        assert all(np.isfinite(value) for value in map(float, metrics.values()))
    assert losses[1] < losses[0] or isinstance(objective, BetaDPO)  # whose beta moves with its averages
    moved = {leaf for leaf, value in named_leaves(state.trainable) if np.abs(value - before[leaf]).max() > 1e-6}
    assert {leaf for leaf in before if "decoder.layers" in leaf and leaf.endswith("_kernel")} <= moved


def test_a_tokens_score_is_read_where_the_token_stands():
    """At a branch's last token it is the branch's own score."""
    from mmrlhf_jax.models.critique_reward.model import scores_of_tokens

    batch = as_groups()
    score, token_score = scores_of_tokens(jax.tree.map(jnp.asarray, REWARD), TINY, batch, Compute())
    ends = batch.branch_end - batch.tap_index.shape[1]
    for b, k in zip(*np.nonzero(batch.response_mask), strict=True):
        assert float(token_score[b, ends[b, k]]) == pytest.approx(float(score[b, k]), rel=1e-6)


# --- what a recipe asks of the data -----------------------------------------------------------------------------------


def test_the_data_brings_what_an_objective_reads():
    assert selection_of(Recipe(objective=DDPO())).changed == "exact"
    assert selection_of(Recipe(objective=DDPO(segments="released"))).changed == "released"
    assert selection_of(Recipe(objective=DPO())) == Selection(preferences=True)
    assert selection_of(Recipe(objective=VisitDPO())).visits


def test_a_response_that_nobody_visited_names_its_row():
    def group(*scores):
        return Group(
            "a", (Turn("user", "?"),), (), tuple(Response(str(i), i, s) for i, s in enumerate(scores)),
            (Pair(0, 1, 0.5),), (Origin("tree.jsonl", 3),),
        )  # fmt: skip

    check_visits([group(3.0, 0.0), group(3.0, 0.0, None)])
    for scores in ((3.0, None), (3.0, -1.0)):
        with pytest.raises(MissingVisits, match=r"1 of 2 groups have a response .*\(tree\.jsonl:3\).*--map score="):
            check_visits([group(1.0, 1.0), group(*scores)])


@pytest.mark.parametrize("objective", [AOT(), PlackettLuce()])
def test_weights_that_an_objective_would_not_read_are_refused(objective):
    name = type(objective).__name__
    with pytest.raises(ValueError, match=f"data.mean = 'groups' weighs pairs, which {name} does not"):
        Recipe(objective=objective, data=DataConfig(mean="groups"))
    assert Recipe(objective=MMDPO(), data=DataConfig(mean="groups")).data.mean == "groups"


@pytest.mark.parametrize("objective", [ScalarReward(), CritiqueReward(), MultiObjectiveReward()])
def test_what_pairs_alone_cannot_train_is_refused(objective):
    single = DataConfig(pairing="pairs")
    outputs = RewardConfig(attributes=("help",)) if isinstance(objective, MultiObjectiveReward) else RewardConfig()
    with pytest.raises(ValueError, match=r"data\.pairing = 'pairs'"):
        Recipe(objective=objective, data=single, reward=outputs)
    Recipe(objective=ScalarReward(tie=0.0), data=single)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("data", {"groups_per_step": 0}, "data.groups_per_step is 0: it must be at least 1"),
        ("data", {"max_steps": 0}, "data.max_steps is 0: it must be at least 1"),
        ("data", {"epochs": 0.0}, "data.epochs is 0.0: it must be positive"),
        ("data", {"max_buckets": 0}, "data.max_buckets"),
        ("data", {"multiple": 0}, "data.multiple"),
        ("optimizer", {"warmup": 100.0}, "optimizer.warmup is 100.0: it must be a share of all steps, from 0 to 1"),
        ("optimizer", {"b2": 1.0}, "optimizer.b2"),
        ("optimizer", {"learning_rate": math.nan}, "optimizer.learning_rate is nan: it must be finite"),
        ("optimizer", {"rates": PartRates(decoder=-1.0)}, "optimizer.rates.decoder is -1.0"),
        ("checkpoint", {"every": 0}, "checkpoint.every is 0: it must be at least 1"),
        ("checkpoint", {"keep": 0}, "checkpoint.keep is 0"),
        ("checkpoint", {"grace": 0.0}, "checkpoint.grace is 0.0: it must be positive"),
        ("lora", {"alpha": math.nan}, "lora.alpha is nan: it must be positive and finite"),
    ],
)
def test_numbers_by_which_nothing_would_be_learned_are_refused(part, changes, said):
    fields = {
        "data": DataConfig(),
        "optimizer": OptimizerConfig(),
        "checkpoint": CheckpointConfig(),
        "lora": LoraConfig(),
    }
    with pytest.raises(ValueError, match=said):
        Recipe(objective=DPO(), **{part: dataclasses.replace(fields[part], **changes)})


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        Recipe(objective=DPO(), seed=-1)


def test_a_reference_or_a_template_that_nothing_reads_is_refused():
    with pytest.raises(ValueError, match="costs a second forward that this objective never reads"):
        Recipe(objective=OBJECTIVES["sft"](), reference="online")
    with pytest.raises(ValueError, match="which TokenwiseReward does without"):
        Recipe(objective=TokenwiseReward(), reward=RewardConfig(template="mine.txt"))


def test_segments_that_the_loader_did_not_bring_are_named():
    bare = [dataclasses.replace(entry, changed=None) for entry in entries()]
    with pytest.raises(ValueError, match="row 0: nothing says which tokens its responses do not share"):
        batch_of(bare, Bucket(2, 1, 24, 20), 3)

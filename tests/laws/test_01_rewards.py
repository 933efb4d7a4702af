"""Law 1, reward models: scores, loss and gradients of a packed group are those of every "answer, critique" as a
sequence of its own, in groups with and without pictures, of any K, whatever is scored of a branch."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_groups
from tiny import TINY, random_params
from tiny_reward import random_head

from mmrlhf_jax.batch import Entry, GroupBatch, pack
from mmrlhf_jax.groups import Branch, Bucket
from mmrlhf_jax.models.critique_reward.model import CritiqueReward as Model
from mmrlhf_jax.models.critique_reward.model import scores_and_logps, with_head
from mmrlhf_jax.models.families import reward_config
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.objectives import CritiqueReward, RewardInputs, ScalarReward, StepTotals
from mmrlhf_jax.training.step import loss_and_metrics

# tiles, text tokens of the prompt, tokens of each branch and how many at its end are critique
GROUPS = [
    (2, 9, (7,), (3,)),
    (0, 5, (3, 4), (0, 2)),
    (1, 20, (6, 1, 8), (4, 1, 0)),
    (3, 12, (5, 9, 2, 7), (2, 2, 1, 3)),
    (0, 30, (1, 2, 13, 4, 5), (1, 1, 9, 0, 2)),
]
TILES, PROMPT, RESPONSES = 3, 48, 32
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@cache
def parameters(head: str) -> Model:
    return with_head(random_params(), random_head(head))


@cache
def entries() -> list[Entry]:
    rng = np.random.default_rng(0)
    out = []
    for row, (tiles, text, lengths, critiques) in enumerate(GROUPS):
        group = random_groups.rendered(rng, TINY, tiles=tiles, text=text, lengths=lengths)
        branches = tuple(
            Branch(b.token, (np.arange(n)[::-1] < c).astype(np.float32))
            for b, n, c in zip(group.branches, lengths, critiques, strict=True)
        )
        ranked = random_groups.entry(rng, dataclasses.replace(group, branches=branches), row)
        ties = np.zeros((len(lengths), len(lengths)), np.float32)
        if len(lengths) > 2:  # the first two are tied
            ties[0, 1] = 1
            pairs = ranked.pair_weight.copy()
            pairs[0, 1] = pairs[1, 0] = 0
            ranked = dataclasses.replace(ranked, pair_weight=pairs, tie_weight=ties)
        out.append(ranked)
    return out


def packed(items: list[Entry], responses: int) -> GroupBatch:
    every = entries()
    ties = sum(float(e.tie_weight.sum()) for e in every if e.tie_weight is not None)
    return pack(
        items,
        Bucket(len(items), TILES, PROMPT, RESPONSES),
        dataclasses.replace(random_groups.totals(every), ties=ties),
        responses=responses,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
    )


def alone() -> GroupBatch:
    """Every branch as a group of one."""
    nothing, first = np.zeros((1, 1), np.float32), np.zeros(1, np.int32)
    singles = [dataclasses.replace(e.rendered, branches=(b,)) for e in entries() for b in e.rendered.branches]
    return packed([Entry(row, single, nothing, nothing, first, nothing[0]) for row, single in enumerate(singles)], 1)


def apart(head: str, params: Model, objective) -> jax.Array:
    """The objective over scores and log-probs of branches that were forwarded one by one."""
    batch, config = alone(), reward_config(TINY, head)
    score, (logp, _) = scores_and_logps(params, config, batch, Compute())
    whole = packed(entries(), 5)
    k = [len(e.rendered.branches) for e in entries()]
    places = jnp.asarray(np.concatenate([b * 5 + np.arange(n) for b, n in enumerate(k)]))
    scores = jnp.zeros(5 * len(k)).at[places].set(score[:, 0]).reshape(len(k), 5)
    totals = StepTotals(
        jnp.asarray(whole.total_pairs), jnp.ones(()), jnp.asarray(whole.total_tokens), jnp.ones(()),
        jnp.asarray(whole.total_ties),
    )  # fmt: skip
    inputs = RewardInputs(
        scores,
        logp,
        jnp.asarray(batch.loss_weight),
        jnp.asarray(whole.pair_weight),
        jnp.asarray(whole.tie_weight),
        totals,
    )
    return objective(inputs)[0]


@pytest.mark.parametrize("head", ["linear", "tanh"])
def test_scores_are_those_of_separate_sequences(head):
    score = quick(lambda params, batch: scores_and_logps(params, reward_config(TINY, head), batch, Compute())[0])
    whole = np.asarray(score(parameters(head), packed(entries(), 5)))
    single = np.asarray(score(parameters(head), alone()))[:, 0]
    found = np.concatenate([whole[b, : len(e.rendered.branches)] for b, e in enumerate(entries())])
    assert np.ptp(found) > 0.1
    np.testing.assert_allclose(found, single, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "objective"), [("linear", CritiqueReward(tie=0.5)), ("tanh", ScalarReward(centre=0.1))],
    ids=["critique", "scalar"],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_separate_sequences(head, objective):
    batch, config = packed(entries(), 5), reward_config(TINY, head)

    def together(params):
        return loss_and_metrics(
            params, None, batch, jax.random.key(0), config=config, compute=Compute(), objective=objective
        )[0]

    loss, gradient = quick(jax.value_and_grad(together))(parameters(head))
    wanted, expected = quick(jax.value_and_grad(lambda params: apart(head, params, objective)))(parameters(head))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for (name, have), (_, want) in zip(named_leaves(gradient), named_leaves(expected), strict=True):
        scale = np.abs(want).max()
        if name == "tower.blocks.key_bias":  # which softmax cannot feel
            assert max(np.abs(have).max(), scale) < 1e-5
            continue
        assert scale > 1e-5 or not name.startswith(("head.", "decoder.layers.", "projector.")), name
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_what_stands_in_padding_reaches_neither_loss_nor_gradient():
    objective = CritiqueReward()
    batch, config, params = packed(entries(), 5), reward_config(TINY, "linear"), parameters("linear")

    @quick
    def loss(params, batch):
        return loss_and_metrics(
            params, None, batch, jax.random.key(0), config=config, compute=Compute(), objective=objective
        )[0]

    padding = batch.branch == 5
    other = dataclasses.replace(batch, token=np.where(padding, 17, batch.token))
    np.testing.assert_allclose(loss(params, batch), loss(params, other), rtol=1e-6)

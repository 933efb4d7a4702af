"""Law 12: fifty steps at lr 1e-6 move the parameters as float64 would. In bf16 they would hardly move at all."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import random_groups
from tiny import TINY, random_params

from mmrlhf_jax.batch import Bucket, GroupBatch, pack
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.recipe import OptimizerConfig
from mmrlhf_jax.training.state import TrainState, make_optimizer, partition
from mmrlhf_jax.training.step import make_accumulate, make_apply, make_zero_sums, metric_names

STEPS = 50
OBJECTIVE = DPO(gamma=0.25)
CONFIG = OptimizerConfig(learning_rate=1e-6, schedule="cosine", warmup=0.1, weight_decay=0.0)


class Moved(NamedTuple):
    """Where every leaf stands after the run: ours, in float64, and with parameters kept in bf16."""

    start: dict[str, np.ndarray]
    ours: dict[str, np.ndarray]
    exact: dict[str, np.ndarray]
    bfloat16: dict[str, np.ndarray]


def batch() -> GroupBatch:
    rng = np.random.default_rng(0)
    groups = [random_groups.rendered(rng, TINY, tiles=t, text=8, lengths=r) for t, r in [(1, (5, 3, 6)), (0, (4, 7))]]
    entries = [random_groups.entry(rng, group, row) for row, group in enumerate(groups)]
    return pack(
        entries,
        Bucket(2, 1, 24, 16),
        random_groups.totals(entries),
        responses=3,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
    )


def rate(step: int) -> float:
    """Warm-up from 0 over a tenth of the steps, then a cosine to 0 at the last."""
    warm = round(CONFIG.warmup * STEPS)
    if step < warm:
        return CONFIG.learning_rate * step / warm
    return CONFIG.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (STEPS - warm)))


class AdamW64:
    """Clipped AdamW (arXiv 1711.05101) in float64, without weight decay."""

    def __init__(self) -> None:
        self.first: dict[str, np.ndarray] = {}
        self.second: dict[str, np.ndarray] = {}

    def update(self, step: int, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scale = min(1.0, CONFIG.clip_norm / math.sqrt(sum((g**2).sum() for g in gradients.values())))
        out = {}
        for name, g in gradients.items():
            g = g * scale
            m = self.first[name] = CONFIG.b1 * self.first.get(name, 0) + (1 - CONFIG.b1) * g
            v = self.second[name] = CONFIG.b2 * self.second.get(name, 0) + (1 - CONFIG.b2) * g**2
            m, v = m / (1 - CONFIG.b1 ** (step + 1)), v / (1 - CONFIG.b2 ** (step + 1))
            out[name] = -rate(step) * m / (np.sqrt(v) + CONFIG.eps)
        return out


def named(tree, dtype=np.float64) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, dtype) for name, leaf in named_leaves(jax.device_get(tree))}


@cache
def moved() -> Moved:
    trainable, frozen = partition(random_params(), lambda name: not name.startswith("tower."))
    data, key = batch(), jax.random.key(0)
    accumulate = make_accumulate(TINY, Compute(), OBJECTIVE, sums_sharding=None)
    zeros = make_zero_sums(trainable, metric_names(OBJECTIVE), sums_sharding=None)
    optimizer = make_optimizer(CONFIG, STEPS)
    apply = make_apply(optimizer, state_sharding=None)
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, trainable), frozen, jax.jit(optimizer.init)(trainable))
    structure = jax.tree.structure(trainable)

    start = named(trainable)
    exact, coarse, adam = dict(start), named(trainable, ml_dtypes.bfloat16), AdamW64()
    for step in range(STEPS):
        state, _ = apply(state, accumulate(state.trainable, frozen, None, zeros(), data, key)[0])
        there = jax.tree.unflatten(structure, [leaf.astype(np.float32) for leaf in exact.values()])
        updates = adam.update(step, named(accumulate(there, frozen, None, zeros(), data, key)[0].gradients))
        exact = {name: leaf + updates[name] for name, leaf in exact.items()}
        coarse = {name: (leaf + updates[name]).astype(ml_dtypes.bfloat16) for name, leaf in coarse.items()}
    assert int(state.step) == STEPS
    return Moved(start, named(state.trainable), exact, {name: leaf.astype(np.float64) for name, leaf in coarse.items()})


def test_every_leaf_moves_as_in_float64():
    run = moved()
    for name, start in run.start.items():
        wanted, have = run.exact[name] - start, run.ours[name] - start
        assert np.linalg.norm(have - wanted) < 0.02 * np.linalg.norm(wanted), name


def test_the_movement_is_that_of_fifty_steps():
    """Adam moves a weight by about the rate at every step: 50 steps of a cosine are some 25e-6."""
    run = moved()
    typical = np.median(np.concatenate([abs(run.exact[name] - start).ravel() for name, start in run.start.items()]))
    assert 5e-6 < typical < 3e-5


def test_bf16_parameters_would_hardly_move():
    run = moved()
    kernels = [name for name in run.start if name.endswith("kernel")]
    assert kernels
    changed = [run.bfloat16[n] != run.start[n].astype(ml_dtypes.bfloat16).astype(np.float64) for n in kernels]
    assert np.concatenate([c.ravel() for c in changed]).mean() < 0.05
    assert np.concatenate([(run.ours[n] != run.start[n]).ravel() for n in kernels]).mean() > 0.99


@pytest.mark.parametrize("step", [0, 1, 5, 20, 49])
def test_the_rate_restated_here_is_the_recipe_s(step):
    from mmrlhf_jax.training.state import learning_rate

    assert float(learning_rate(CONFIG, STEPS)(step)) == pytest.approx(rate(step), rel=1e-5, abs=1e-13)

"""Law 2: padding, the choice of bucket, the order of groups, filler groups and micro-batching change rounding only."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import pytest
import random_groups
from tiny import TINY, random_params

from mmrlhf_jax.batch import Entry, GroupBatch, pack
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.objectives import MMDPO
from mmrlhf_jax.training.state import partition
from mmrlhf_jax.training.step import Sums, make_accumulate, make_zero_sums, metric_names

GROUPS = [(2, 9, (7, 2)), (0, 5, (3, 4, 3)), (1, 20, (6, 1, 8)), (3, 12, (5, 9, 2, 7))]  # tiles, prompt, responses
SNUG, ROOMY = Bucket(4, 3, 40, 24), Bucket(2, 5, 64, 48)
OBJECTIVE = MMDPO()


@cache
def entries() -> list[Entry]:
    rng = np.random.default_rng(0)
    groups = [random_groups.rendered(rng, TINY, tiles=t, text=p, lengths=r) for t, p, r in GROUPS]
    return [random_groups.entry(rng, group, row) for row, group in enumerate(groups)]


def micro_batch(numbers: list[int | None], bucket: Bucket, pad_token: int = 0) -> GroupBatch:
    return pack(
        [None if n is None else entries()[n] for n in numbers],
        bucket,
        random_groups.totals(entries()),
        responses=5,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
        pad_token=pad_token,
    )


@cache
def programs():
    trainable, frozen = partition(random_params(), lambda name: not name.startswith("tower."))
    accumulate = make_accumulate(TINY, Compute(), OBJECTIVE, sums_sharding=None)
    zeros = make_zero_sums(trainable, metric_names(OBJECTIVE), sums_sharding=None)
    return trainable, frozen, accumulate, zeros


def step(*batches: GroupBatch) -> Sums:
    trainable, frozen, accumulate, zeros = programs()
    sums = zeros()
    for batch in batches:
        sums, seen = accumulate(trainable, frozen, None, sums, batch, jax.random.key(0))
        assert np.asarray(seen.finite).all()
        assert (np.asarray(seen.row) == batch.row).all()
    return jax.device_get(sums)


@cache
def reference() -> Sums:
    return step(micro_batch([0, 1, 2, 3], SNUG))


def with_garbage(batch: GroupBatch) -> GroupBatch:
    """Anything at all where there is nothing: tokens, pixels, stored log-probs."""
    rng = np.random.default_rng(1)
    nothing = batch.branch == batch.branch_end.shape[1]
    token = np.where(nothing, rng.integers(0, TINY.decoder.vocab, batch.token.shape), batch.token).astype(np.int32)
    used = np.array([0 if row < 0 else GROUPS[row][0] for row in batch.row])
    blank = np.arange(batch.tiles.shape[1]) >= used[:, None]
    tiles = np.where(blank[..., None, None, None], rng.integers(0, 256, batch.tiles.shape), batch.tiles)
    stored = np.where(nothing[:, batch.tap_index.shape[1] :], -1e4, batch.reference_logp).astype(np.float32)
    return batch.replace(token=token, tiles=tiles.astype(np.uint8), reference_logp=stored)


LAYOUTS = {
    "another order": lambda: [micro_batch([2, 0, 3, 1], SNUG)],
    "garbage for padding": lambda: [with_garbage(micro_batch([0, 1, 2, 3], SNUG))],
    "another padding token": lambda: [micro_batch([0, 1, 2, 3], SNUG, pad_token=7)],
    "micro-batches in a larger bucket": lambda: [micro_batch(pair, ROOMY) for pair in ([0, 1], [2, 3])],
    "micro-batches dealt otherwise": lambda: [micro_batch(pair, ROOMY) for pair in ([3, 1], [0, 2])],
    "filler beside every group": lambda: [micro_batch([n, None][:: 1 - 2 * (n % 2)], ROOMY) for n in range(4)],
    "a batch of filler": lambda: [micro_batch([0, 1, 2, 3], SNUG), micro_batch([None, None], ROOMY)],
    "mixed buckets": lambda: [micro_batch([3, None, None, 2], SNUG), with_garbage(micro_batch([1, 0], ROOMY))],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_same_in_any_layout(layout):
    have, wanted = step(*LAYOUTS[layout]()), reference()
    assert have.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        assert float(have.metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    theirs = dict(named_leaves(wanted.gradients))
    for name, gradient in named_leaves(have.gradients):
        largest = np.abs(theirs[name]).max()
        assert largest > 0, name
        assert np.abs(gradient - theirs[name]).max() <= 1e-4 * largest, name


def test_the_step_here_is_no_trivial_one():
    metrics = reference().metrics
    assert 0.1 < metrics["loss"] < 10
    assert 0 < metrics["rewards/accuracies"] < 1
    assert metrics["entropy"] > 1


@pytest.mark.parametrize("kind", ["tiles", "prompt", "response"])
def test_a_group_that_does_not_fit_is_refused_not_cut(kind):
    small = {"tiles": Bucket(1, 2, 64, 48), "prompt": Bucket(1, 3, 39, 48), "response": Bucket(1, 3, 64, 22)}[kind]
    with pytest.raises(ValueError, match=r"row 3: 3 tiles, 40 prompt and 23 response tokens do not fit bucket 1 x"):
        micro_batch([3], small)

"""Choosing the handful of static shapes a run compiles, from the lengths of its own data.

A bucket is (groups per micro-batch, tiles, prompt slots, response slots). Every item fits its bucket without a cut; the
cost of a plan is what the padding adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.groups import Bucket

MAX_BUCKETS = 8  # programs a run compiles, unless told otherwise
MULTIPLE = 128  # of slots: what TPU lanes and flash kernels want
_MOST_CELLS = 256  # distinct shapes the merging starts from


@dataclass(frozen=True)
class ItemLengths:
    """Slots each item needs, i64 [n] each: picture tiles, prompt tokens, packed response tokens of one row."""

    tiles: np.ndarray
    prompt: np.ndarray
    response: np.ndarray

    def __len__(self) -> int:
        return len(self.tiles)


@dataclass(frozen=True)
class BucketPlan:
    """`buckets` in order of cost and, for each item, which one it is dealt to (i64 [n])."""

    buckets: tuple[Bucket, ...]
    assignment: np.ndarray
    padding_share: float
    """share of all slots, tiles weighed in tokens, that is padding inside rows"""


def plan_buckets(
    items: ItemLengths,
    *,
    max_buckets: int,
    multiple: int,
    slots_per_shard: int,
    shards: int,
    groups_per_step: int,
    rows_per_group: int = 1,
    tile_cost: float = 64.0,
) -> BucketPlan:
    """At most `max_buckets` shapes, `prompt` and `response` multiples of `multiple`, that cover all items.

    `tile_cost` is what a tile costs in decoder tokens; `slots_per_shard` bounds the cost of the rows one of the
    `shards` devices that split a batch takes at once (at least one group always fits). Starting from the distinct
    rounded shapes, the two whose union adds the least padding are merged until few enough are left.
    """
    if not len(items):
        raise ValueError("there is no group to plan buckets for")
    shapes, cell_of_item = _cells(items, multiple)
    counts = np.bincount(cell_of_item, minlength=len(shapes)).astype(float)
    owner = np.arange(len(shapes))
    alive = shapes.copy()

    def cost(shape: np.ndarray) -> np.ndarray:
        return shape[..., 0] * tile_cost + shape[..., 1] + shape[..., 2]

    while len(alive) > max_buckets:
        union = np.maximum(alive[:, None], alive[None])
        here = counts * cost(alive)
        added = (counts[:, None] + counts) * cost(union) - here[:, None] - here
        np.fill_diagonal(added, np.inf)
        i, j = sorted(np.unravel_index(np.argmin(added), added.shape))
        alive[i] = union[i, j]
        counts[i] += counts[j]
        alive, counts = np.delete(alive, j, axis=0), np.delete(counts, j)
        owner = np.where(owner == j, i, owner)
        owner = owner - (owner > j)
    order = np.argsort(cost(alive), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    assignment = place[owner][cell_of_item]
    shares = np.bincount(assignment, minlength=len(alive)) / len(items)
    buckets = tuple(
        Bucket(
            _groups(float(cost(shape)) * rows_per_group, share, slots_per_shard, shards, groups_per_step),
            *map(int, shape),
        )
        for shape, share in zip(alive[order], shares, strict=True)
    )
    held = float((items.tiles * tile_cost + items.prompt + items.response).sum())
    paid = float(cost(alive[order])[assignment].sum())
    return BucketPlan(buckets, assignment, 1 - held / paid)


def _cells(items: ItemLengths, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct shapes [cells, 3] and each item's cell: rounded shapes, alike ones taken together till few."""
    step = np.array([1, multiple, multiple])
    slots = -(-np.stack([items.tiles, items.prompt, items.response], axis=1) // step) * step
    coarse = 1
    while True:
        _, cell = np.unique(-(-slots // (coarse * step)), axis=0, return_inverse=True)
        cell = cell.reshape(-1)
        if cell.max() < _MOST_CELLS:
            break
        coarse *= 2
    shapes = np.zeros((cell.max() + 1, 3), slots.dtype)
    np.maximum.at(shapes, cell, slots)
    return shapes, cell


def _groups(cost: float, share: float, slots: int, shards: int, groups_per_step: int) -> int:
    """Groups a micro-batch of this bucket holds: what memory allows, no more than a step is expected to bring."""
    fit = max(1, int(slots // cost)) * shards
    expected = max(1, -(-int(np.ceil(share * groups_per_step)) // shards)) * shards
    return min(fit, expected)

"""One forward over groups, without gradient, and something read from each: log-probs, scores.

Every group once, in bucket-homogeneous micro-batches. With several processes each feeds the rows its devices hold and
hands out those it is to store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mmrlhf_jax.batch import EMPTY, GroupBatch
from mmrlhf_jax.data.buckets import MAX_BUCKETS, MULTIPLE, plan_buckets
from mmrlhf_jax.data.pipeline import GroupSource, Loader, Selection, measure, micro_batches, reading_plan, select
from mmrlhf_jax.groups import Group, Renderer
from mmrlhf_jax.nn.sharding import BATCH_AXES, BatchShare, batch_sharding, batch_share
from mmrlhf_jax.training.model import LoadedModel
from mmrlhf_jax.training.runtime import to_devices


@dataclass(frozen=True)
class ForwardConfig:
    max_buckets: int = MAX_BUCKETS
    """distinct static shapes, each compiled once"""
    multiple: int = MULTIPLE
    """prompt and response slots are multiples of this"""
    slots_per_device: int = 16384
    """tokens (tiles counted in tokens) a device forwards at once"""
    workers: int = 0
    """processes that decode and tokenize; 0 = threads of this one"""
    rows_per_part: int = 256
    """groups between two writes"""


class Forwarded(NamedTuple):
    """A batch of this process, what was read from it, [B, ...] in its order, how many groups all processes did in this
    step, and the dataset rows that this process stores."""

    batch: GroupBatch
    values: np.ndarray
    groups: int
    mine: frozenset[int]


@dataclass(frozen=True)
class GroupList:
    """Groups at hand, pictures included, as a loader's source."""

    groups: tuple[Group, ...]
    path: str = "groups"

    def with_media(self, row: int) -> Group:
        return self.groups[row]


def forward_rows(
    source: GroupSource,
    groups: Sequence[Group],
    rows: Collection[int],
    renderer: Renderer,
    model: LoadedModel,
    mesh: Mesh,
    config: ForwardConfig,
    read: Callable[[Any, GroupBatch], jax.Array],
) -> Iterator[Forwarded]:
    """`read(params, batch)` -> [B, ...] of every group of `rows`; `groups` are all of `source`, without pictures.

    Shapes are planned over all of them, so that a resumed run compiles what the first one did. Raises ValueError where
    a group is too long for the model.
    """
    selection = Selection(preferences=False)
    items = select(groups, measure(groups, renderer), selection)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    buckets = plan_buckets(
        items.lengths,
        max_buckets=config.max_buckets,
        multiple=config.multiple,
        slots_per_shard=config.slots_per_device,
        shards=shards,
        groups_per_step=len(items.items),
        tile_cost=4 * model.config.tile_cost,  # a forward alone: the tower is no longer the cheap part
    )
    plan = reading_plan(items, buckets.buckets, buckets.assignment, sorted(rows))
    share, written = batch_share(mesh), written_parts(mesh)
    loader = Loader(source, renderer, items.items, buckets.buckets, selection, items.responses, share=share.rows)
    compiled = jax.jit(read, out_shardings=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        for micro, batch in micro_batches(plan, loader, workers=config.workers):
            values = _local(compiled(model.params, to_devices(batch, mesh)), share)
            each = len(batch.row) // len(share.parts)
            mine = {int(row) for i, row in enumerate(batch.row) if share.parts[i // each] in written} - {EMPTY}
            yield Forwarded(batch, values, sum(item != EMPTY for item in micro.items), frozenset(mine))


def written_parts(mesh: Mesh) -> set[int]:
    """The parts of a batch whose rows this process stores: of the processes that hold a part, the first."""
    of = batch_share(mesh).of
    first: dict[int, int] = {}
    places: dict[Any, Any] = dict(batch_sharding(mesh).devices_indices_map((of,)))
    for device, index in places.items():
        part = index[0].indices(of)[0]
        first[part] = min(first.get(part, device.process_index), device.process_index)
    return {part for part, process in first.items() if process == jax.process_index()}


def _local(values: jax.Array, share: BatchShare) -> np.ndarray:
    """The rows of a batch-split array that this process feeds, in its order."""
    rows = values.shape[0] // share.of
    held = {(shard.index[0].start or 0) // rows: shard.data for shard in values.addressable_shards}
    return np.concatenate([np.asarray(held[part]) for part in share.parts])

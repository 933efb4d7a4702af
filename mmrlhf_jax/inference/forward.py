"""One forward over groups, without gradient, and something read from each: log-probs, scores.

Every group once, in bucket-homogeneous micro-batches; with several processes each feeds the rows its devices hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mmrlhf_jax.batch import EMPTY, GroupBatch
from mmrlhf_jax.data.buckets import MAX_BUCKETS, MULTIPLE, plan_buckets
from mmrlhf_jax.data.pipeline import GroupSource, Items, Loader, Selection, measure, micro_batches, reading_plan, select
from mmrlhf_jax.data.plan import MicroBatch
from mmrlhf_jax.groups import Group, Renderer
from mmrlhf_jax.nn.sharding import BatchShare, batch_sharding, batch_share, replicated
from mmrlhf_jax.training.metrics import Clock
from mmrlhf_jax.training.model import LoadedModel
from mmrlhf_jax.training.peers import BEHIND, doing, new_pace, next_step
from mmrlhf_jax.training.runtime import to_devices

FLUSH_SECONDS = 20.0  # a killed run loses at most what it did in this time


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
    """groups between two writes, which are not more than 20 seconds apart"""

    def __post_init__(self) -> None:
        for name in ("max_buckets", "multiple", "slots_per_device", "rows_per_part"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must not be negative")


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

    held: tuple[Group, ...]
    path: str = "groups"

    def __len__(self) -> int:
        return len(self.held)

    def groups(self) -> Iterator[Group]:
        return iter(self.held)

    def with_media(self, row: int) -> Group:
        return self.held[row]


@dataclass(frozen=True)
class Forward:
    """One forward over the groups of a source: what is read, by what, where. `groups` are all of `source`, without
    pictures: shapes are planned over all of them, so that a resumed run compiles what the first one did."""

    source: GroupSource
    groups: Sequence[Group]
    renderer: Renderer
    model: LoadedModel
    mesh: Mesh
    config: ForwardConfig
    read: Callable[[Any, GroupBatch], jax.Array]
    """(params, batch) -> [B, ...]"""


def forward_parts(forward: Forward, rows: Collection[int]) -> Iterator[Forwarded]:
    """Every group of `rows`, each process's own part of a batch, for values too large to be everywhere.

    Raises ValueError where a group is too long for the model.
    """
    share, written = batch_share(forward.mesh), written_parts(forward.mesh)
    for micro, batch, _, values in _walk(forward, rows, batch_sharding(forward.mesh)):
        each = len(batch.row) // len(share.parts)
        mine = {int(row) for i, row in enumerate(batch.row) if share.parts[i // each] in written} - {EMPTY}
        yield Forwarded(batch, _local(values, share), sum(item != EMPTY for item in micro.items), frozenset(mine))


def forward_everywhere(forward: Forward, rows: Collection[int]) -> Iterator[dict[int, np.ndarray]]:
    """What is read of every group of `rows`, by row, a batch at a time, the same on every process.

    Raises ValueError where a group is too long for the model.
    """
    for micro, _, items, values in _walk(forward, rows, replicated(forward.mesh)):
        whole = np.asarray(values)
        yield {items.items[item].row: whole[b] for b, item in enumerate(micro.items) if item != EMPTY}


def _walk(
    forward: Forward, rows: Collection[int], placed: NamedSharding
) -> Iterator[tuple[MicroBatch, GroupBatch, Items, jax.Array]]:
    config, mesh, selection = forward.config, forward.mesh, Selection(preferences=False)
    items = select(forward.groups, measure(forward.groups, forward.renderer), selection)
    share = batch_share(mesh)
    buckets = plan_buckets(
        items.lengths,
        max_buckets=config.max_buckets,
        multiple=config.multiple,
        slots_per_shard=config.slots_per_device,
        shards=share.of,
        groups_per_step=len(items.items),
        tile_cost=4 * forward.model.config.tile_cost,  # a forward alone: the tower is no longer the cheap part
    )
    plan = reading_plan(items, buckets.buckets, buckets.assignment, sorted(rows))
    loader = Loader(
        forward.source, forward.renderer, items.items, buckets.buckets, selection, items.responses, share=share.rows
    )
    compiled = jax.jit(forward.read, out_shardings=placed)
    clock = Clock()
    new_pace()
    following = iter(plan.micro_batches[1:])
    try:
        with jax.set_mesh(mesh):
            for micro, batch in clock.waiting(micro_batches(plan, loader, workers=config.workers)):
                bucket = buckets.buckets[micro.bucket]
                next_step(1.0)
                with clock.compiling(bucket):
                    values = compiled(forward.model.params, to_devices(batch, mesh))
                yield micro, batch, items, values
                clock.lap(1.0)
                if (after := next(following, None)) is not None and after.bucket != micro.bucket:
                    new_pace()  # loading it, too: videos come after pictures
    finally:
        doing(BEHIND)


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

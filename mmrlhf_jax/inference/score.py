"""Per-token log-probabilities of every response of a dataset under a model: the reference of DPO, computed once.

One forward a group, without gradient. Written in parts as it goes, so a killed run loses at most one part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mmrlhf_jax.batch import EMPTY, GroupBatch
from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.buckets import MAX_BUCKETS, MULTIPLE, plan_buckets
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.pipeline import Items, Loader, Selection, measure, micro_batches, reading_plan, select
from mmrlhf_jax.groups import Renderer
from mmrlhf_jax.models.llava_onevision.model import Compute, response_logps
from mmrlhf_jax.nn.sharding import BATCH_AXES, BatchShare, batch_sharding, batch_share
from mmrlhf_jax.training.distributed import is_speaker, wait_for_all
from mmrlhf_jax.training.model import LoadedModel
from mmrlhf_jax.training.runtime import to_devices


@dataclass(frozen=True)
class ScoreConfig:
    max_buckets: int = MAX_BUCKETS
    multiple: int = MULTIPLE
    slots_per_device: int = 16384
    """tokens (tiles counted in tokens) a device forwards at once"""
    workers: int = 0
    rows_per_part: int = 256
    """groups between two writes"""


def write_reference_logps(
    dataset: PreparedDataset,
    rows: Collection[int],
    renderer: Renderer,
    model: LoadedModel,
    store: AnnotationStore,
    mesh: Mesh,
    compute: Compute,
    config: ScoreConfig,
) -> int:
    """Stores `logp` f32 [tokens of all responses, end to end] for each of `rows` that has none yet; returns how many
    it wrote."""
    groups = list(dataset.groups())
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
    todo = sorted(set(rows) - store.done())
    wait_for_all("every process knows what there is to do")
    plan = reading_plan(items, buckets.buckets, buckets.assignment, todo)
    share, written = batch_share(mesh), written_parts(mesh)
    loader = Loader(dataset, renderer, items.items, buckets.buckets, selection, items.responses, share=share.rows)
    score = jax.jit(
        lambda params, batch: response_logps(params, model.config, batch, compute).logp,
        out_shardings=batch_sharding(mesh),
    )
    pending: dict[int, np.ndarray] = {}
    with (
        jax.set_mesh(mesh),
        tqdm(total=len(rows), initial=len(rows) - len(todo), unit="group", disable=not is_speaker()) as bar,
    ):
        for micro, batch in micro_batches(plan, loader, workers=config.workers):
            logp = _local(score(model.params, to_devices(batch, mesh)), share)
            found = split_rows(logp, batch, items, dataset.path)
            each = len(batch.row) // len(share.parts)
            mine = {int(row) for i, row in enumerate(batch.row) if share.parts[i // each] in written}
            pending.update({row: values for row, values in found.items() if row in mine})
            bar.update(sum(item != EMPTY for item in micro.items))
            if len(pending) >= config.rows_per_part:
                _flush(store, groups, pending)
    _flush(store, groups, pending)
    wait_for_all("every process has stored its rows")
    return len(todo)


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


def split_rows(logp: np.ndarray, batch: GroupBatch, items: Items, path: str) -> dict[int, np.ndarray]:
    """Log-probs f32 [B, S] as one array a row of the dataset at `path`, padding removed. Raises ValueError at one that
    is not finite."""
    p, branches = batch.tap_index.shape[1], batch.branch_end.shape[1]
    out = {}
    for b, row in enumerate(np.asarray(batch.row)):
        if row == EMPTY:
            continue
        values = logp[b, batch.branch[b, p:] < branches]
        if not np.isfinite(values).all():
            raise ValueError(f"{path} row {row}: the model gives non-finite log-probs; try compute dtype float32")
        out[int(row)] = values
    return out


def _flush(store: AnnotationStore, groups: Sequence, pending: dict[int, np.ndarray]) -> None:
    if pending:
        rows = sorted(pending)
        hashes = [groups[row].content_hash() for row in rows]
        store.write(rows, hashes, {"logp": [pending[row] for row in rows]})
        pending.clear()

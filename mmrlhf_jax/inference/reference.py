"""Per-token log-probabilities of every response of a dataset under a model: the reference of DPO, computed once.

Written in parts as it goes, so a killed run loses at most one part.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mmrlhf_jax.batch import EMPTY, GroupBatch
from mmrlhf_jax.command import progress_line
from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.groups import Group, Renderer
from mmrlhf_jax.inference.forward import FLUSH_SECONDS, Forward, ForwardConfig, forward_parts
from mmrlhf_jax.inference.watch import Watch
from mmrlhf_jax.models.llava_onevision.model import Compute, LlavaOnevision, response_logps
from mmrlhf_jax.training.distributed import agree_on_view, is_speaker, wait_for_all
from mmrlhf_jax.training.model import LoadedModel
from mmrlhf_jax.training.peers import STORING, meanwhile


def write_reference_logps(
    dataset: PreparedDataset,
    rows: Collection[int],
    renderer: Renderer,
    model: LoadedModel,
    store: AnnotationStore,
    mesh: Mesh,
    compute: Compute,
    config: ForwardConfig,
    watch: Watch,
) -> int:
    """Stores `logp` f32 [tokens of all responses, end to end] for each of `rows` that has none yet; returns how many
    it wrote. Raises CommandError when stopped; what is done is stored then."""
    groups = list(dataset.groups())
    todo = sorted(set(rows) - store.done())
    agree_on_view(store.directory, todo)

    def logps(params: LlavaOnevision, batch: GroupBatch) -> jax.Array:
        return response_logps(params, model.config, batch, compute).logp

    pending: dict[int, np.ndarray] = {}
    stored = time.monotonic()
    forward = Forward(dataset, groups, renderer, model, mesh, config, logps)
    with progress_line(total=len(rows), initial=len(rows) - len(todo), unit="group", disable=not is_speaker()) as bar:
        try:
            for batch, logp, count, mine in forward_parts(forward, todo) if todo else ():
                found = split_rows(logp, batch, dataset.path)
                pending.update({row: values for row, values in found.items() if row in mine})
                bar.update(count)
                watch.check()
                if len(pending) >= config.rows_per_part or time.monotonic() - stored > FLUSH_SECONDS:
                    _flush(store, groups, pending)
                    stored = time.monotonic()
        finally:
            _flush(store, groups, pending)
    wait_for_all("every process has stored its rows")
    return len(todo)


def split_rows(logp: np.ndarray, batch: GroupBatch, path: str) -> dict[int, np.ndarray]:
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


def _flush(store: AnnotationStore, groups: Sequence[Group], pending: dict[int, np.ndarray]) -> None:
    if pending:
        rows = sorted(pending)
        hashes = [groups[row].content_hash() for row in rows]
        with meanwhile(STORING):
            store.write(rows, hashes, {"logp": [pending[row] for row in rows]})
        pending.clear()

"""Which evaluation of a run was the best, and when to stop waiting for a better one: read from RUN/evaluation.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmrlhf_jax.models.files import JSON_BYTES, MIB, read_text
from mmrlhf_jax.training.run import RunDirectory, read_lines

_MOST_BYTES = 32 * MIB  # of a stranger's evaluation.jsonl: 100,000 evaluations

Record = Mapping[str, Any]


def better_low(metric: str) -> bool:
    """Losses fall, every other metric is hoped to rise."""
    return metric.startswith("loss")


def best_record(records: Sequence[Record], metric: str) -> Record | None:
    """The best record, the earliest of equals; one whose metric is not finite is never it."""
    sign, name = 1 if better_low(metric) else -1, f"eval/{metric}"
    finite = [record for record in records if math.isfinite(record[name])]
    return min(finite, key=lambda record: sign * record[name], default=None)


def best_trained(records: Sequence[Record], metric: str) -> Record | None:
    """The best record after the first step: the start has no checkpoint, it is the model the run began with."""
    return best_record([record for record in records if record["step"]], metric)


def is_best(records: Sequence[Record], metric: str) -> bool:
    """Whether the newest record is of the best trained state so far."""
    return bool(records) and best_trained(records, metric) is records[-1]


def ran_out_of_patience(records: Sequence[Record], metric: str, patience: int) -> bool:
    """Whether the last `patience` evaluations brought nothing better, the start included; never where patience is 0."""
    best = best_record(records, metric)
    return patience > 0 and best is not None and len(records) - 1 - records.index(best) >= patience


def best_step(run: RunDirectory, steps: Collection[int]) -> int:
    """The step, of those that have a checkpoint, whose evaluation was the best.

    Raises ValueError for a run that was never evaluated where it has a checkpoint.
    """
    metric = json.loads(read_text(run.recipe, JSON_BYTES))["evaluation.metric"]  # a recipe may hold infinities
    records = [record for record in read_lines(run.evaluation, _MOST_BYTES) if record["step"] in steps]
    best = best_record(records, metric)
    if best is None:
        raise ValueError(f"{run.path} has no evaluated checkpoint: train with evaluation.every, or name a step")
    return int(best["step"])

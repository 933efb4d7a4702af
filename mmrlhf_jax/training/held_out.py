"""Evaluation on groups that are never trained on: the objective's own loss and metrics, over all of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmrlhf_jax.data.pipeline import Loader, micro_batches
from mmrlhf_jax.data.plan import StepPlan
from mmrlhf_jax.groups import Group
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.nn.sharding import replicated
from mmrlhf_jax.objectives import (
    AOT,
    DPO,
    AOTUnpaired,
    BetaDPO,
    LLaVARLHFReward,
    MinAvgOut,
    MMDPOReleasedBatch,
    Objective,
    ScalarReward,
    Supervised,
)
from mmrlhf_jax.training.peers import doing
from mmrlhf_jax.training.runtime import to_devices
from mmrlhf_jax.training.state import TrainState, combine
from mmrlhf_jax.training.step import loss_and_metrics, metric_names


@dataclass(frozen=True)
class HeldOut:
    """What is evaluated: `plan` visits every held-out item once."""

    plan: StepPlan
    loader: Loader
    groups: int


def held_out_rows(groups: Sequence[Group], share: float, seed: int) -> list[int]:
    """About `share` of the rows, chosen by prompt and pictures: a prompt never stands on both sides, and a row's side
    depends on nothing but itself and the seed. Where groups answer several questions (`prepare --cross-prompt`), of
    which another group may ask one too, pictures alone decide for all.

    Raises ValueError where one of the sides would be empty.
    """
    by_prompt = all(group.one_prompt for group in groups)
    chosen = [row for row, group in enumerate(groups) if _place(group, seed, by_prompt) < share]
    if not chosen or len(chosen) == len(groups):
        raise ValueError(
            f"evaluation.share {share:g} sets {len(chosen)} of {len(groups)} groups aside: choose a share that leaves "
            "groups on both sides, or name an evaluation.dataset"
        )
    return chosen


def _place(group: Group, seed: int, by_prompt: bool) -> float:
    """Where in [0, 1) a group's prompt and pictures fall, or its pictures alone, where it has any."""
    turns = [[t.role, t.text] for t in group.prompt] if by_prompt or not group.media else []
    content = turns, [m.sha256 or m.path for m in group.media]
    digest = hashlib.sha256(json.dumps([seed, content]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def evaluated_as(objective: Objective) -> Objective:
    """The objective whose loss is reported: its own, unless its loss is no sum over pairs but hangs on which pairs
    share a batch; such a one is evaluated as DPO at its base beta, as plain Bradley-Terry, or by likelihood."""
    if isinstance(objective, MinAvgOut):
        return Supervised()
    if isinstance(objective, LLaVARLHFReward):
        return ScalarReward(centre=0.0, tie=0.0)
    if isinstance(objective, MMDPOReleasedBatch | BetaDPO | AOT | AOTUnpaired):
        return DPO(beta=objective.beta, gamma=objective.gamma)
    return objective


def make_evaluate(
    held_out: HeldOut,
    config: LlavaOnevisionConfig,
    compute: Compute,
    objective: Objective,
    mesh: Mesh,
    *,
    workers: int,
) -> Callable[[TrainState, Any], dict[str, Any]]:
    """(state, reference) -> the record of an evaluation: "step", "groups", "seconds" and the metrics under "eval/"."""
    objective = evaluated_as(objective)
    whole = replicated(mesh)

    def add(trainable, frozen, reference, sums, batch):
        _, (metrics, _) = loss_and_metrics(
            combine(trainable, frozen),
            reference,
            batch,
            jax.random.key(0),  # only objectives with step statistics draw, and those are not evaluated as themselves
            config=config,
            compute=compute,
            objective=objective,
        )
        return jax.tree.map(jnp.add, sums, metrics)

    compiled = jax.jit(add, donate_argnums=3, out_shardings=whole)
    zeros = jax.jit(lambda: {name: jnp.zeros(()) for name in metric_names(objective)}, out_shardings=whole)

    def evaluate(state: TrainState, reference: Any) -> dict[str, Any]:
        began = time.perf_counter()
        sums = zeros()
        batches = micro_batches(held_out.plan, held_out.loader, workers=workers)
        for number, (_, host_batch) in enumerate(batches, 1):
            batch = to_devices(host_batch, mesh)
            jax.block_until_ready(sums)  # of the batch before: so far it has come, and the next is here already
            doing(f"evaluating, batch {number} of {len(held_out.plan.micro_batches)}")
            sums = compiled(state.trainable, state.frozen, reference, sums, batch)
        values = {f"eval/{name}": float(np.asarray(value)) for name, value in sums.items()}
        step = int(np.asarray(state.step))
        return {"step": step, **values, "groups": held_out.groups, "seconds": time.perf_counter() - began}

    return evaluate


def check_metric(metric: str, objective: Objective) -> None:
    """Raises ValueError, before any work, for a metric that evaluations will not have."""
    names = metric_names(evaluated_as(objective))
    if metric not in names:
        raise ValueError(f"evaluation.metric {metric!r} is not measured; choose one of {', '.join(names)}")


def with_totals(plan: StepPlan, totals: Any) -> StepPlan:
    """The plan with the totals of the whole set in place of each step's: metrics then add up to the set's."""
    return dataclasses.replace(
        plan, micro_batches=tuple(dataclasses.replace(micro, totals=totals) for micro in plan.micro_batches)
    )

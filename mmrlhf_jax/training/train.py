"""Training, top to bottom: devices and model, data, state, compiled functions, loop.

The same loop serves supervised fine-tuning and every preference objective; what differs is the objective a recipe
holds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from mmrlhf_jax.batch import EMPTY, Totals
from mmrlhf_jax.command import INTERRUPTED, CommandError
from mmrlhf_jax.data.dataset import open_dataset
from mmrlhf_jax.data.pipeline import micro_batches
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.nn.sharding import BATCH_AXES, make_mesh, replicated
from mmrlhf_jax.training.data import annotate_command, describe, plan_data, reference_key, stored_reference
from mmrlhf_jax.training.metrics import Clock, MetricsLog
from mmrlhf_jax.training.recipe import Recipe
from mmrlhf_jax.training.run import Checkpoints, RunDirectory, load_model, model_fingerprint
from mmrlhf_jax.training.runtime import set_up_jax, stop_signals, to_devices
from mmrlhf_jax.training.setup import (
    attention_of,
    check_resumable,
    compute_of,
    first_state,
    online_reference,
    resume,
    start_run,
)
from mmrlhf_jax.training.state import learning_rate, make_optimizer
from mmrlhf_jax.training.step import Seen, Sums, make_accumulate, make_apply, make_zero_sums, metric_names


class NonFiniteStep(CommandError):
    """A loss or gradient is NaN or infinite. No checkpoint holds the step."""


def train(recipe: Recipe, output: str | Path) -> None:
    """Runs `recipe` into the RUN directory `output`; the same command again goes on where it stopped.

    Raises ValueError where recipe, data and model do not fit, NonFiniteStep at a NaN, and CommandError with status 75
    after an interruption, which leaves a checkpoint.
    """
    run = RunDirectory(Path(output))
    check_resumable(run, recipe)
    if run.complete.exists():
        print(f"{run.path} is complete already")
        return

    # --- devices and model -------------------------------------------------------------------------------------------
    set_up_jax(recipe.compute.dtype)
    mesh = make_mesh(recipe.mesh)
    print(f"{mesh.size} devices ({jax.devices()[0].device_kind}), mesh {dict(mesh.shape)}")
    start = load_model(recipe.model, mesh, recipe.sharding, rates=recipe.optimizer.rates)

    # --- data --------------------------------------------------------------------------------------------------------
    dataset = open_dataset(recipe.dataset)
    renderer = load_renderer(str(start.assets), recipe.render)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    data = plan_data(recipe, dataset, renderer, start.config, shards=shards)
    config, compute = start.config, compute_of(recipe, mesh)
    print("\n".join(describe(data, lambda bucket: attention_of(compute, config, bucket))), flush=True)
    fingerprints = {
        "model": model_fingerprint(config, start.params),
        "dataset": dataset.fingerprint,
        "renderer": renderer.fingerprint,
    }
    loader = data.loader
    if recipe.objective.needs_reference and recipe.reference == "stored":
        key = reference_key(fingerprints["model"], renderer, recipe.compute.dtype)
        stored = stored_reference(dataset, key, data.items, annotate_command(recipe))
        loader = dataclasses.replace(loader, reference=stored)

    # --- state: this run's latest checkpoint, else the starting model ------------------------------------------------
    start_run(run, recipe, start, fingerprints)
    checkpoints = Checkpoints(run.checkpoints, recipe.checkpoint)
    state, shardings = first_state(recipe, start, data.plan.steps, mesh)
    position = {"plan": data.plan.fingerprint, **fingerprints}
    state = resume(checkpoints, state, position)
    reference = online_reference(recipe, mesh)

    # --- the two compiled functions ----------------------------------------------------------------------------------
    sums_sharding = Sums(shardings.trainable, replicated(mesh))
    accumulate = make_accumulate(config, compute, recipe.objective, sums_sharding=sums_sharding)
    apply = make_apply(make_optimizer(recipe.optimizer, data.plan.steps), state_sharding=shardings)
    zero_sums = make_zero_sums(state.trainable, metric_names(recipe.objective), sums_sharding=sums_sharding)
    del start

    # --- the loop --------------------------------------------------------------------------------------------------
    first_step = int(state.step)
    schedule = learning_rate(recipe.optimizer, data.plan.steps)
    tensorboard = run.path / "tensorboard" if recipe.log.tensorboard else None
    log = MetricsLog(run.metrics, first_step=first_step, steps=data.plan.steps, tensorboard=tensorboard)
    clock, sums, seen, pending = Clock(), None, [], None
    batches = micro_batches(data.plan, loader, first_step=first_step, workers=recipe.data.workers)
    # closing the checkpoints waits for the one being written, however the loop ends
    with closing(checkpoints), closing(log), jax.set_mesh(mesh), stop_signals() as stop:
        for micro, host_batch in clock.waiting(batches):
            batch = to_devices(host_batch, mesh)
            key = jax.device_put(jax.random.fold_in(jax.random.key(recipe.seed), micro.step), replicated(mesh))
            sums = zero_sums() if sums is None else sums
            with jax.transfer_guard("disallow"), clock.compiling(micro.bucket):
                sums, here = accumulate(state.trainable, state.frozen, reference, sums, batch, key)
            seen.append(here)
            if not micro.last:
                continue
            with jax.transfer_guard("disallow"):
                state, metrics = apply(state, sums)
            if pending:  # read one step late: devices never wait for the host
                log.write(_record(*pending, schedule, clock))
            done = micro.step + 1
            pending = (done, metrics, seen, micro.totals)
            sums, seen = None, []
            if done % recipe.checkpoint.every == 0 or done == data.plan.steps or stop.is_set():
                log.write(_record(*pending, schedule, clock))  # raises at a NaN, which is therefore never saved
                pending = None
                checkpoints.save(state, {"step": done, **position})
            if stop.is_set() and done < data.plan.steps:
                raise CommandError(f"interrupted after step {done}; run the same command to go on", INTERRUPTED)
    run.complete.write_text(json.dumps({"steps": data.plan.steps}) + "\n")
    print(f"done: {data.plan.steps} steps, checkpoint {run.checkpoints / str(data.plan.steps)}")


def _record(
    step: int, metrics: Mapping[str, Any], seen: list[Seen], totals: Totals, schedule: optax.Schedule, clock: Clock
) -> dict[str, Any]:
    """The line of metrics.jsonl. Raises NonFiniteStep naming the dataset rows whose log-probs, or whose step's
    gradient, are not finite."""
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    rows, finite = (
        np.concatenate([np.asarray(jax.device_get(part)) for part in parts]) for parts in zip(*seen, strict=True)
    )
    rows, finite = rows[rows != EMPTY], finite[rows != EMPTY]
    if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
        bad = rows[~finite] if not finite.all() else rows
        what = "log-probs of dataset rows" if not finite.all() else "gradient of a step with dataset rows"
        raise NonFiniteStep(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: non-finite {what} "
            f"{', '.join(str(row) for row in bad[:16])}. The last checkpoint is from before it; look at these rows, "
            "lower optimizer.learning_rate, or set compute.dtype float32"
        )
    lap = clock.lap()
    return {
        "step": step,
        **values,
        "learning_rate": float(schedule(step - 1)),
        **lap,
        "pairs_per_second": totals.pairs / lap["seconds"],
        "groups_per_second": totals.groups / lap["seconds"],
        "response_tokens_per_second": totals.tokens / lap["seconds"],
        "rows": sorted(int(row) for row in rows),
    }

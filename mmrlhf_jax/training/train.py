"""Training, top to bottom: devices and model, data, state, compiled functions, loop.

The same loop serves supervised fine-tuning and every preference objective; what differs is the objective a recipe
holds. Every process of a run executes all of this; one of them speaks and writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from mmrlhf_jax.batch import EMPTY, Totals
from mmrlhf_jax.command import INTERRUPTED, CommandError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.pipeline import Loader, micro_batches
from mmrlhf_jax.data.plan import StepPlan
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.nn.sharding import batch_share, make_mesh, replicated
from mmrlhf_jax.training.best import best_trained, is_best, ran_out_of_patience
from mmrlhf_jax.training.data import (
    describe,
    measure_data,
    plan_data,
    plan_held_out,
    scores_fingerprint,
    shapes_of,
    with_reference,
)
from mmrlhf_jax.training.distributed import AgreedStop, agree_on_view, check_agreement, is_speaker, job_lease, say
from mmrlhf_jax.training.environment import note_environment
from mmrlhf_jax.training.fit import device_memory, fit
from mmrlhf_jax.training.grace import bytes_of, too_slow
from mmrlhf_jax.training.held_out import check_metric, make_evaluate
from mmrlhf_jax.training.metrics import Clock, MetricsLog, check_log, open_log
from mmrlhf_jax.training.model import model_fingerprint, with_fresh_adapters
from mmrlhf_jax.training.peers import doing, set_limits, step_begins
from mmrlhf_jax.training.planning import memory_advice
from mmrlhf_jax.training.recipe import Recipe, flatten
from mmrlhf_jax.training.run import Checkpoints, RunDirectory, read_lines, write_text
from mmrlhf_jax.training.runtime import Profiler, explain_memory, parse_profile, set_up_jax, stop_signals, to_devices
from mmrlhf_jax.training.setup import (
    attention_of,
    check_resumable,
    compute_of,
    first_state,
    other_reference,
    reference_source,
    renderer_of,
    resume,
    start_run,
    starting_model,
)
from mmrlhf_jax.training.state import TrainState, learning_rate, make_optimizer
from mmrlhf_jax.training.step import Seen, Sums, make_accumulate, make_apply, make_zero_sums, metric_names
from mmrlhf_jax.training.work import Work, work_of


class NonFiniteStep(CommandError):
    """A loss or gradient is NaN or infinite. No checkpoint holds the step."""


def train(recipe: Recipe, output: str | os.PathLike[str]) -> None:
    """Runs `recipe` into the RUN directory `output`; the same command again goes on where it stopped.

    Raises ValueError where recipe, data and model do not fit, NonFiniteStep at a NaN, LeaseError where another job
    writes `output`, and CommandError where it cannot be written or, with status 75, after an interruption, which
    leaves a checkpoint.
    """
    run = RunDirectory.at(output)
    agree_on_view(run.path, [run.complete.exists(), run.exists() and run.has_begun()])
    check_resumable(run, recipe)
    check_log(run, recipe.log)
    check_metric(recipe.evaluation.metric, recipe.objective)
    profiler = Profiler(run.path / "profile", parse_profile(recipe.log.profile))
    if run.complete.exists():
        say(f"{run.path} is complete already")
        return

    set_up_jax(recipe.compute.dtype)
    with job_lease(run.lease, str(run.path)):
        _train(recipe, run, profiler)


def _train(recipe: Recipe, run: RunDirectory, profiler: Profiler) -> None:
    # --- devices and model -------------------------------------------------------------------------------------------
    mesh = make_mesh(recipe.mesh)
    share = batch_share(mesh)
    kind = jax.devices()[0].device_kind
    say(f"{mesh.size} devices ({kind}) of {jax.process_count()} processes, mesh {dict(mesh.shape)}")
    lora = recipe.lora.rank > 0
    start = starting_model(recipe, mesh)

    # --- data --------------------------------------------------------------------------------------------------------
    renderer = renderer_of(recipe, start)
    other = other_reference(recipe, start, renderer, mesh)
    measured = measure_data(recipe, open_dataset(recipe.dataset), renderer)
    config = start.config
    fitted = fit(
        recipe,
        config,
        mesh,
        shapes_of(measured, config, share),
        platform=mesh.devices.flat[0].platform,
        memory=device_memory(),
    )
    recipe, compute = fitted.recipe, compute_of(fitted.recipe, mesh)
    say(str(fitted))
    data = plan_data(recipe, measured, config, share)
    say(*describe(data, lambda bucket: attention_of(compute, config, bucket)))
    fingerprints = {
        "model": model_fingerprint(config, start.params),
        "dataset": measured.dataset.fingerprint,
        "renderer": renderer.fingerprint,
        **({} if measured.scores is None else {"margins": scores_fingerprint(measured.scores)}),
        **({} if other is None else {"reference": model_fingerprint(other.config, other.params)}),
    }
    referred = fingerprints.get("reference", fingerprints["model"])
    if recipe.reference == "stored":
        other = None  # it was loaded for its fingerprint; its log-probs are there
    loader = with_reference(data.loader, measured.dataset, recipe, referred, renderer)
    held_out = None
    if recipe.evaluation.every:
        aside = measured
        if recipe.evaluation.dataset:
            aside = measure_data(recipe, open_dataset(recipe.evaluation.dataset), renderer, held_out=True)
            fingerprints["evaluation"] = aside.dataset.fingerprint
        held_out = plan_held_out(recipe, aside, config, share)
        watched = with_reference(held_out.loader, aside.dataset, recipe, referred, renderer)
        held_out = dataclasses.replace(held_out, loader=watched)
    position = {"plan": data.plan.fingerprint, **fingerprints}
    check_agreement("recipe, model or data", json.dumps([flatten(recipe), position]))

    # --- state: this run's latest checkpoint, else the starting model ------------------------------------------------
    params = with_fresh_adapters(start, recipe.lora, mesh, recipe.sharding, recipe.seed) if lora else start.params
    state, shardings = first_state(recipe, params, data.plan.steps, mesh, config.decoder.vocab)
    start_run(run, recipe, start, fingerprints)
    records: list[dict[str, Any]] = []
    best = _best_of(records, recipe.evaluation.metric)
    checkpoints = Checkpoints(run.checkpoints, recipe.checkpoint, best=best)
    del start, params
    state = resume(run, checkpoints, state, shardings, position, whole=not lora)
    first_step = int(state.step)
    note_environment(run, first_step, mesh)
    records += [record for record in read_lines(run.evaluation) if record["step"] <= first_step]

    # --- the compiled functions --------------------------------------------------------------------------------------
    sums_sharding = Sums(shardings.trainable, replicated(mesh), replicated(mesh))
    evaluate = held_out and make_evaluate(
        held_out, config, compute, recipe.objective, mesh, workers=recipe.data.workers
    )
    session = Session(
        recipe=recipe,
        mesh=mesh,
        plan=data.plan,
        buckets=data.buckets.buckets,
        loader=loader,
        accumulate=make_accumulate(config, compute, recipe.objective, sums_sharding=sums_sharding),
        apply=make_apply(make_optimizer(recipe.optimizer, data.plan.steps), state_sharding=shardings),
        zero_sums=make_zero_sums(
            state.trainable, metric_names(recipe.objective), sums_sharding=sums_sharding, averages=state.averages
        ),
        work=work_of(recipe, config, data, measured.lengths, mesh),
        reference=reference_source(recipe, mesh, other),
        evaluate=evaluate or None,
        records=records,
        checkpoints=checkpoints,
        position=position,
        log=open_log(run, recipe.log, flatten(recipe), first_step=first_step, steps=data.plan.steps)
        if is_speaker()
        else MetricsLog(),
        profiler=profiler,
    )

    # --- the loop: closing the checkpoints waits for the one being written, however it ends -----------------------
    set_limits(recipe.stuck)
    with closing(checkpoints), closing(session.log), closing(profiler), jax.set_mesh(mesh):
        try:
            done = _loop(session, state)
        finally:
            doing("closing the run")
    if is_speaker():
        early = f", stopped early of {data.plan.steps}" if done < data.plan.steps else ""
        write_text(run.complete, json.dumps({"steps": done, "planned": data.plan.steps}) + "\n")
        say(f"done: {done} steps{early}, checkpoint {run.checkpoints / str(done)}", *_verdict(run, session))


def _best_of(records: list[dict[str, Any]], metric: str) -> Callable[[], int | None]:
    """The step of the best evaluation so far; `records` grows."""

    def best() -> int | None:
        found = best_trained(records, metric)
        return None if found is None else int(found["step"])

    return best


def _verdict(run: RunDirectory, session: Session) -> list[str]:
    """What the held-out groups say of the run: its best checkpoint, beside the model it started from."""
    metric = session.recipe.evaluation.metric
    best = best_trained(session.records, metric)
    if best is None:
        return []
    name, began = f"eval/{metric}", session.records[0]
    return [
        f"best on held-out groups: {run.path}@{best['step']}, {metric} {best[name]:.4g}, at step 0 {began[name]:.4g}"
    ]


@dataclass(frozen=True)
class Session:
    """What a run's loop uses; nothing of it changes but the log, the checkpoints and the list of evaluations."""

    recipe: Recipe
    mesh: Mesh
    plan: StepPlan
    buckets: tuple[Bucket, ...]
    loader: Loader
    accumulate: Any
    apply: Any
    zero_sums: Any
    work: Work
    reference: Callable[[TrainState], Any]
    evaluate: Callable[[TrainState, Any], dict[str, Any]] | None
    records: list[dict[str, Any]]
    checkpoints: Checkpoints
    position: Mapping[str, Any]
    log: MetricsLog
    profiler: Profiler


def _loop(run: Session, state: TrainState) -> int:
    """Trains from the state's step to the end of the plan, or until held-out groups stop getting better; returns the
    number of steps done."""
    recipe, steps, first_step = run.recipe, run.plan.steps, int(state.step)
    schedule, agreed_stop = learning_rate(recipe.optimizer, steps), AgreedStop(run.mesh)
    key_of = jax.jit(
        lambda step: jax.random.fold_in(jax.random.key(recipe.seed), step), out_shardings=replicated(run.mesh)
    )
    clock, sums, seen, pending = Clock(), None, [], None
    told = run.checkpoints.written
    _warn_of_grace(run, state)
    batches = micro_batches(run.plan, run.loader, first_step=first_step, workers=recipe.data.workers)
    running = (first_step + 1, run.buckets[-1])

    def advice() -> str:
        return memory_advice(recipe, *running, run.mesh)

    with explain_memory(advice), stop_signals() as stop:
        if first_step == 0 and not run.records:
            _evaluate(run, state)
            clock.restart()
        elif _enough(run):
            return first_step
        for micro, host_batch in clock.waiting(batches):
            done = micro.step + 1
            running = (done, run.buckets[micro.bucket])
            step_begins(done, run.work.flops[done - 1])
            run.profiler.before(done)
            batch = to_devices(host_batch, run.mesh)
            sums = run.zero_sums() if sums is None else sums
            with jax.transfer_guard("disallow"), clock.compiling(micro.bucket):
                reference, key = run.reference(state), key_of(state.step)
                averages = state.averages
                sums, here = run.accumulate(state.trainable, state.frozen, reference, sums, batch, key, averages)
            seen.append(here)
            if not micro.last:
                continue
            with jax.transfer_guard("disallow"):
                state, metrics = run.apply(state, sums)
            run.profiler.after(done, metrics)
            if pending:  # read one step late: devices never wait for the host
                run.log.step(_record(*pending, schedule, clock, run.work))
            pending = (done, metrics, seen, micro.totals)
            sums, seen = None, []
            run.checkpoints.check()  # now, and not when the next is due: until then there would be none
            if told is None and (told := run.checkpoints.written) is not None:
                _warn_of_grace(run, state)
            stopping = agreed_stop(stop.is_set())
            due = run.evaluate is not None and (done % recipe.evaluation.every == 0 or done == steps)
            if not (due or stopping or done % recipe.checkpoint.every == 0 or done == steps):
                continue
            run.log.step(
                _record(*pending, schedule, clock, run.work)
            )  # raises at a NaN, which is therefore never saved
            pending = None
            with clock.elsewhere():
                enough = due and _evaluate(run, state)
                better = due and is_best(run.records, recipe.evaluation.metric)
                if better or enough or stopping or done % recipe.checkpoint.every == 0 or done == steps:
                    run.log.flush()
                    doing("saving a checkpoint")
                    position = {"step": done, **run.position}
                    run.checkpoints.save(state, position, whole=not recipe.lora.rank)
            if enough:
                return done
            if stopping and done < steps:
                raise CommandError(f"interrupted after step {done}; run the same command to go on", INTERRUPTED)
    return steps


def _warn_of_grace(run: Session, state: TrainState) -> None:
    """Says where a checkpoint cannot be whole between SIGTERM and SIGKILL, as far as is known by now."""
    size = bytes_of(state.trainable, () if run.recipe.lora.rank else state.frozen, state.optimizer)
    if warning := too_slow(size, run.checkpoints.written, run.recipe.checkpoint, jax.process_count()):
        say(warning)


def _evaluate(run: Session, state: TrainState) -> bool:
    """Scores the held-out groups, if there are any; returns whether to stop."""
    if run.evaluate is None:
        return False
    record = run.evaluate(state, run.reference(state))
    run.records.append(record)
    run.log.evaluation(record)
    if bad := [name for name, value in record.items() if not math.isfinite(value)]:
        say(
            f"note: step {record['step']}: not finite over the held-out groups: {', '.join(bad)}. This evaluation "
            "counts for nothing; compute.dtype float32 may help"
        )
    return _enough(run)


def _enough(run: Session) -> bool:
    evaluation = run.recipe.evaluation
    return ran_out_of_patience(run.records, evaluation.metric, evaluation.patience)


def _record(
    step: int,
    metrics: Mapping[str, Any],
    seen: list[Seen],
    totals: Totals,
    schedule: optax.Schedule,
    clock: Clock,
    work: Work,
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
    lap = clock.lap(work.flops[step - 1])
    return {
        "step": step,
        **values,
        "learning_rate": float(schedule(step - 1)),
        **lap,
        "groups_per_second": totals.groups / lap["seconds"],
        "response_tokens_per_second": totals.tokens / lap["seconds"],
        **work.rates(step, lap["seconds"]),
        "rows": sorted(int(row) for row in rows),
    }

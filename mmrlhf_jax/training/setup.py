"""What stands between a recipe and its loop: the run directory, the first or restored state, the reference."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from textwrap import shorten
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.groups import Bucket, Renderer
from mmrlhf_jax.models.critique_reward.config import RewardSettings
from mmrlhf_jax.models.critique_reward.render import renderer_with, settings_for_training
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.models.llava_onevision.weights import copy_assets
from mmrlhf_jax.nn import lora
from mmrlhf_jax.nn.attention import choose_backend
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import replicated
from mmrlhf_jax.objectives import CritiqueReward, RewardObjective
from mmrlhf_jax.training import recipe as recipes
from mmrlhf_jax.training.distributed import agree_on_view, is_speaker, outcomes, say, wait_for_all
from mmrlhf_jax.training.model import LoadedModel, absolute, check_family, load_model, with_fresh_head
from mmrlhf_jax.training.recipe import INFERENCE, Recipe
from mmrlhf_jax.training.run import Checkpoints, RunDirectory, abstract_of, write_text
from mmrlhf_jax.training.state import (
    TrainState,
    combine,
    loading_rates,
    make_optimizer,
    partition,
    sharing_tower,
    state_shardings,
    trains,
)
from mmrlhf_jax.training.step import initial_averages

OTHERS_READ = 900.0  # seconds that a process which cannot read a checkpoint waits to hear whether others can


def check_resumable(run: RunDirectory, recipe: Recipe) -> None:
    """Raises UsageError when the recipe lacks something, ValueError when the directory holds something else, or a run
    whose recipe differs where it matters."""
    if missing := [name for name in ("model", "dataset") if not getattr(recipe, name)]:
        raise UsageError(f"the recipe names no {' and no '.join(missing)}: add --{' ... --'.join(missing)} ...")
    if run.exists() and run.has_begun():
        saved = json.loads(run.recipe.read_text())
        changed = recipes.differences(saved, recipe)
        if run.complete.exists():  # what a run to be resumed is held to by fingerprints, this one by name
            now = recipes.flatten(recipe)
            changed += [f"{n}: was {saved[n]!r}, now {now[n]!r}" for n in ("model", "dataset") if saved[n] != now[n]]
        if changed:
            raise ValueError(
                f"{run.path} holds a run of another recipe; use another --output, or undo:\n  " + "\n  ".join(changed)
            )
    elif not run.exists() and run.path.exists() and not run.model.exists() and _foreign(run):
        raise ValueError(f"{run.path} exists and is no run; use another --output")


def _foreign(run: RunDirectory) -> bool:
    """Whether there is anything but the lease of a job killed at its very start."""
    return any(file.name != run.lease.name for file in run.path.iterdir())


def starting_model(recipe: Recipe, mesh: Mesh) -> LoadedModel:
    """What `recipe` trains on from, parts that train in fp32; of a reward model that is new, under a fresh head.

    Raises ValueError where a policy is trained and the model is none.
    """
    start = load_model(recipe.model, mesh, recipe.sharding, rates=loading_rates(recipe))
    if not isinstance(recipe.objective, RewardObjective):
        return check_family(start, recipe.model, reward=False)
    head = recipe.reward
    return with_fresh_head(
        start, head.head, mesh, recipe.sharding, recipe.seed, attributes=head.attributes, quantiles=head.quantiles
    )


def other_reference(recipe: Recipe, start: LoadedModel, renderer: Renderer, mesh: Mesh) -> LoadedModel | None:
    """The recipe's reference_model, None where it names none.

    Raises ValueError where its configuration is not that of the model training starts from, or where it reads other
    tokens.
    """
    if not recipe.reference_model:
        return None
    found = load_model(recipe.reference_model, mesh, recipe.sharding, rates=INFERENCE)
    check_family(found, recipe.reference_model, reward=False)
    if found.config != start.config:
        raise ValueError(f"{recipe.reference_model} and {recipe.model} differ in config.json: no reference for it")
    if load_renderer(str(found.assets), recipe.render).fingerprint != renderer.fingerprint:
        raise ValueError(
            f"{recipe.reference_model} and {recipe.model} differ in tokenizer or chat template: log-probs of the one "
            "are none of the other"
        )
    return found


def reward_settings(recipe: Recipe, assets: epath.PathLike) -> RewardSettings | None:
    """The reward.json of the run, given the assets it starts from; None where a policy is trained."""
    if not isinstance(recipe.objective, RewardObjective):
        return None
    critique, asked = isinstance(recipe.objective, CritiqueReward), recipe.reward
    return settings_for_training(
        assets,
        asked.head,
        critique,
        asked.template,
        attributes=asked.attributes,
        quantiles=asked.quantiles,
        facts=asked.facts,
    )


def renderer_of(recipe: Recipe, start: LoadedModel) -> Renderer:
    """How groups are put before the model."""
    settings = reward_settings(recipe, start.assets)
    if settings is None:
        return load_renderer(str(start.assets), recipe.render)
    return renderer_with(settings, str(start.assets), recipe.render)


def start_run(run: RunDirectory, recipe: Recipe, start: LoadedModel, fingerprints: Mapping[str, str]) -> None:
    """Writes what names the run, or checks that a resumed run still starts from the same model, data and rendering.

    Returns on every process once it is all there.
    """
    if run.exists() and run.has_begun():
        began = json.loads(run.start.read_text())
        if changed := [name for name, value in fingerprints.items() if began.get(name) != value]:
            raise ValueError(
                f"{run.path} started from another {', '.join(changed)}; restore it or use another --output"
            )
        return
    wait_for_all("every process has seen that the run is new")
    if is_speaker():
        for stale in (run.recipe, run.environment, run.metrics, run.evaluation):  # of a start that came to nothing
            if stale.exists():
                stale.unlink()
        if run.model.exists():
            run.model.rmtree()  # another model's template or tokenizer must not stand beside this one's
        copy_assets(start.assets, run.model)
        if (reward := reward_settings(recipe, start.assets)) is not None:
            reward.write(run.model)
        settings = dataclasses.asdict(recipe.lora) if recipe.lora.rank else None
        # a LoRA run keeps no copy of what it adapts, so it has to know where that is
        began = {**fingerprints, "base": absolute(recipe.model), "lora": settings}
        write_text(run.start, json.dumps(began, indent=2) + "\n")
        write_text(run.recipe, recipes.as_json(recipe))  # last: a run exists once its recipe does
    wait_for_all("the run directory is written")


def first_state(recipe: Recipe, params: Any, steps: int, mesh: Mesh, vocab: int) -> tuple[TrainState, TrainState]:
    """The state a run starts from, and its shardings."""
    trainable, frozen = partition(params, trains(recipe))
    if not jax.tree.leaves(trainable):
        raise ValueError("optimizer.rates are 0 for all that could train: nothing would")
    optimizer = make_optimizer(recipe.optimizer, steps)
    shardings = state_shardings(optimizer, abstract_of(trainable), abstract_of(frozen), replicated(mesh))
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    begin = functools.partial(initial_averages, recipe.objective, vocab)
    averages = jax.jit(begin, out_shardings=shardings.averages)()
    return TrainState(_counter(0, shardings), trainable, frozen, moments, averages), shardings


def _counter(step: int, shardings: TrainState) -> jax.Array:
    return jax.jit(lambda: jnp.asarray(step, jnp.int32), out_shardings=shardings.step)()


def resume(
    run: RunDirectory,
    checkpoints: Checkpoints,
    state: TrainState,
    shardings: TrainState,
    position: Mapping[str, Any],
    *,
    whole: bool,
) -> TrainState:
    """The state of the latest checkpoint that is sound, else `state`; `whole` as it was saved. Later ones that are
    damaged are moved into RUN/damaged, and that is said.

    Raises ValueError when the data would go on in another order, or when there are checkpoints but none is sound.
    """
    damaged: dict[int, str] = {}
    agree_on_view(run.checkpoints, checkpoints.steps())
    for step in reversed(checkpoints.steps()):
        found = checkpoints.damage(step)
        if found is None:
            found, resumed = _restore(checkpoints, step, state, shardings, position, whole=whole)
            if resumed is not None:
                _set_aside(run, checkpoints, damaged, step)
                say(f"resuming after step {step}")
                return resumed
        damaged[step] = found or ""
    if damaged or run.damaged.exists():
        listed = "".join(f"\n  checkpoint {step}: {reason}" for step, reason in damaged.items())
        earlier = f"; earlier ones lie in {run.damaged}" if run.damaged.exists() else ""
        raise ValueError(
            f"{run.checkpoints}: no checkpoint can be read{earlier}. Nothing was changed: put back a copy of one, or "
            f"start again with another --output{listed}"
        )
    return state


def _set_aside(run: RunDirectory, checkpoints: Checkpoints, damaged: Mapping[int, str], sound: int) -> None:
    for step, reason in damaged.items():
        place = checkpoints.set_aside(step, run.damaged)
        say(f"checkpoint {step} is damaged ({reason}): moved to {place}; going back to checkpoint {sound}")
    agree_on_view(run.checkpoints, checkpoints.steps())


def _restore(
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    shardings: TrainState,
    position: Mapping[str, Any],
    *,
    whole: bool,
) -> tuple[str | None, TrainState | None]:
    """The state of a checkpoint, or why it cannot be read, which is then so on every process."""
    whole_files = checkpoints.has_manifest(step)  # asked while all processes still do the same
    reason = None
    try:
        saved = checkpoints.position(step)
        if not (changed := [name for name, value in position.items() if saved.get(name) != value]):
            moving = {name for name, _ in named_leaves(state.trainable)}
            held = combine(state.trainable, state.frozen) if whole else state.trainable
            params = checkpoints.params(step, abstract_of(held))
            moments = checkpoints.optimizer(step, abstract_of(state.optimizer))
            averages = checkpoints.averages(step, abstract_of(state.averages))
    except Exception as error:  # of files that are not whole orbax raises anything, even a plain Exception
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise  # the devices' affair
        reason = _innermost(error)
        if whole_files:
            what = f"{checkpoints.directory / str(step)} does not read, though its files are as they were written"
            raise ValueError(f"{what}: {reason}") from error
    if not _read_by_all(checkpoints.directory / str(step), reason):
        return reason, None
    if changed:
        raise ValueError(
            f"{checkpoints.directory}: checkpoint {step} was made with another {', '.join(changed)}; resume what it "
            "began with"
        )
    trainable, frozen = partition(params, moving.__contains__) if whole else (params, state.frozen)
    return None, TrainState(_counter(step, shardings), trainable, frozen, moments, averages)


def _read_by_all(checkpoint: epath.Path, reason: str | None) -> bool:
    """Whether every process read a checkpoint, or none did; `reason`: why this one did not.

    Raises ValueError where some did: of those, the others may still wait for this one inside of orbax.
    """
    said = outcomes(reason or "", *(() if reason is None else (OTHERS_READ,)))
    failed = {process: why for process, why in said.items() if why}
    if failed and len(failed) < jax.process_count():
        process, why = next(iter(failed.items()))
        raise ValueError(
            f"{checkpoint} reads on some processes and not on others (process {process}: {why}): look at its disk and "
            "network, then run the same command again"
        )
    return not failed


def _innermost(error: BaseException) -> str:
    """The first line of the error that all others came from."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return shorten(f"{type(error).__name__}: {error}".split("\n")[0], 240, placeholder=" ...")


def reference_source(recipe: Recipe, mesh: Mesh, other: LoadedModel | None = None) -> Callable[[TrainState], Any]:
    """What gives the reference model at a state; None where log-probs are stored or unused. `other`: the recipe's
    reference_model."""
    if not recipe.objective.needs_reference or recipe.reference == "stored":
        return lambda state: None
    if recipe.reference == "lora_off":
        # asked for at every step: a step's state is donated to the next
        return lambda state: sharing_tower(recipe, lora.strip(combine(state.trainable, state.frozen)))
    frozen = other or load_model(recipe.model, mesh, recipe.sharding, rates=INFERENCE)
    copy = sharing_tower(recipe, frozen.params)
    return lambda state: copy


def compute_of(recipe: Recipe, mesh: Mesh, *, platform: str | None = None) -> Compute:
    """How the recipe's forward runs on the mesh's devices, or on another `platform` it is only lowered for."""
    return Compute(
        dtype=recipe.compute.dtype,
        platform=platform or mesh.devices.flat[0].platform,
        attention=recipe.compute.attention,
        remat=recipe.compute.rung,
        vocab_chunk=recipe.compute.vocab_chunk,
        vocab_shards=mesh.shape["tensor"],
    )


def attention_of(compute: Compute, config: LlavaOnevisionConfig, bucket: Bucket) -> str:
    """The backend that serves a bucket's prompts. Raises ValueError when the one asked for cannot."""
    return choose_backend(compute.attention, compute.platform, bucket.prompt, config.decoder.head_dim, compute.dtype)

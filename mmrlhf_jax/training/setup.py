"""What stands between a recipe and its loop: the run directory, the first or restored state, the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.weights import copy_assets
from mmrlhf_jax.nn.attention import choose_backend
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import replicated
from mmrlhf_jax.training import recipe as recipes
from mmrlhf_jax.training.recipe import Recipe
from mmrlhf_jax.training.run import INFERENCE, Checkpoints, LoadedModel, RunDirectory, abstract_of, load_model
from mmrlhf_jax.training.state import (
    TrainState,
    combine,
    make_optimizer,
    partition,
    rate_of,
    state_shardings,
)


def check_resumable(run: RunDirectory, recipe: Recipe) -> None:
    """Raises UsageError when the recipe lacks something, ValueError when the directory holds something else, or a run
    whose recipe differs where it matters."""
    if missing := [name for name in ("model", "dataset") if not getattr(recipe, name)]:
        raise UsageError(f"the recipe names no {' and no '.join(missing)}: add --{' ... --'.join(missing)} ...")
    if run.exists():
        if changed := recipes.differences(json.loads(run.recipe.read_text()), recipe):
            raise ValueError(
                f"{run.path} holds a run of another recipe; use another --output, or undo:\n  " + "\n  ".join(changed)
            )
    elif run.path.exists() and not run.model.exists() and any(run.path.iterdir()):
        raise ValueError(f"{run.path} exists and is no run; use another --output")


def start_run(run: RunDirectory, recipe: Recipe, start: LoadedModel, fingerprints: Mapping[str, str]) -> None:
    """Writes what names the run, or checks that a resumed run still starts from the same model, data and rendering."""
    if run.exists():
        began = json.loads(run.start.read_text())
        if changed := [name for name, value in fingerprints.items() if began[name] != value]:
            raise ValueError(
                f"{run.path} started from another {', '.join(changed)}; restore it or use another --output"
            )
        return
    copy_assets(start.assets, run.model)
    run.start.write_text(json.dumps(dict(fingerprints), indent=2) + "\n")
    partial = run.recipe.with_suffix(".partial")
    recipes.save(recipe, partial)
    partial.replace(run.recipe)  # last: a run exists once its recipe does


def first_state(recipe: Recipe, start: LoadedModel, steps: int, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The state a run starts from, and its shardings."""
    trainable, frozen = partition(start.params, lambda name: rate_of(name, recipe.optimizer.rates) > 0)
    if not jax.tree.leaves(trainable):
        raise ValueError("optimizer.rates are all 0: nothing would train")
    optimizer = make_optimizer(recipe.optimizer, steps)
    shardings = state_shardings(optimizer, abstract_of(trainable), abstract_of(frozen), replicated(mesh))
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), trainable, frozen, moments), shardings


def resume(checkpoints: Checkpoints, state: TrainState, position: Mapping[str, Any]) -> TrainState:
    """The state of the latest checkpoint, else `state`. Raises ValueError when the data would go on in another
    order."""
    step = checkpoints.latest()
    if step is None:
        return state
    saved = checkpoints.position(step)
    if changed := [name for name, value in position.items() if saved[name] != value]:
        raise ValueError(f"checkpoint {step} was made with another {', '.join(changed)}; resume what it began with")
    params = checkpoints.params(step, abstract_of(combine(state.trainable, state.frozen)))
    trains = {name for name, _ in named_leaves(state.trainable)}
    trainable, frozen = partition(params, trains.__contains__)
    moments = checkpoints.optimizer(step, abstract_of(state.optimizer))
    print(f"resuming after step {step}")
    return TrainState(jax.device_put(jnp.asarray(step, jnp.int32), state.step.sharding), trainable, frozen, moments)


def online_reference(recipe: Recipe, mesh: Mesh) -> Any:
    """A frozen copy of the starting model; None when log-probs are stored or unused."""
    if recipe.reference != "online" or not recipe.objective.needs_reference:
        return None
    return load_model(recipe.model, mesh, recipe.sharding, rates=INFERENCE).params


def compute_of(recipe: Recipe, mesh: Mesh, *, platform: str | None = None) -> Compute:
    """How the recipe's forward runs on the mesh's devices, or on another `platform` it is only lowered for."""
    return Compute(
        dtype=recipe.compute.dtype,
        platform=platform or mesh.devices.flat[0].platform,
        attention=recipe.compute.attention,
        remat=recipe.compute.remat,
        vocab_chunk=recipe.compute.vocab_chunk,
        vocab_shards=mesh.shape["tensor"],
    )


def attention_of(compute: Compute, config: LlavaOnevisionConfig, bucket: Bucket) -> str:
    """The backend that serves a bucket's prompts. Raises ValueError when the one asked for cannot."""
    return choose_backend(compute.attention, compute.platform, bucket.prompt, config.decoder.head_dim)

"""The state of a run and the optimizer that moves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mmrlhf_jax.nn.lora import is_adapter
from mmrlhf_jax.nn.params import map_named
from mmrlhf_jax.training.recipe import INFERENCE, OptimizerConfig, PartRates, Recipe

Tree = TypeVar("Tree")


@struct.dataclass
class TrainState:
    """`trainable` and `frozen` are the model's tree, each with None where the other has a leaf."""

    step: jax.Array  # i32 [], optimizer steps done
    trainable: Any
    frozen: Any
    optimizer: optax.OptState
    averages: Any = struct.field(default_factory=dict)  # name -> array, what the objective keeps over steps


def rate_of(name: str, rates: PartRates) -> float:
    """The learning-rate multiplier of the parameter called `name`."""
    part = name.split(".")[0]
    return getattr(rates, "projector" if part == "newline" else part)


def trains(recipe: Recipe) -> Callable[[str], bool]:
    """Which parameters, by name, `recipe` moves: those with a rate; with LoRA only their adapters and a reward head."""
    rates, lora = recipe.optimizer.rates, recipe.lora.rank > 0
    return lambda name: rate_of(name, rates) > 0 and (not lora or trains_with_lora(name))


def trains_with_lora(name: str) -> bool:
    """Whether a LoRA run may move the parameter called `name`, and keeps it in its checkpoints: adapters, and a reward
    model's head, which starts from nothing."""
    return is_adapter(name) or name.startswith("head.")


def loading_rates(recipe: Recipe) -> PartRates:
    """The rates of the parts as `recipe` loads them: under adapters only a reward head trains itself."""
    rates = recipe.optimizer.rates
    return dataclasses.replace(INFERENCE, head=rates.head) if recipe.lora.rank else rates


def sharing_tower(recipe: Recipe, reference: Any) -> Any:
    """`reference` as the step takes it: a tower that never moves, as under adapters, is the policy's, and every picture
    is seen once for both. A reference that is another model keeps its own."""
    own = (recipe.optimizer.rates.tower and not recipe.lora.rank) or recipe.reference_model
    return reference if own else dataclasses.replace(reference, tower=None)


def with_dtypes(declared: Tree, rates: PartRates, frozen: Mapping[str, str] | str) -> Tree:
    """Declarations with what trains in fp32 (in bf16, steps of 1e-6 round away) and what is frozen in the dtype
    `frozen` gives, by parameter name or for all."""

    def kept_in(name: str) -> str:
        if rate_of(name, rates):
            return "float32"
        return frozen if isinstance(frozen, str) else frozen[name]

    return map_named(lambda name, p: dataclasses.replace(p, dtype=jnp.dtype(kept_in(name))), declared)


def partition(params: Tree, trains: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """(trainable, frozen): the same tree twice, leaves moved apart by name."""
    trainable = map_named(lambda name, leaf: leaf if trains(name) else None, params)
    frozen = map_named(lambda name, leaf: None if trains(name) else leaf, params)
    return trainable, frozen


def combine(trainable: Tree, frozen: Tree) -> Tree:
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Warm-up from 0 over `warmup` of the steps, then cosine or linear to 0 at the last, or constant."""
    warm = round(config.warmup * steps)
    rest = max(1, steps - warm)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest),
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, rest),
        "constant": lambda: optax.constant_schedule(config.learning_rate),
    }[config.schedule]()
    if not warm:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warm), after], [warm])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) with global-norm clipping and a rate multiplier for each part of the model; with a
    factored second moment Adafactor's (arXiv 1804.04235), decaying as 1 - step^-0.8, updates clipped at an RMS of 1 and
    averaged by the first moment."""

    def scaled(updates: Any, params: Any) -> Any:
        del params
        return map_named(lambda name, u: u * rate_of(name, config.rates), updates)

    def matrices(params: Any) -> Any:
        # a tower's positions are an embedding table and the newline a row of one, as transformers' Trainer decays them
        decays = ("kernel", "embedding", "position", "newline")
        return map_named(lambda name, _: name.endswith(decays) or is_adapter(name), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        *_moments(config),
        optax.add_decayed_weights(config.weight_decay, mask=matrices) if config.weight_decay else optax.identity(),
        optax.stateless(scaled),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _moments(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    first = jnp.dtype(config.first_moment)
    if config.second_moment == "float32":
        return [optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=first)]
    return [
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, accumulator_dtype=first),
    ]


def first_moment(moments: optax.OptState) -> Any:
    """The part of an optimizer's state that averages gradients or updates: a tree like the parameters."""
    return optax.tree_utils.tree_get(moments, "mu", optax.tree_utils.tree_get(moments, "ema", ()))


def state_shardings(optimizer: optax.GradientTransformation, trainable: Any, frozen: Any, whole: Any) -> TrainState:
    """The shardings of a TrainState: a moment of its parameter's shape lies where the parameter lies, factors and
    counters are everywhere. `trainable` and `frozen` are trees of ShapeDtypeStructs with shardings, `whole` the
    replicated sharding."""
    params = dict(jax.tree_util.tree_leaves_with_path(trainable))

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        # a moment's path ends in its parameter's
        like = next((params[path[start:]] for start in range(len(path)) if path[start:] in params), None)
        return like.sharding if like is not None and like.shape == leaf.shape else whole

    placed = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, trainable))
    here, there = (jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (trainable, frozen))
    return TrainState(whole, here, there, placed, whole)

"""A recipe's step as shapes: what each device holds of it, and its programs compiled for devices that are not here.

Nothing is allocated: parameters, gradients, moments and batches are ShapeDtypeStructs with shardings.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmrlhf_jax.batch import GroupBatch, Totals, pack
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.families import declare, is_reward, reward_config
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.nn import lora
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.remat import leaner
from mmrlhf_jax.nn.sharding import BATCH_AXES, AnyMesh, batch_sharding, replicated
from mmrlhf_jax.objectives import DDPO, RewardObjective
from mmrlhf_jax.training.recipe import INFERENCE, Recipe
from mmrlhf_jax.training.setup import compute_of
from mmrlhf_jax.training.state import (
    TrainState,
    combine,
    loading_rates,
    make_optimizer,
    partition,
    sharing_tower,
    state_shardings,
    trains,
    with_dtypes,
)
from mmrlhf_jax.training.step import Sums, initial_averages, make_accumulate, make_apply, metric_names


@dataclass(frozen=True)
class AbstractRun:
    """What a run keeps on its devices, as shapes with shardings; `reference` is None where it is stored or unread, and
    `lends_reference` says that it is arrays of the policy itself."""

    state: TrainState
    sums: Sums
    reference: Any
    lends_reference: bool


def config_of(recipe: Recipe, config: LlavaOnevisionConfig) -> LlavaOnevisionConfig:
    """The shape that `recipe` trains, starting from a model of shape `config`: a reward model's gains a head."""
    if isinstance(recipe.objective, RewardObjective) and not is_reward(config):
        return reward_config(config, recipe.reward.head, recipe.reward.attributes, recipe.reward.quantiles)
    return config


def abstract_batch(
    bucket: Bucket,
    responses: int,
    config: LlavaOnevisionConfig,
    mesh: AnyMesh,
    *,
    changed: bool = False,
    attributes: int = 0,
) -> GroupBatch:
    """The batch of a bucket as shapes with shardings; `changed`: with what responses do not share; `attributes`: with
    ratings in so many."""
    one = Bucket(1, bucket.tiles, bucket.prompt, bucket.response)
    filler = pack(
        [None],
        one,
        Totals(1, 1, 1, 1),
        responses=responses,
        tokens_per_tile=config.tokens_per_tile,
        tile_size=config.tower.image_size,
        changed=changed,
        attributes=attributes,
    )
    split, whole = batch_sharding(mesh), replicated(mesh)

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        if not x.ndim:
            return jax.ShapeDtypeStruct((), x.dtype, sharding=whole)
        return jax.ShapeDtypeStruct((bucket.groups, *x.shape[1:]), x.dtype, sharding=split)

    return jax.tree.map(abstract, filler)


def abstract_run(recipe: Recipe, config: LlavaOnevisionConfig, mesh: AnyMesh) -> AbstractRun:
    """The arrays of a run over `mesh`; what is frozen is taken to be stored in the recipe's compute dtype."""
    bare = declare(config)
    declared = with_dtypes(bare, loading_rates(recipe), recipe.compute.dtype)
    if recipe.lora.rank:
        declared = lora.declare_adapted(declared, recipe.lora.targets, recipe.lora.rank, recipe.lora.alpha)
    trainable, frozen = partition(nn_params.abstract(declared, mesh, recipe.sharding), trains(recipe))
    whole = replicated(mesh)
    optimizer = make_optimizer(recipe.optimizer, 1)
    moments = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, trainable),
        state_shardings(optimizer, trainable, frozen, whole).optimizer,
    )
    begin = functools.partial(initial_averages, recipe.objective, config.decoder.vocab)
    averages = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), jax.eval_shape(begin)
    )
    sums = Sums(
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), trainable),
        {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for name in metric_names(recipe.objective)},
        averages,
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = TrainState(step, trainable, frozen, moments, averages)
    lends = recipe.reference == "lora_off" and recipe.objective.needs_reference
    reference = None
    if lends:
        reference = sharing_tower(recipe, lora.strip(combine(trainable, frozen)))
    elif recipe.reference == "online" and recipe.objective.needs_reference:
        copy = nn_params.abstract(with_dtypes(bare, INFERENCE, recipe.compute.dtype), mesh, recipe.sharding)
        reference = sharing_tower(recipe, copy)
    return AbstractRun(state, sums, reference, lends)


def bytes_per_device(tree: Any) -> int:
    """What one device holds of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def trace_accumulate(
    recipe: Recipe,
    config: LlavaOnevisionConfig,
    bucket: Bucket,
    mesh: Mesh,
    *,
    responses: int = 4,
    platform: str | None = None,
) -> jax.stages.Traced:
    """`accumulate` of one bucket, traced for the mesh's devices, or for `platform`."""
    compute = compute_of(recipe, mesh, platform=platform)
    run = abstract_run(recipe, config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.sums)
    whole = replicated(mesh)
    step = make_accumulate(config, compute, recipe.objective, sums_sharding=Sums(shardings.gradients, whole, whole))
    key = jax.eval_shape(lambda: jax.random.key(0))
    changed, attributes = isinstance(recipe.objective, DDPO), len(recipe.reward.attributes)
    batch = abstract_batch(bucket, responses, config, mesh, changed=changed, attributes=attributes)
    with jax.set_mesh(mesh):
        state = run.state
        return step.trace(state.trainable, state.frozen, run.reference, run.sums, batch, key, state.averages)


def lower_accumulate(
    recipe: Recipe,
    config: LlavaOnevisionConfig,
    bucket: Bucket,
    mesh: Mesh,
    *,
    responses: int = 4,
    platform: str | None = None,
) -> Any:
    """`accumulate` of one bucket, traced and lowered (jax.stages.Lowered) for the mesh's devices, or for `platform`."""
    traced = trace_accumulate(recipe, config, bucket, mesh, responses=responses, platform=platform)
    with jax.set_mesh(mesh):
        return traced.lower(lowering_platforms=(platform,) if platform else None)


def lower_apply(recipe: Recipe, config: LlavaOnevisionConfig, mesh: Mesh) -> Any:
    """`apply`, traced and lowered (jax.stages.Lowered) for the mesh's devices."""
    run = abstract_run(recipe, config, mesh)
    optimizer = make_optimizer(recipe.optimizer, 1)
    shardings = state_shardings(optimizer, run.state.trainable, run.state.frozen, replicated(mesh))
    with jax.set_mesh(mesh):
        return make_apply(optimizer, state_sharding=shardings).trace(run.state, run.sums).lower()


def memory_advice(recipe: Recipe, step: int, bucket: Bucket, mesh: Mesh) -> str:
    """What to say when a device ran out of memory around a micro-batch of `bucket`: what ran, and what needs less."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    groups = bucket.groups // shards
    cures = []
    if (rung := leaner(recipe.compute.rung)) is not None:
        cures.append(f"--compute.remat {rung} keeps less of each layer")
    if groups > 1:
        cures.append(f"--data.slots-per-device {recipe.data.slots // 2} halves the {groups} groups a device holds")
    if not recipe.lora.rank:
        cures.append("--lora.rank 16 trains adapters instead of all parameters")
    if recipe.reference == "online":
        cures.append("--reference stored needs no second model")
    cures.append("a mesh with more devices under fsdp or tensor splits the parameters further")
    return (
        f"out of device memory at step {step}, bucket {bucket}, {groups} groups on each of {shards} parts of the "
        f"batch, remat {recipe.compute.rung!r}. What needs less, cheapest first:\n  " + "\n  ".join(cures)
    )

"""What a recipe's step will need, and what to change when it does not fit.

The gradient step is compiled ahead of time from shapes alone, for tests and for machines that are not here: nothing is
allocated, parameters, gradients and batches are ShapeDtypeStructs with shardings.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmrlhf_jax.batch import GroupBatch, Totals, pack
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.families import declare
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.lora import declare_adapted
from mmrlhf_jax.nn.remat import leaner
from mmrlhf_jax.nn.sharding import BATCH_AXES, batch_sharding, replicated
from mmrlhf_jax.training.recipe import Recipe
from mmrlhf_jax.training.setup import compute_of
from mmrlhf_jax.training.state import loading_rates, partition, trains, with_dtypes
from mmrlhf_jax.training.step import Sums, make_accumulate, metric_names


def abstract_batch(bucket: Bucket, responses: int, config: LlavaOnevisionConfig, mesh: Mesh) -> GroupBatch:
    """The batch of a bucket as shapes with shardings."""
    one = Bucket(1, bucket.tiles, bucket.prompt, bucket.response)
    filler = pack(
        [None],
        one,
        Totals(1, 1, 1, 1),
        responses=responses,
        tokens_per_tile=config.tokens_per_tile,
        tile_size=config.tower.image_size,
    )
    split, whole = batch_sharding(mesh), replicated(mesh)

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        if not x.ndim:
            return jax.ShapeDtypeStruct((), x.dtype, sharding=whole)
        return jax.ShapeDtypeStruct((bucket.groups, *x.shape[1:]), x.dtype, sharding=split)

    return jax.tree.map(abstract, filler)


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
    compute = compute_of(recipe, mesh, platform=platform)
    trainable, frozen = _abstract_params(recipe, config, mesh)
    sums_sharding = Sums(jax.tree.map(lambda p: p.sharding, trainable), replicated(mesh))
    sums = Sums(
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), trainable),
        {
            name: jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
            for name in metric_names(recipe.objective)
        },
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_accumulate(config, compute, recipe.objective, sums_sharding=sums_sharding)
    with jax.set_mesh(mesh):
        traced = step.trace(trainable, frozen, None, sums, abstract_batch(bucket, responses, config, mesh), key)
        return traced.lower(lowering_platforms=(platform,) if platform else None)


def memory_advice(recipe: Recipe, step: int, bucket: Bucket, mesh: Mesh) -> str:
    """What to say when a device ran out of memory around a micro-batch of `bucket`: what ran, and what needs less."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    groups = bucket.groups // shards
    cures = []
    if (rung := leaner(recipe.compute.remat)) is not None:
        cures.append(f"--compute.remat {rung} keeps less of each layer")
    if groups > 1:
        cures.append(
            f"--data.slots-per-device {recipe.data.slots_per_device // 2} halves the {groups} groups a device holds"
        )
    if not recipe.lora.rank:
        cures.append("--lora.rank 16 trains adapters instead of all parameters")
    if recipe.reference == "online":
        cures.append("--reference stored needs no second model")
    cures.append("a mesh with more devices under fsdp or tensor splits the parameters further")
    return (
        f"out of device memory at step {step}, bucket {bucket}, {groups} groups on each of {shards} parts of the "
        f"batch, remat {recipe.compute.remat!r}. What needs less, cheapest first:\n  " + "\n  ".join(cures)
    )


def _abstract_params(recipe: Recipe, config: LlavaOnevisionConfig, mesh: Mesh) -> tuple[Any, Any]:
    adapts = recipe.lora
    declared = with_dtypes(declare(config), loading_rates(recipe), recipe.compute.dtype)
    if adapts.rank:
        declared = declare_adapted(declared, adapts.targets, adapts.rank, adapts.alpha)
    return partition(nn_params.abstract(declared, mesh, recipe.sharding), trains(recipe))

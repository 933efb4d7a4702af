"""A plan: whether a recipe's step fits chips that are not here, how long it should take, and what would need less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.data.buckets import ItemLengths, plan_buckets
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.families import read_config
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.shapes import SHAPES
from mmrlhf_jax.nn.devices import ACCELERATORS
from mmrlhf_jax.nn.remat import leaner
from mmrlhf_jax.nn.sharding import AnyMesh, BatchShare, MeshConfig, shape_of_mesh
from mmrlhf_jax.planning.compiled import Compiled, TooLarge, compile_ahead, traced_flops
from mmrlhf_jax.planning.step_time import EFFICIENCY, Load, StepTime, micro_batches, step_time
from mmrlhf_jax.planning.topology import Target, candidates, over, tpu_mesh
from mmrlhf_jax.training.data import Measured, measure_data, plan_data
from mmrlhf_jax.training.fit import fit
from mmrlhf_jax.training.memory import Footprint, footprint
from mmrlhf_jax.training.model import LoadedModel, assets_of
from mmrlhf_jax.training.planning import (
    abstract_batch,
    abstract_run,
    bytes_per_device,
    config_of,
    lower_apply,
    trace_accumulate,
)
from mmrlhf_jax.training.recipe import LoraConfig, OptimizerConfig, Recipe
from mmrlhf_jax.training.setup import renderer_of

TYPICAL = Bucket(0, 5, 3072, 768)
"""A ranked picture of the MM-RLHF mix: 640 x 480 pixels are 5 tiles and 2,910 tokens, beside them some text; about 522
tokens of 3 to 5 responses, padded. 0 groups: as many as data.slots_per_device lets a device take."""


@dataclass(frozen=True)
class Choices:
    """What is planned beside the recipe."""

    shape: str = ""
    bucket: Bucket = TYPICAL
    responses: int = 4
    all_buckets: bool = False
    estimate: bool = False
    efficiency: float = EFFICIENCY


@dataclass(frozen=True)
class CompiledBucket:
    """XLA's answers for `accumulate` of one bucket, and the FLOPs of a micro-batch counted in the traced program."""

    bucket: Bucket
    accumulate: Compiled | TooLarge
    flops: float


@dataclass(frozen=True)
class Change:
    """Flags that need less, and what a device would then hold by the estimate."""

    flags: str
    total: float


@dataclass(frozen=True)
class Holder:
    """Chips that hold the recipe, and what each would by the estimate."""

    target: Target
    total: float


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    config: LlavaOnevisionConfig
    target: Target
    mesh: dict[str, int]
    loads: tuple[Load, ...]
    responses: int
    footprints: tuple[Footprint, ...]
    """of each load, estimated"""
    time: StepTime
    efficiency: float
    compiled: tuple[CompiledBucket, ...]
    apply: Compiled | TooLarge | None
    beside: dict[str, float]
    """bytes on a device that are no arguments of a program while it runs, by program"""
    changes: tuple[Change, ...]
    smallest: tuple[Holder, ...]

    @property
    def largest(self) -> int:
        """The load whose bucket needs most."""
        return max(range(len(self.loads)), key=lambda i: self.footprints[i].total)

    @property
    def needs(self) -> float:
        """Bytes a device needs: by the compiler where it was asked, else by the estimate."""
        found = [self.need_of(one.accumulate, "accumulate") for one in self.compiled]
        if self.apply is not None:
            found.append(self.need_of(self.apply, "apply"))
        return max(found) if found else self.footprints[self.largest].total

    def need_of(self, answer: Compiled | TooLarge, program: str) -> float:
        """Bytes a device holds while a program runs, its own and what lies beside them."""
        if not answer.needs:  # a compiler that did not say
            return self.footprints[self.largest].total
        return answer.needs + self.beside[program]

    @property
    def fits(self) -> bool:
        refused = [one.accumulate for one in self.compiled if isinstance(one.accumulate, TooLarge)]
        return not refused and not isinstance(self.apply, TooLarge) and self.needs <= self.target.chip.memory


def make_plan(recipe: Recipe, target: Target, choices: Choices, progress: Callable[[str], None]) -> Plan:
    """Plans `recipe` on `target`; `progress` hears what takes long before it begins.

    Raises UsageError where the recipe and `choices` do not say what to plan, ValueError where mesh, model and bucket do
    not fit each other, CommandError where a compiler is missing.
    """
    if recipe.data.pairing == "pairs":
        raise UsageError("data.pairing pairs, which is for comparisons, is not planned for; plan for groups")
    mesh: AnyMesh = shape_of_mesh(over(recipe.mesh, target.slices), target.total, target.slices)
    config = config_of(recipe, model_shape(recipe, choices))
    asked, measured = recipe, _measured(recipe, config)

    def shapes(fitted: Recipe) -> tuple[list[Bucket], int]:
        loads, responses = loads_of(fitted, config, choices, mesh, measured)
        return [load.bucket for load in loads], responses

    memory = target.chip.memory
    recipe = fit(recipe, config, mesh, shapes, platform=target.platform, memory=memory).recipe
    loads, responses = loads_of(recipe, config, choices, mesh, measured)
    footprints = tuple(
        footprint(recipe, config, load.bucket, mesh, responses=responses, platform=target.platform) for load in loads
    )
    time = step_time(
        recipe, config, loads, mesh, target.chip,
        responses=responses, slices=target.slices, efficiency=choices.efficiency,
    )  # fmt: skip
    largest = max(range(len(loads)), key=lambda i: footprints[i].total)
    bucket = loads[largest].bucket
    compiled: tuple[CompiledBucket, ...] = ()
    apply = None
    if target.platform == "tpu" and not choices.estimate:
        here = tpu_mesh(target, recipe.mesh)
        chosen = [load.bucket for load in loads] if choices.all_buckets else [bucket]
        compiled = tuple(_compile(recipe, config, one, here, responses, progress) for one in chosen)
        progress(f"compiling apply for {target}")
        apply = compile_ahead(lower_apply(recipe, config, here))
    plan = Plan(
        recipe, config, target, dict(mesh.shape), loads, responses, footprints, time, choices.efficiency, compiled,
        apply, _beside(recipe, config, bucket, mesh, responses), (),
        tuple(_smallest(asked, config, bucket, mesh, responses)),
    )  # fmt: skip
    return plan if plan.fits else dataclasses.replace(plan, changes=tuple(_changes(plan, bucket)))


def _beside(
    recipe: Recipe, config: LlavaOnevisionConfig, bucket: Bucket, mesh: AnyMesh, responses: int
) -> dict[str, float]:
    """`accumulate` is given neither moments nor the next batch, `apply` neither batches nor a reference; a reference
    that is the policy's own arrays counts once."""
    run = abstract_run(recipe, config, mesh)
    batch, reference = (
        bytes_per_device(abstract_batch(bucket, responses, config, mesh)),
        bytes_per_device(run.reference),
    )
    lent = reference if run.lends_reference else 0
    return {
        "accumulate": bytes_per_device(run.state.optimizer) + batch - lent,
        "apply": 2 * batch + reference - lent,
    }


def model_shape(recipe: Recipe, choices: Choices) -> LlavaOnevisionConfig:
    """The shape of the recipe's model, of which no weights are read, or one of the built-in ones."""
    if choices.shape:
        if recipe.model or recipe.dataset:
            raise UsageError("--shape stands for a model that is not here: leave --model and --dataset out")
        return SHAPES[choices.shape]
    if not recipe.model:
        raise UsageError(f"the recipe names no model: add --model MODEL, or --shape {'|'.join(SHAPES)}")
    return read_config(assets_of(recipe.model))


def _measured(recipe: Recipe, config: LlavaOnevisionConfig) -> Measured | None:
    """The recipe's dataset, if it names one."""
    if not recipe.dataset:
        return None
    start = LoadedModel(config, None, assets_of(recipe.model))
    return measure_data(recipe, open_dataset(recipe.dataset), renderer_of(recipe, start))


def loads_of(
    recipe: Recipe, config: LlavaOnevisionConfig, choices: Choices, mesh: AnyMesh, measured: Measured | None
) -> tuple[tuple[Load, ...], int]:
    """The micro-batches of a step, by bucket, and K: those of the recipe's dataset, or of one bucket alone."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if measured is None:
        if choices.all_buckets:
            raise UsageError("--all-buckets are those of a dataset: add --dataset DATASET and --model MODEL")
        bucket = with_groups(recipe, config, choices.bucket, shards)
        return (micro_batches(recipe.data.groups_per_step, bucket),), choices.responses
    data = plan_data(recipe, measured, config, BatchShare(tuple(range(shards)), shards))
    of = np.array([micro.bucket for micro in data.plan.micro_batches])
    filled = [sum(item >= 0 for item in micro.items) for micro in data.plan.micro_batches]
    loads = []
    for index, bucket in enumerate(data.buckets.buckets):
        here = int((of == index).sum())
        if here:
            held = sum(n for n, b in zip(filled, of, strict=True) if b == index)
            loads.append(Load(bucket, here / data.plan.steps, held / (here * bucket.groups)))
    return tuple(loads), data.items.responses


def with_groups(recipe: Recipe, config: LlavaOnevisionConfig, bucket: Bucket, shards: int) -> Bucket:
    """`bucket`; where it says 0 groups, with as many as a run would put into a micro-batch."""
    if bucket.groups:
        return bucket
    one = ItemLengths(*(np.array([n]) for n in (bucket.tiles, bucket.prompt, bucket.response)))
    return plan_buckets(
        one,
        max_buckets=1,
        multiple=1,
        slots_per_shard=recipe.data.slots,
        shards=shards,
        groups_per_step=recipe.data.groups_per_step,
        tile_cost=config.tile_cost,
    ).buckets[0]


def _compile(
    recipe: Recipe,
    config: LlavaOnevisionConfig,
    bucket: Bucket,
    mesh: Mesh,
    responses: int,
    progress: Callable[[str], None],
) -> CompiledBucket:
    progress(f"compiling accumulate for {mesh.size} devices, bucket {bucket}; a large model takes minutes")
    traced = trace_accumulate(recipe, config, bucket, mesh, responses=responses)
    with jax.set_mesh(mesh):
        lowered = traced.lower()
    return CompiledBucket(bucket, compile_ahead(lowered), traced_flops(traced.jaxpr.jaxpr))


def _changes(plan: Plan, bucket: Bucket) -> Iterator[Change]:
    """What needs less, one at a time and then together, cheapest first."""
    recipe, target, shards = plan.recipe, plan.target, plan.mesh["data"] * plan.mesh["fsdp"]
    mesh = shape_of_mesh(over(recipe.mesh, target.slices), target.total, target.slices)

    def held(recipe: Recipe, bucket: Bucket) -> float:
        return footprint(recipe, plan.config, bucket, mesh, responses=plan.responses, platform=target.platform).total

    together = recipe
    flags: list[str] = []
    for name, changed in _leaner_recipes(recipe):
        yield Change(name, held(changed, bucket))
        if changed.lora == recipe.lora:
            together, flags = _merge(together, recipe, changed), [*flags, name]
    if (groups := bucket.groups // shards) > 1:
        slots = -(-int(plan.config.tile_cost * bucket.tiles + bucket.prompt + bucket.response + 1) // 128) * 128
        name = f"--data.slots-per-device {slots} (1 group a device, not {groups})"
        bucket = dataclasses.replace(bucket, groups=shards)
        yield Change(name, held(recipe, bucket))
        flags.append(name)
    if len(flags) > 1:
        name = "all of these" if recipe.lora.rank else "all of these but adapters"
        yield Change(name, held(together, bucket))


def _leaner_recipes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    rung = leaner(recipe.compute.rung)
    while rung is not None:
        yield (
            f"--compute.remat {rung}",
            dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, remat=rung)),
        )
        rung = leaner(rung)
    optimizer = recipe.optimizer
    if optimizer.first_moment == "float32":
        halved = dataclasses.replace(optimizer, first_moment="bfloat16")
        yield "--optimizer.first-moment bfloat16", dataclasses.replace(recipe, optimizer=halved)
    adam = OptimizerConfig()  # other b2 and eps a factored moment has no use for
    plain = (optimizer.b2, optimizer.eps) == (adam.b2, adam.eps)
    if optimizer.second_moment == "float32" and plain and not recipe.lora.rank:
        factored = dataclasses.replace(optimizer, second_moment="factored")
        yield "--optimizer.second-moment factored", dataclasses.replace(recipe, optimizer=factored)
    if recipe.reference == "online":
        yield "--reference stored", dataclasses.replace(recipe, reference="stored")
    if not recipe.lora.rank:
        yield "--lora.rank 16", dataclasses.replace(recipe, lora=LoraConfig(rank=16))


def _merge(together: Any, before: Any, changed: Any) -> Any:
    """`together` with every field of `changed` that differs from `before`, of recipes and of their parts."""
    differing = {}
    for name in (field.name for field in dataclasses.fields(before)):
        here, was, now = (getattr(one, name) for one in (together, before, changed))
        if now != was:
            differing[name] = _merge(here, was, now) if dataclasses.is_dataclass(was) else now
    return dataclasses.replace(together, **differing)


def _smallest(
    recipe: Recipe, config: LlavaOnevisionConfig, bucket: Bucket, mesh: AnyMesh, responses: int
) -> Iterator[Holder]:
    """Of each kind of chip the fewest that hold the recipe by the estimate, one copy of the parameters over all of
    them, each with one group where the recipe leaves that open, else with the groups it has now."""
    each = bucket.groups // (mesh.shape["data"] * mesh.shape["fsdp"]) if recipe.data.slots_per_device else 1
    spread = MeshConfig(data=1, fsdp=-1, tensor=mesh.shape["tensor"])
    for chip in ACCELERATORS.values():
        for target in candidates(chip):
            try:
                there = shape_of_mesh(spread, target.total)
                groups = each * there.shape["fsdp"]
                total = footprint(
                    recipe, config, dataclasses.replace(bucket, groups=groups), there,
                    responses=responses, platform=target.platform,
                ).total  # fmt: skip
            except ValueError:
                continue  # a mesh that does not divide the model, or chips that it does not
            if total <= chip.memory:
                yield Holder(target, total)
                break

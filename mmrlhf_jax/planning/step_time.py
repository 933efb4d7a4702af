"""How long an optimizer step should take on chips that are not here: the slowest of four streams, each at the speed its
maker states.

    compute   matrix products at a share of the peak, padding and recomputation included
    memory    weights, gradients and moments through the chip's own memory; activations are left out
    links     fsdp gathers and scatters, the sums over `tensor`, gradients summed over `data` inside a slice
    network   whatever of these crosses slices or nodes

A prediction, not a measurement: streams are taken to overlap completely, links to be used all at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.cost import Flops, GroupShape, group_flops
from mmrlhf_jax.nn.devices import Accelerator
from mmrlhf_jax.nn.sharding import AnyMesh
from mmrlhf_jax.objectives import ScoreObjective
from mmrlhf_jax.training.memory import Local, gathered_bytes, local_part
from mmrlhf_jax.training.planning import AbstractRun, abstract_run, bytes_per_device
from mmrlhf_jax.training.recipe import Recipe
from mmrlhf_jax.training.state import combine, rate_of

EFFICIENCY = 0.5  # of a chip's peak that matrix products are taken to reach
GPUS_PER_NODE = 8  # beyond them it is the network


@dataclass(frozen=True)
class StepTime:
    """`useful` and `done` FLOPs of a step on all chips: what the loss needs, and with padding and recomputation;
    seconds of each stream."""

    useful: Flops
    done: Flops
    seconds: dict[str, float]
    chips: int
    peak: float

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def total(self) -> float:
        return self.seconds[self.bound]

    @property
    def mfu(self) -> float:
        """Useful FLOPs over what the chips could have done in that time (as arXiv 2204.02311, appendix B)."""
        return self.useful.total / (self.total * self.chips * self.peak)


@dataclass(frozen=True)
class Load:
    """Micro-batches of one bucket a step takes, on average, and how many of its places hold groups."""

    bucket: Bucket
    micro_batches: float
    filled: float = 1.0


def step_flops(recipe: Recipe, config: LlavaOnevisionConfig, bucket: Bucket, responses: int, *, useful: bool) -> Flops:
    """Of one group with the slots of `bucket` full; `useful` leaves recomputation out."""
    rates, again = recipe.optimizer.rates, recipe.compute.rung in ("full", "attention")
    return group_flops(
        config,
        GroupShape(
            bucket.tiles,
            bucket.prompt,
            split_evenly(bucket.response, responses),
            scored=0 if isinstance(recipe.objective, ScoreObjective) else None,  # which asks for no token's probability
        ),
        decoder=rate_of("decoder", rates) > 0 and not recipe.lora.rank,
        tower=rate_of("tower", rates) > 0 and not recipe.lora.rank,
        recompute=again and not useful,
        reference=recipe.objective.needs_reference and recipe.reference != "stored",
    )


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """`total` tokens over `parts` responses."""
    return tuple(total // parts + (i < total % parts) for i in range(parts))


def step_time(
    recipe: Recipe,
    config: LlavaOnevisionConfig,
    loads: Sequence[Load],
    mesh: AnyMesh,
    chip: Accelerator,
    *,
    responses: int,
    slices: int = 1,
    efficiency: float = EFFICIENCY,
) -> StepTime:
    """Raises ValueError where a mesh spans nodes and no network of such chips is known."""
    run = abstract_run(recipe, config, mesh)
    useful, done = Flops(), Flops()
    moved = {"memory": _apply_traffic(run), "links": 0.0, "network": 0.0}
    inner, outer = _wires(mesh, chip, slices)
    for load in loads:
        groups = load.bucket.groups * load.micro_batches
        useful += step_flops(recipe, config, load.bucket, responses, useful=True) * (groups * load.filled)
        done += step_flops(recipe, config, load.bucket, responses, useful=False) * groups
        local = local_part(recipe, load.bucket, mesh)
        moved["memory"] += load.micro_batches * _weight_traffic(recipe, run, local, mesh)
        moved[inner] += load.micro_batches * _layer_traffic(recipe, config, run, local, mesh)
        moved[outer] += load.micro_batches * _replica_traffic(run, mesh)
    speeds = {"memory": chip.bandwidth, "links": chip.link, "network": chip.network}
    seconds = {"compute": done.total / (mesh.size * chip.bf16_flops * efficiency)}
    for name, amount in moved.items():
        speed = speeds[name]
        if amount and speed is None:
            raise ValueError(f"{chip.name} between nodes: no such machine is sold, so its network is not known")
        seconds[name] = amount / speed if amount and speed else 0.0
    return StepTime(useful, done, seconds, mesh.size, chip.bf16_flops)


def _wires(mesh: AnyMesh, chip: Accelerator, slices: int) -> tuple[str, str]:
    """Which wires carry what layers exchange, and what replicas do."""
    within = mesh.shape["fsdp"] * mesh.shape["tensor"]
    one_node = chip.is_tpu or mesh.size // slices <= GPUS_PER_NODE
    inner = "links" if chip.is_tpu or within <= GPUS_PER_NODE else "network"
    return inner, "links" if slices == 1 and one_node else "network"


def _passes(recipe: Recipe) -> int:
    """How often the policy's weights are gathered: forward, and once for recomputation and gradients together."""
    reference = recipe.objective.needs_reference and recipe.reference != "stored"
    return 2 + reference


def _gathered(recipe: Recipe, run: AbstractRun, local: Local) -> float:
    """Bytes of weights all passes of a micro-batch multiply with, whole but for `tensor`."""
    policy: Any = combine(run.state.trainable, run.state.frozen)
    tower = gathered_bytes(policy.tower, local.value)
    rest = gathered_bytes(policy, local.value) - tower
    trains = rate_of("tower", recipe.optimizer.rates) > 0
    return _passes(recipe) * rest + (2 if trains else 1) * tower


def _weight_traffic(recipe: Recipe, run: AbstractRun, local: Local, mesh: AnyMesh) -> float:
    """Shards read, whole weights written and read; gradients written, and added to their sums."""
    held = bytes_per_device((run.state.trainable, run.state.frozen))
    return _passes(recipe) * held + 2 * _gathered(recipe, run, local) + 4 * bytes_per_device(run.sums)


def _apply_traffic(run: AbstractRun) -> float:
    """The optimizer reads parameters, gradients and moments and writes all but the gradients."""
    kept = bytes_per_device((run.state.trainable, run.state.optimizer))
    return 2 * kept + 2 * bytes_per_device(run.sums)  # gradients twice: for their norm, then for the update


def _layer_traffic(
    recipe: Recipe, config: LlavaOnevisionConfig, run: AbstractRun, local: Local, mesh: AnyMesh
) -> float:
    """Bytes a chip receives in a micro-batch: weights gathered and gradients scattered over `fsdp`, and activations
    summed over `tensor` twice a layer, forward, recomputed and backward."""
    shards, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    weights = _gathered(recipe, run, local) + gathered_bytes(run.state.trainable, local.value)
    again = recipe.compute.rung in ("full", "attention")
    sums = config.decoder.layers * 2 * (3 if again else 2) * 2 * (tensor - 1) / tensor
    activations = local.groups * local.tokens * config.decoder.embed * local.value
    return weights * (shards - 1) / shards + sums * activations


def _replica_traffic(run: AbstractRun, mesh: AnyMesh) -> float:
    """Gradients summed over `data`, fp32, once a micro-batch."""
    copies = mesh.shape["data"]
    return 2 * (copies - 1) / copies * bytes_per_device(run.sums.gradients)


def micro_batches(groups_per_step: int, bucket: Bucket) -> Load:
    """A step whose groups are all of one bucket's shape."""
    count = math.ceil(groups_per_step / bucket.groups)
    return Load(bucket, count, groups_per_step / (count * bucket.groups))

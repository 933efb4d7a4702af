"""What a recipe leaves to the devices: how much a layer keeps for its backward pass, and how many groups one forwards
at once. Chosen by the estimate of training/memory.py, from the memory a device has.

Recomputing a layer costs up to a third of a step, smaller micro-batches only more traffic of weights: so little is
recomputed first, and the micro-batches shrink before more is. The choice depends on the kind of device alone and not
on what happens to be free, so that a resumed run makes it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import jax

from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.nn.devices import GIB, accelerator
from mmrlhf_jax.nn.remat import RematRung
from mmrlhf_jax.nn.sharding import AnyMesh
from mmrlhf_jax.training.memory import footprint
from mmrlhf_jax.training.recipe import Recipe

SLOTS = (16384, 8192, 4096)
"""tokens a device forwards at once: beyond the first, products get no faster; below the last, fsdp waits for weights"""
ROOM = 0.95
"""share of a device's memory that programs may be planned to fill: their code, fragments and the runtime take some"""


@dataclass(frozen=True)
class Fitted:
    """`recipe` with nothing left open; bytes its fullest micro-batch needs and a device has (None: not known)."""

    recipe: Recipe
    needs: float | None
    has: float | None

    def __str__(self) -> str:
        chosen = f"remat {self.recipe.compute.rung}, {self.recipe.data.slots} slots a device"
        if self.needs is None or self.has is None:
            return f"{chosen}: how much memory a device has is not known"
        text = f"{chosen}: {self.needs / GIB:.2f} of {self.has / GIB:.2f} GiB by the estimate"
        if self.needs > ROOM * self.has:
            text += "; it may run out, launch/plan.py names what needs less"
        return text


def device_memory() -> float | None:
    """Bytes a program can have on one device of this kind, less where jax was told to take less; None on CPUs, whose
    memory is not ours to fill, and where nobody says."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    listed, said = accelerator(device.device_kind), device.memory_stats() or {}
    known = [] if listed is None else [listed.memory]
    if "bytes_limit" in said:
        known.append(float(said["bytes_limit"]))
    return min(known, default=None)


def fit(
    recipe: Recipe,
    config: LlavaOnevisionConfig,
    mesh: AnyMesh,
    buckets_of: Callable[[Recipe], tuple[Sequence[Bucket], int]],
    *,
    platform: str,
    memory: float | None,
) -> Fitted:
    """Fills in `compute.remat` "auto" and `data.slots_per_device` 0; what the recipe says itself is left alone.

    `buckets_of` gives the buckets of the data, and K, for a recipe whose slots are set; `memory` is bytes of a device.
    Where nothing fits, the leanest is taken: an estimate is no reason not to try.
    """
    if memory is None:
        return Fitted(_with(recipe, recipe.compute.rung, recipe.data.slots), None, None)
    planned: dict[int, tuple[Sequence[Bucket], int]] = {}
    chosen, needs = None, 0.0
    for chosen in _candidates(recipe):
        slots = chosen.data.slots_per_device
        if slots not in planned:
            planned[slots] = buckets_of(chosen)
        buckets, responses = planned[slots]
        needs = max(
            footprint(chosen, config, bucket, mesh, responses=responses, platform=platform).total for bucket in buckets
        )
        if needs <= ROOM * memory:
            break
    assert chosen is not None
    return Fitted(chosen, needs, memory)


def _candidates(recipe: Recipe) -> Iterator[Recipe]:
    """From what is fastest to what needs least."""
    for rung in reversed(get_args(RematRung)):
        for slots in SLOTS:
            yield _with(recipe, rung, slots)
    yield _with(recipe, "full", 1)  # one group a device


def _with(recipe: Recipe, rung: RematRung, slots: int) -> Recipe:
    compute, data = recipe.compute, recipe.data
    if compute.remat == "auto":
        compute = dataclasses.replace(compute, remat=rung)
    if not data.slots_per_device:
        data = dataclasses.replace(data, slots_per_device=slots)
    return dataclasses.replace(recipe, compute=compute, data=data)

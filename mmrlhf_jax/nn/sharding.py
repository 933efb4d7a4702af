"""The device mesh and the one table that maps logical axes to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is split over both; parameters over fsdp and tensor only


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: whatever is left."""

    data: int = 1
    """replicas of the parameters; the batch is split over them"""
    fsdp: int = -1
    """devices that share one copy of the parameters and split the batch"""
    tensor: int = 1
    """devices that split heads, mlp and vocabulary of every layer"""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh ("data", "fsdp", "tensor") over all devices. Raises ValueError when the sizes do not multiply to them."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh sizes must be positive, at most one of them -1: {dataclasses.asdict(config)}")
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh {dataclasses.asdict(config)} does not multiply to the {len(devices)} devices present")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


@dataclass(frozen=True)
class ShardingRules:
    """Mesh axes each logical axis is split over; None keeps it whole on every device."""

    batch: str | tuple[str, ...] | None = BATCH_AXES
    layers: str | None = None
    embed: str | None = "fsdp"
    vocab: str | None = "tensor"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    mlp: str | None = "tensor"
    tower_embed: str | None = "fsdp"
    tower_heads: str | None = "tensor"
    tower_mlp: str | None = "tensor"

    def spec(self, axes: Sequence[str | None]) -> P:
        """The PartitionSpec of an array with these logical axes. Raises ValueError when two share a mesh axis."""
        mapped = [getattr(self, axis) if axis else None for axis in axes]
        used = [name for over in mapped if over for name in ((over,) if isinstance(over, str) else over)]
        if len(used) != len(set(used)):
            raise ValueError(f"sharding rules put two of the axes {tuple(axes)} on one mesh axis: {mapped}")
        return P(*mapped)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over every device that splits the batch, the rest whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Pins an activation's layout at a block's edge, in mesh axes; without a mesh (a unit test, one device) it is x."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))

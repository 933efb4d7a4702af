"""The device mesh and the one table that maps logical axes to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")
AnyMesh = Mesh | AbstractMesh  # of devices, or of their number alone
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
    slices: int = 0
    """islands of devices joined by a slower network; only `data` spans them. 0: what the devices say (TPU slices)"""


def mesh_sizes(config: MeshConfig, devices: int, slices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) over that many devices in that many slices.

    Raises ValueError when the sizes do not multiply to the devices, or `data` does not divide over the slices.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh sizes must be positive, at most one of them -1: {dataclasses.asdict(config)}")
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ValueError(f"mesh {dataclasses.asdict(config)} does not multiply to the {devices} devices present")
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data {sizes[0]} does not divide over {slices} slices, whose network is too slow for fsdp and "
            f"tensor: set --mesh.data {slices} (or a multiple)"
        )
    return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh ("data", "fsdp", "tensor") over all devices of all processes, replicas of `data` dealt to the slices.

    Raises ValueError when the sizes do not multiply to the devices, or `data` does not divide over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    mesh_sizes(config, len(devices), 1)  # that they multiply is said before that they divide
    slices = _slices(devices, config.slices)
    data, *rest = mesh_sizes(config, len(devices), len(slices))
    within = (data // len(slices), *rest)
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    # the topology-aware order is jax's, slice by slice
    islands = [jax.make_mesh(within, MESH_AXES, axis_types=kinds, devices=each).devices for each in slices]
    return Mesh(np.concatenate(islands), MESH_AXES, axis_types=kinds)


def shape_of_mesh(config: MeshConfig, devices: int, slices: int = 1) -> AbstractMesh:
    """The mesh of devices that are not here: shardings over it say what each would hold. Raises as `make_mesh`."""
    return AbstractMesh(mesh_sizes(config, devices, slices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slices(devices: list[jax.Device], asked: int) -> list[list[jax.Device]]:
    """Devices by slice: what the hardware says, or, on devices that say nothing, `asked` equal parts in order."""
    named = sorted({getattr(device, "slice_index", 0) for device in devices})
    if asked < 0 or (len(named) > 1 and asked not in (0, len(named))):
        raise ValueError(f"mesh.slices is {asked}; the devices belong to {len(named)}")
    if len(named) > 1:
        return [[d for d in devices if getattr(d, "slice_index", 0) == name] for name in named]
    if len(devices) % max(asked, 1):
        raise ValueError(f"{len(devices)} devices do not divide into mesh.slices {asked}")
    size = len(devices) // max(asked, 1)
    return [devices[start : start + size] for start in range(0, len(devices), size)]


@dataclass(frozen=True)
class BatchShare:
    """Which of the `of` equal parts of a batch's leading axis this process feeds, ascending. Processes that split a
    layer between them (`tensor`) feed the same part."""

    parts: tuple[int, ...]
    of: int

    def rows(self, count: int) -> list[int]:
        """Indices of this process among `count` groups, in order."""
        each = count // self.of
        return [row for part in self.parts for row in range(part * each, (part + 1) * each)]


def batch_share(mesh: Mesh) -> BatchShare:
    """The share of the calling process."""
    of = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    indices = batch_sharding(mesh).addressable_devices_indices_map((of,)).values()
    return BatchShare(tuple(sorted({index[0].indices(of)[0] for index in indices if index})), of)


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


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Leading axis over every device that splits the batch, the rest whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Pins an activation's layout at a block's edge, in mesh axes; without a mesh (a unit test, one device) it is x."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))

"""Moving parameters between layouts: training splits them over the devices, decoding wants them whole.

A training step gathers each layer once for thousands of tokens; decoding would gather all of them again for every
token. ReaLHF (arXiv 2406.14088) therefore moves parameters between the layouts of its phases. On one mesh a layout is
a tree of shardings, and moving is `jax.device_put`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
from jax.sharding import NamedSharding, Sharding

from mmrlhf_jax.nn.sharding import AnyMesh, ShardingRules

Tree = TypeVar("Tree")
Layout = Literal["split", "whole"]
"""split: as they train, over `fsdp` and `tensor`; whole: every device keeps all that its share of `tensor` needs."""


def rules_of(layout: Layout, rules: ShardingRules) -> ShardingRules:
    """`rules` of training, as they are or with nothing split over the axes that a batch is split over."""
    return rules if layout == "split" else dataclasses.replace(rules, embed=None, tower_embed=None)


@dataclass(frozen=True)
class Moved:
    """What a move took. `received` bytes of each device, by its id: of its new share what it did not hold before."""

    received: dict[int, int]
    seconds: float
    before: str
    after: str

    @property
    def bytes(self) -> int:
        """Over all devices."""
        return sum(self.received.values())

    def __str__(self) -> str:
        if not self.bytes:
            return f"parameters are {self.after}: no device had to be sent any"
        most = max(self.received.values())
        return (
            f"parameters moved from {self.before} to {self.after}: {self.bytes / 2**20:.1f} MiB over "
            f"{len(self.received)} devices, at most {most / 2**20:.1f} MiB to one, in {self.seconds:.2f} s"
        )


def reshard(tree: Tree, shardings: Tree) -> tuple[Tree, Moved]:
    """The arrays of `tree` in `shardings`, a tree of the same structure, and what moving them took.

    Arrays move one after the other, and each is deleted where it was, so that there is never more than one in both
    layouts. `tree` must not be used afterwards.
    """
    received, before = received_bytes(tree, shardings), describe(jax.tree.map(lambda x: x.sharding, tree))
    began = time.perf_counter()
    moved = jax.tree.map(_move, tree, shardings)
    jax.block_until_ready(moved)
    return moved, Moved(received, time.perf_counter() - began, before, describe(shardings))


def _move(x: jax.Array, sharding: Sharding) -> jax.Array:
    if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    moved = jax.block_until_ready(jax.device_put(x, sharding, may_alias=False))
    x.delete()  # jax cannot donate between layouts
    return moved


def received_bytes(tree: Any, shardings: Any) -> dict[int, int]:
    """Bytes that each device, by its id, has to be sent for `tree` to lie in `shardings`: the size of its new blocks
    less their intersection with what it holds. `tree` may be ShapeDtypeStructs with shardings."""
    total: dict[int, int] = {}
    leaves, targets = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    for x, target in zip(leaves, targets, strict=True):
        held, wanted = (s.devices_indices_map(x.shape) for s in (x.sharding, target))
        for device, index in wanted.items():
            kept = _common(index, held[device], x.shape) if device in held else 0
            missing = _common(index, index, x.shape) - kept
            total[device.id] = total.get(device.id, 0) + missing * x.dtype.itemsize
    return total


def _common(one: tuple[slice, ...], other: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """Elements in both of two blocks of an array of this shape."""
    spans = ((a.indices(size), b.indices(size)) for a, b, size in zip(one, other, shape, strict=True))
    return math.prod(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in spans)


def describe(shardings: Any) -> str:
    """A layout in words: the mesh axes of more than one device that any parameter is split over."""
    axes: dict[str, int] = {}
    for sharding in jax.tree.leaves(shardings):
        if isinstance(sharding, NamedSharding):
            axes |= {axis: size for axis, size in _split_over(sharding, sharding.mesh).items() if size > 1}
    return "split over " + " and ".join(f"{axis} {size}" for axis, size in sorted(axes.items())) if axes else "whole"


def _split_over(sharding: NamedSharding, mesh: AnyMesh) -> dict[str, int]:
    named = (name for over in sharding.spec if over for name in ((over,) if isinstance(over, str) else over))
    return {name: mesh.shape[name] for name in named}

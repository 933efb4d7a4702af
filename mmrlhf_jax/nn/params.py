"""Parameters are declared once, as a tree of `Param`; abstract arrays, shardings and initial values all derive from
it."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmrlhf_jax.nn.sharding import AnyMesh, ShardingRules

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Param:
    """One parameter: its shape, the logical name of each axis, how it starts and the dtype it is kept in.

    `normal` draws from N(0, 1/fan_in), `uniform` from [-1/sqrt(fan_in), 1/sqrt(fan_in)]; `fan_in` is the product of the
    axes that a matrix product contracts, which in a kernel stand first.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "uniform", "zeros", "ones"] = "normal"
    fan_in: int = 0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def is_param(leaf: Any) -> bool:
    return isinstance(leaf, Param)


def map_params(function: Callable[[Param], Any], declared: Tree) -> Tree:
    return jax.tree.map(function, declared, is_leaf=is_param)


def stack(declared: Tree, layers: int) -> Tree:
    """The declaration of `layers` equal layers, stacked along a leading axis for `lax.scan`."""
    return map_params(lambda p: dataclasses.replace(p, shape=(layers, *p.shape), axes=("layers", *p.axes)), declared)


def path_name(path: tuple[Any, ...]) -> str:
    """`decoder.layers.q_kernel` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param)]


def map_named(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), tree, is_leaf=is_param)


def shardings(declared: Tree, mesh: AnyMesh, rules: ShardingRules) -> Tree:
    """NamedShardings of every parameter. Raises ValueError where a dimension does not divide over its mesh axes."""
    problems: list[str] = []

    def one(name: str, param: Param) -> NamedSharding:
        spec = rules.spec(param.axes)
        for size, axis, over in zip(param.shape, param.axes, spec, strict=False):
            parts = math.prod(mesh.shape[a] for a in ((over,) if isinstance(over, str) else over or ()))
            if size % parts:
                problems.append(f"{name}: axis {axis!r} of size {size} does not divide over {over!r} = {parts}")
        return NamedSharding(mesh, spec)

    result = map_named(one, declared)
    if problems:
        raise ValueError(
            "the mesh does not fit the model; choose another mesh or sharding rule:\n" + "\n".join(problems)
        )
    return result


def abstract(declared: Tree, mesh: AnyMesh, rules: ShardingRules) -> Tree:
    """ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
        declared,
        shardings(declared, mesh, rules),
        is_leaf=is_param,
    )


def initialise(declared: Tree, seed: int, mesh: Mesh, rules: ShardingRules) -> Tree:
    """Initial values, born in their shards. Each layer's draw depends on `seed`, its name and its index only.

    Drawn by numpy: nothing to compile, and the same numbers on every mesh and jax release.
    """

    def one(name: str, param: Param, sharding: NamedSharding) -> jax.Array:
        stacked = param.axes[0] == "layers"

        def part(index: Any) -> np.ndarray:  # a slice for each axis
            if not stacked:
                return draw(name, param, seed)[index]
            layers = range(*index[0].indices(param.shape[0]))
            return np.stack([draw(name, param, seed, layer)[index[1:]] for layer in layers])

        return jax.make_array_from_callback(param.shape, sharding, part)

    placed = dict(named_leaves(shardings(declared, mesh, rules)))
    return map_named(lambda name, param: one(name, param, placed[name]), declared)


def draw(name: str, param: Param, seed: int, layer: int | None = None) -> np.ndarray:
    """The initial values of a parameter, or of one layer of a stacked one, in the dtype it is kept in."""
    shape = param.shape if layer is None else param.shape[1:]
    if param.init in ("zeros", "ones"):
        return np.full(shape, param.init == "ones", param.dtype)
    rng = np.random.default_rng((seed, zlib.crc32(name.encode()), layer or 0))
    scale = 1.0 / math.sqrt(param.fan_in or param.shape[-1])
    drawn = rng.standard_normal(shape, np.float32) if param.init == "normal" else rng.uniform(-1, 1, shape)
    drawn *= scale  # in place: a large model's table is gigabytes
    return drawn.astype(param.dtype, copy=False)


def count(declared: Any) -> int:
    return sum(math.prod(leaf.shape) for _, leaf in named_leaves(declared))


def fingerprint(params: Any) -> str:
    """128 bits naming the values of a parameter tree: 32 hex digits.

    Integer sums of the fp32 bit patterns of the values, times odd, position-dependent multipliers: any one changed
    value changes it, while sharding, file layout and a dtype that holds the same values do not. It guards against
    mix-ups, not against an adversary.
    """
    names, leaves = zip(*named_leaves(params), strict=True)
    placed = getattr(leaves[0], "sharding", None)
    whole = NamedSharding(placed.mesh, P()) if isinstance(placed, NamedSharding) else None  # readable by every process
    sums = np.asarray(jax.device_get(jax.jit(_checksums, out_shardings=whole)(list(leaves))), np.uint32)
    digest = np.zeros(4, np.uint64)
    for name, row in sorted(zip(names, sums, strict=True), key=lambda pair: pair[0]):
        for i, value in enumerate(row):
            mixed = zlib.crc32(f"{name}:{i}:{int(value)}:{int(digest[i])}".encode())
            digest[i] = np.uint64(mixed)
    return "".join(f"{int(x):08x}" for x in digest)


def _checksums(leaves: list[jax.Array]) -> jax.Array:
    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        # positions are mixed axis by axis: a flat iota of a sharded array would gather it onto one device
        position = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            position = position * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        sums = []
        for salt in (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1):
            weight = (position * jnp.uint32(salt)) ^ ((position * jnp.uint32(salt)) >> 15)
            sums.append(jnp.sum(bits * (weight | 1), dtype=jnp.uint32))
        return jnp.stack(sums)

    return jnp.stack([one(leaf) for leaf in leaves])

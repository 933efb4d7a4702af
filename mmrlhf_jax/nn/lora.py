"""Low-rank adaptation (LoRA, arXiv 2106.09685) of kernels: x W + scale (x A) B, with W frozen.

An adapted kernel is a node of the parameter tree where the bare kernel was, so that everything that walks the tree
(sharding, checkpoints, optimizer) needs to know nothing about it; models multiply by a kernel through `project`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mmrlhf_jax.nn.params import Param, initialise, map_named, named_leaves
from mmrlhf_jax.nn.sharding import ShardingRules

Tree = TypeVar("Tree")


@struct.dataclass
class Adapted:
    """A kernel `base` [*in, *out] and its update: `a` [*in, r], `b` [r, *out]; a leading layers axis where stacked."""

    base: Any
    a: Any
    b: Any
    scale: float = struct.field(pytree_node=False)


def project(pattern: str, x: jax.Array, kernel: Any) -> jax.Array:
    """`jnp.einsum(pattern, x, kernel)` for a kernel with or without an adapter. "z" is not free in `pattern`."""
    if not isinstance(kernel, Adapted):
        return jnp.einsum(pattern, x, kernel)
    operands, out = pattern.split("->")
    ours, theirs = operands.split(",")
    summed, kept = "".join(c for c in theirs if c not in out), "".join(c for c in theirs if c in out)
    rows = "".join(c for c in ours if c not in summed)
    low = jnp.einsum(f"{ours},{summed}z->{rows}z", x, kernel.a)
    return jnp.einsum(pattern, x, kernel.base) + kernel.scale * jnp.einsum(f"{rows}z,z{kept}->{out}", low, kernel.b)


ADAPTABLE = ("decoder.layers.", "projector.")  # parts whose products `project` computes


def adapter_params(declared: Any, targets: Sequence[str], rank: int) -> dict[str, tuple[Param, Param]]:
    """The declarations (a, b) of every kernel whose name matches one of the glob patterns `targets`.

    a starts uniform in +-1/sqrt(inputs) and b at zero, as PEFT's do: an adapted model starts as the bare one. Raises
    ValueError for a pattern that matches no kernel, and for a parameter that is none (norms, biases, tables).
    """
    leaves = dict(named_leaves(declared))
    out: dict[str, tuple[Param, Param]] = {}
    for pattern in targets:
        if not (found := fnmatch.filter(leaves, pattern)):
            kernels = ", ".join(name for name, param in leaves.items() if name.startswith(ADAPTABLE) and _inputs(param))
            raise ValueError(f"lora target {pattern!r} matches no parameter; kernels are {kernels}")
        for name in found:
            param = leaves[name]
            if not (count := _inputs(param)):
                raise ValueError(f"lora target {pattern!r} matches {name}, which is no kernel of a matrix product")
            if not name.startswith(ADAPTABLE):
                raise ValueError(f"lora target {pattern!r} matches {name}: adapters are for {' and '.join(ADAPTABLE)}")
            start = _first(param)
            stacked, stacked_axes = param.shape[:start], param.axes[:start]
            cut = start + count
            a = Param((*param.shape[:cut], rank), (*param.axes[:cut], None), "uniform", fan_in=param.fan_in)
            b = Param((*stacked, rank, *param.shape[cut:]), (*stacked_axes, None, *param.axes[cut:]), "zeros")
            out[name] = (a, b)
    return out


def _first(param: Param) -> int:
    return 1 if param.axes[0] == "layers" else 0


def _inputs(param: Param) -> int:
    """How many axes, behind the layers, a matrix product contracts: those that make up `fan_in`. 0: no kernel."""
    dims = param.shape[_first(param) :]
    return next((n for n in range(1, len(dims)) if math.prod(dims[:n]) == param.fan_in), 0)


def declare_adapted(declared: Tree, targets: Sequence[str], rank: int, alpha: float) -> Tree:
    """`declared` with every matching kernel adapted; the bases keep their declarations."""
    adapters = adapter_params(declared, targets, rank)
    return map_named(
        lambda name, param: Adapted(param, *adapters[name], alpha / rank) if name in adapters else param, declared
    )


def adapt(
    params: Tree,
    declared: Tree,
    mesh: Mesh,
    rules: ShardingRules,
    *,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    seed: int,
) -> Tree:
    """`params` with fresh adapters on every matching kernel, born in their shards, fp32."""
    adapters = adapter_params(declared, targets, rank)
    fresh = initialise(adapters, seed, mesh, rules)
    return map_named(lambda name, leaf: Adapted(leaf, *fresh[name], alpha / rank) if name in fresh else leaf, params)


def is_adapter(name: str) -> bool:
    """Whether the parameter called `name` is the a or b of an adapted kernel."""
    return name.endswith((".a", ".b"))


def strip(params: Tree) -> Tree:
    """The model without its adapters: LoRA off."""
    return _map_adapted(lambda kernel: kernel.base, params)


def merge(params: Tree) -> Tree:
    """The model with every update added to its kernel, in fp32: the base's dtype would round most of it away."""
    return _map_adapted(_merged, params)


def _merged(kernel: Adapted) -> jax.Array:
    return jax.jit(_sum, out_shardings=kernel.base.sharding)(kernel)  # compiled once for kernels of one shape


def _sum(kernel: Adapted) -> jax.Array:
    base = kernel.base.astype(jnp.float32)
    stacked = kernel.a.ndim + kernel.b.ndim - 2 > base.ndim  # both carry the layers axis
    return base + kernel.scale * (jax.vmap(_outer) if stacked else _outer)(kernel.a, kernel.b)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision="highest")


def _map_adapted(function: Any, params: Tree) -> Tree:
    def one(node: Any) -> Any:
        return function(node) if isinstance(node, Adapted) else node

    return jax.tree.map(one, params, is_leaf=lambda node: isinstance(node, Adapted))

"""Reading and writing safetensors through ONE table a model: each entry names our parameter, theirs, and how the axes
map.

A stacked parameter [L, ...] is L of their tensors; its entry's name holds `{layer}`. The axis map is an einops pattern
from theirs to ours; exporting applies it backwards.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmrlhf_jax.models.safetensors_files import DTYPES, Outgoing, SafetensorsDirectory
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.params import Param
from mmrlhf_jax.nn.sharding import ShardingRules

Tree = TypeVar("Tree")
HELD_BYTES = 64 * 2**20  # parameters up to this size are gathered in host memory: faster than a program each


@dataclass(frozen=True)
class Key:
    """`ours` is a path such as decoder.layers.query_kernel; `pattern` e.g. "(n h) d -> d n h", empty = as it is."""

    ours: str
    theirs: str
    pattern: str = ""

    def name(self, layer: int | None) -> str:
        return self.theirs if layer is None else self.theirs.format(layer=layer)

    def import_array(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their array as ours, `shape` being that of one layer of ours."""
        return rearrange(array, self.pattern, **self._sizes(shape)) if self.pattern else array

    def export_array(self, array: np.ndarray) -> np.ndarray:
        if not self.pattern:
            return array
        theirs, ours = self.pattern.split("->")
        return np.ascontiguousarray(rearrange(array, f"{ours} -> {theirs}"))

    def rows(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
        """The rows of their tensor that ours[index] needs, `shape` being that of one layer of ours."""
        outer = [0]
        if self.pattern:
            theirs, ours = (side.strip() for side in self.pattern.split("->"))
            names = theirs[1 : theirs.index(")")].split() if theirs.startswith("(") else theirs.split()[:1]
            outer = [ours.split().index(name) for name in names]
        low = high = 0
        for axis in outer:  # first and last corner of a box, row-major
            start, stop, _ = index[axis].indices(shape[axis])
            low, high = low * shape[axis] + start, high * shape[axis] + stop - 1
        return slice(low, high + 1)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not self.pattern:
            return shape
        sizes, theirs = self._sizes(shape), self.pattern.split("->")[0]
        groups = re.findall(r"\([^)]*\)|\S+", theirs)
        return tuple(math.prod(sizes[name] for name in group.strip("()").split()) for group in groups)

    def _sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(self.pattern.split("->")[1].split(), shape, strict=True))


def prefixed(keys: Iterable[Key], ours: str, theirs: str) -> list[Key]:
    return [dataclasses.replace(key, ours=ours + key.ours, theirs=theirs + key.theirs) for key in keys]


@dataclass(frozen=True)
class Expected:
    """One of their tensors, as our declaration expects it."""

    key: Key
    param: Param
    layer: int | None

    @property
    def name(self) -> str:
        return self.key.name(self.layer)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.param.shape if self.layer is None else self.param.shape[1:]


def expected_tensors(declared: Any, keys: Sequence[Key]) -> list[Expected]:
    """Every tensor a checkpoint must hold. Raises KeyError when table and declaration disagree (a bug, not bad
    data)."""
    leaves = dict(nn_params.named_leaves(declared))
    if stray := set(leaves) ^ {key.ours for key in keys if key.ours in leaves}:
        raise KeyError(f"parameters without an entry in the key table: {sorted(stray)}")
    out = []
    for key in keys:
        if key.ours not in leaves:
            continue  # an optional parameter this configuration lacks, such as an untied unembedding
        param = leaves[key.ours]
        layers = range(param.shape[0]) if "{layer}" in key.theirs else [None]
        out += [Expected(key, param, layer) for layer in layers]
    return out


def check(source: SafetensorsDirectory, expected: Sequence[Expected], ignored: Callable[[str], bool]) -> None:
    """Raises ValueError that lists every missing, surplus and misshapen tensor together."""
    wanted = {item.name: item for item in expected}
    problems = [f"missing: {name}" for name in wanted if name not in source.where]
    problems += [f"surplus: {name}" for name in source.where if name not in wanted and not ignored(name)]
    for name, item in wanted.items():
        if name in source.where:
            have, want = source.shape(name), item.key.their_shape(item.layer_shape)
            if have != want:
                problems.append(f"misshapen: {name} is {have}, config.json makes it {want}")
    if problems:
        shown = problems[:40] + ([f"... and {len(problems) - 40} more"] if len(problems) > 40 else [])
        raise ValueError(f"{source.directory}: the checkpoint does not match the model:\n  " + "\n  ".join(shown))


def stored_dtypes(source: SafetensorsDirectory, declared: Any, keys: Sequence[Key]) -> dict[str, str]:
    """The dtype each of our parameters is stored in; a stack of layers takes that of its first."""
    first = {item.key.ours: item.name for item in reversed(expected_tensors(declared, keys))}
    return {ours: source.dtype(name) for ours, name in first.items() if name in source.where}


def load(
    source: SafetensorsDirectory,
    declared: Tree,
    keys: Sequence[Key],
    mesh: Mesh,
    rules: ShardingRules,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Tree:
    """The parameters in their shards, in the dtypes of the declaration.

    Each of their tensors is read once, only the rows whose parts this process holds, and its parts are on their devices
    before the next is read. So besides what the devices hold, the host holds one tensor and its parts at most, or a
    whole parameter no larger than HELD_BYTES. Every process runs the same programs in the same order; none of them
    communicates.
    """
    expected = expected_tensors(declared, keys)
    check(source, expected, ignored)
    by_path: dict[str, list[Expected]] = {}
    for item in expected:
        by_path.setdefault(item.key.ours, []).append(item)

    def one(name: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        items, stacked = by_path[name], by_path[name][0].layer is not None
        size = math.prod(abstract.shape) * np.dtype(abstract.dtype).itemsize
        split_layers = stacked and abstract.sharding.spec[:1] not in ((), (None,))  # not by any rule of ours
        if size <= HELD_BYTES or split_layers:
            return _load_at_once(source, items, abstract)
        if not stacked:
            return _cast(_place(source, items[0], abstract.sharding, abstract.dtype), abstract.dtype)
        return _load_by_layer(source, items, abstract)

    return nn_params.map_named(one, nn_params.abstract(declared, mesh, rules))


def _load_at_once(source: SafetensorsDirectory, items: Sequence[Expected], abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter gathered in host memory, every distinct shard once: no program to compile, one transfer a device."""
    indices = abstract.sharding.addressable_devices_indices_map(abstract.shape).values()
    local = abstract.sharding.shard_shape(abstract.shape)
    shards = {_bounds(index): (index, np.empty(local, abstract.dtype)) for index in indices}
    for item in items:
        array = item.key.import_array(source.read(item.name), item.layer_shape)
        for index, values in shards.values():
            if item.layer is None:
                values[...] = array[index]
            elif item.layer in (layers := range(*index[0].indices(abstract.shape[0]))):
                values[item.layer - layers.start] = array[index[1:]]
    return jax.make_array_from_callback(abstract.shape, abstract.sharding, lambda index: shards[_bounds(index)][1])


def _load_by_layer(
    source: SafetensorsDirectory, items: Sequence[Expected], abstract: jax.ShapeDtypeStruct
) -> jax.Array:
    """A stack of layers, each written into its place on the devices before the next is read."""
    sharding = abstract.sharding
    layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jax.jit(partial(jnp.zeros, abstract.shape, abstract.dtype), out_shardings=sharding)()
    write = jax.jit(_write_layer, donate_argnums=0, out_shardings=sharding)
    for item in items:
        layer = _place(source, item, layer_sharding, abstract.dtype)
        stack = write(stack, layer, item.layer).block_until_ready()  # else the host runs ahead, tensors in hand
    return stack


def _write_layer(stack: jax.Array, layer: jax.Array, at: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), at, 0)


@partial(jax.jit, static_argnums=1)
def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype)


def _place(source: SafetensorsDirectory, item: Expected, sharding: NamedSharding, dtype: Any) -> jax.Array:
    """One of their tensors on the devices, as ours but for the dtype: the narrower of stored and wanted travels."""
    shape = item.layer_shape
    devices: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(_bounds(index), []).append((device, index))
    needed = [item.key.rows(held[0][1], shape) for held in devices.values()]
    rows = slice(min(part.start for part in needed), max(part.stop for part in needed))
    array = item.key.import_array(source.read(item.name, rows), shape)
    travels = array.dtype if array.dtype.itemsize < np.dtype(dtype).itemsize else np.dtype(dtype)
    parts = []
    for held in devices.values():
        part = np.ascontiguousarray(array[held[0][1]].astype(travels, copy=False))
        parts += [jax.device_put(part, device) for device, _ in held]
    return jax.make_array_from_single_device_arrays(shape, sharding, jax.block_until_ready(parts))


def _bounds(index: Any) -> tuple:
    return tuple((part.start, part.stop) for part in index)  # slices are not hashable before Python 3.12


def export_tensors(params: Any, keys: Sequence[Key], dtype: str) -> list[Outgoing]:
    """Their tensors, fetched from the devices one by one as they are written. Fetching raises ValueError for one that
    overflows `dtype` (fp16 ends at 65,504)."""
    leaves = dict(nn_params.named_leaves(params))
    out = []
    for key in keys:
        if key.ours not in leaves:
            continue
        leaf = leaves[key.ours]
        for layer in range(leaf.shape[0]) if "{layer}" in key.theirs else [None]:
            shape = key.their_shape(leaf.shape if layer is None else leaf.shape[1:])
            out.append(Outgoing(key.name(layer), shape, dtype, partial(_fetch, leaf, key, layer, dtype)))
    return out


def _fetch(leaf: Any, key: Key, layer: int | None, dtype: str) -> np.ndarray:
    array = np.asarray(jax.device_get(leaf if layer is None else leaf[layer]))
    if (most := max(float(array.max()), -float(array.min()))) > float(ml_dtypes.finfo(DTYPES[dtype]).max):
        raise ValueError(f"{key.name(layer)}: values up to {most:g} overflow {dtype}; export another dtype")
    return key.export_array(array.astype(DTYPES[dtype], copy=False))

"""Reading and writing safetensors through ONE table a model: each entry names our parameter, theirs, and how the axes
map.

A stacked parameter [L, ...] is L of their tensors; its entry's name holds `{layer}`. The axis map is an einops pattern
from theirs to ours; exporting applies it backwards.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.params import Param
from mmrlhf_jax.nn.sharding import ShardingRules

Tree = TypeVar("Tree")
SHARD_BYTES = 5 * 10**9
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


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

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not self.pattern:
            return shape
        return self.export_array(np.broadcast_to(np.zeros((), np.int8), shape)).shape

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


class SafetensorsDirectory:
    """The tensors of a directory of .safetensors files, by canonical name. Pickle files are refused."""

    def __init__(self, directory: str | Path, canonical: Callable[[str], str]):
        self.directory = Path(directory)
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            pickled = sorted(p.name for p in self.directory.glob("*.bin")) if self.directory.is_dir() else []
            hint = f" ({', '.join(pickled)}: pickle runs code and is refused; convert it)" if pickled else ""
            raise FileNotFoundError(f"{directory}: no .safetensors file there{hint}")
        self.handles = {path: safe_open(path, framework="np") for path in files}
        self.where: dict[str, tuple[Path, str]] = {}
        for path, handle in self.handles.items():
            for raw in handle.keys():  # noqa: SIM118 - not a dict
                name = canonical(raw)
                if name in self.where:
                    raise ValueError(f"{path.name}: {raw} also stands in {self.where[name][0].name} as {name}")
                self.where[name] = (path, raw)

    def shape(self, name: str) -> tuple[int, ...]:
        path, raw = self.where[name]
        return tuple(self.handles[path].get_slice(raw).get_shape())

    def dtype(self, name: str) -> str:
        """numpy's name of a tensor's dtype. Raises ValueError for one that weights are not kept in."""
        path, raw = self.where[name]
        stored = self.handles[path].get_slice(raw).get_dtype()
        if stored not in _STORED:
            raise ValueError(f"{path.name}: {raw} is stored as {stored}; supported: {', '.join(_STORED)}")
        return _STORED[stored]

    def read(self, name: str) -> np.ndarray:
        path, raw = self.where[name]
        return self.handles[path].get_tensor(raw)


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
    """The parameters, read straight into their shards, in the dtypes of the declaration: each tensor is read once and
    its parts go to the devices that hold them."""
    expected = expected_tensors(declared, keys)
    check(source, expected, ignored)
    by_path: dict[str, list[Expected]] = {}
    for item in expected:
        by_path.setdefault(item.key.ours, []).append(item)

    def one(name: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        shards = _read_shards(source, by_path[name], abstract)
        return jax.make_array_from_callback(abstract.shape, abstract.sharding, lambda index: shards[_bounds(index)][1])

    return nn_params.map_named(one, nn_params.abstract(declared, mesh, rules))


def _read_shards(
    source: SafetensorsDirectory, items: Sequence[Expected], abstract: jax.ShapeDtypeStruct
) -> dict[tuple, tuple[Any, np.ndarray]]:
    """Every distinct shard this process holds of one parameter, by its bounds: (index, values)."""
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
    return shards


def _bounds(index: Any) -> tuple:
    return tuple((part.start, part.stop) for part in index)  # slices are not hashable before Python 3.12


def export_tensors(params: Any, keys: Sequence[Key], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors one by one, fetched from the devices a layer at a time. Raises ValueError for one that overflows
    `dtype` (fp16 ends at 65,504)."""
    leaves = dict(nn_params.named_leaves(params))
    for key in keys:
        if key.ours not in leaves:
            continue
        leaf = leaves[key.ours]
        for layer in range(leaf.shape[0]) if "{layer}" in key.theirs else [None]:
            array = np.asarray(jax.device_get(leaf if layer is None else leaf[layer]))
            if (most := float(np.abs(array).max())) > float(ml_dtypes.finfo(DTYPES[dtype]).max):
                raise ValueError(f"{key.name(layer)}: values up to {most:g} overflow {dtype}; export another dtype")
            yield key.name(layer), np.ascontiguousarray(key.export_array(array).astype(DTYPES[dtype]))


def write_safetensors(tensors: Iterable[tuple[str, np.ndarray]], directory: str | Path) -> None:
    """model.safetensors, or numbered shards with model.safetensors.index.json beyond SHARD_BYTES, as transformers
    writes."""
    directory = Path(directory)
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, directory / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, array in tensors:
        if held and size + array.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (directory / "shard-0.safetensors").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{i}.safetensors").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

"""Directories of .safetensors files, local or remote, a tensor (or some of its rows) at a time. No jax.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little-endian; the header, a
JSON object of {name: {dtype, shape, data_offsets}}; then the tensors' bytes end to end. It is read here and not by the
safetensors package because a file may lie in a bucket, where only ranges of bytes are fetched, and because a header
that lies must be a message, never a crash.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from etils import epath

from mmrlhf_jax.models.files import check_file, parse_json, read_json, shown

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
_HEADER_BYTES = 16 * 2**20  # 100,000 tensors; the format's own limit, 100 MB, can be 2 GB of Python objects
_TENSORS = 300_000  # of a directory
_NAME, _AXES, _SIZE = 1024, 8, 2**48  # longest name, most axes and largest number of an entry
_FILE = re.compile(r"[^/\\\x00-\x1f]{1,200}\.safetensors")
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes [start, stop) of a file."""

    path: epath.Path
    raw: str  # its name in the file
    stored: str  # its dtype there
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> str:
        """numpy's name of the dtype. Raises ValueError for one that weights are not kept in."""
        if self.stored not in _STORED:
            raise ValueError(f"{self.path}: {self.raw} is stored as {self.stored}; supported: {', '.join(_STORED)}")
        return _STORED[self.stored]


class SafetensorsDirectory:
    """The tensors of a directory, by canonical name; a context that closes its files.

    With model.safetensors.index.json exactly the files it names are read; without, every .safetensors file. Raises
    FileNotFoundError without any (pickles are refused), and when the index names a file that is not there; ValueError
    for a file the index does not name, for a tensor not in the file the index says, for one that stands twice and for a
    header that cannot be true.
    """

    def __init__(self, directory: epath.PathLike, canonical: Callable[[str], str]):
        self.directory = epath.Path(directory)
        self.where: dict[str, Stored] = {}
        self._open: dict[epath.Path, IO[Any]] = {}
        files, promised = _files(self.directory)
        for file in files:
            for stored in _read_header(file):
                name = canonical(stored.raw)
                if name in self.where:
                    raise ValueError(f"{file}: {stored.raw} also stands in {self.where[name].path.name} as {name}")
                self.where[name] = stored
            if len(self.where) > _TENSORS:
                raise ValueError(f"{file}: with it the directory names more than {_TENSORS:,} tensors")
        lies = {(stored.raw, stored.path.name) for stored in self.where.values()}
        if wrong := [f"{_cut(raw)} in {file}" for raw, file in promised.items() if (raw, file) not in lies]:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"{self.directory / INDEX} promises what is not there: {', '.join(wrong[:5])}{more}")

    def __enter__(self) -> SafetensorsDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.where[name].shape

    def dtype(self, name: str) -> str:
        return self.where[name].dtype

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor in its stored dtype. With `rows`, a range of its first axis, only those are fetched and only they
        mean anything: the others take address space but no memory."""
        stored = self.where[name]
        array = np.empty(stored.shape, DTYPES[stored.dtype])
        data = array.reshape(-1).view(np.uint8)
        begin, end, _ = (rows or slice(None)).indices(stored.shape[0]) if stored.shape else (0, 1, 1)
        row = len(data) // stored.shape[0] if stored.shape and stored.shape[0] else len(data)
        if stored.path not in self._open:
            self._open[stored.path] = stored.path.open("rb")
        file, at, stop = self._open[stored.path], begin * row, min(end * row, len(data))
        file.seek(stored.start + at)
        while at < stop:
            block = file.read(min(_BLOCK_BYTES, stop - at))
            if not block:
                raise ValueError(f"{stored.path}: the file now ends inside {stored.raw}; did it change?")
            data[at : at + len(block)] = np.frombuffer(block, np.uint8)
            at += len(block)
        return array


def _files(directory: epath.Path) -> tuple[list[epath.Path], dict[str, str]]:
    """The files of a checkpoint, and what its index promises: {name: file}."""
    present = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    weights = [name for name in present if name.endswith(".safetensors")]
    if INDEX not in present:
        if not weights:
            pickled = [name for name in present if name.endswith((".bin", ".pt", ".pth"))]
            hint = f" ({', '.join(pickled)}: pickle runs code and is refused; convert it)" if pickled else ""
            raise FileNotFoundError(f"{directory}: no .safetensors file there{hint}")
        return [directory / name for name in weights], {}
    promised = _weight_map(directory / INDEX)
    named = sorted(set(promised.values()))
    if missing := [name for name in named if name not in present]:
        raise FileNotFoundError(f"{directory / INDEX} names files that are not there: {_cut(', '.join(missing))}")
    if stray := [name for name in weights if name not in named]:
        raise ValueError(
            f"{directory}: {_cut(', '.join(stray))} stands beside {INDEX}, which does not name it; "
            "whether it belongs to the checkpoint is not known: remove the file or the index"
        )
    return [directory / name for name in named], promised


def _weight_map(path: epath.Path) -> dict[str, str]:
    document = read_json(path, _HEADER_BYTES)
    found = document.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: no weight_map of tensor names to files")
    for file in found.values():
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise ValueError(f"{path}: {shown(file)} is not the name of a .safetensors file beside it")
    return found


def _read_header(path: epath.Path) -> list[Stored]:
    """Raises ValueError unless the header's tensors fill the file's data exactly, end to end."""
    size = check_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_BYTES):
            raise ValueError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        document = parse_json(path, file.read(length))
    document.pop("__metadata__", None)
    tensors = [_stored(path, raw, entry, 8 + length) for raw, entry in document.items()]
    at = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != at:
            raise ValueError(f"{path}: the header's tensors do not lie end to end (at {tensor.raw})")
        at = tensor.stop
    if at != size:
        raise ValueError(f"{path}: the header describes {at} bytes, the file has {size}; was it cut short?")
    return tensors


def _stored(path: epath.Path, raw: str, entry: Any, data: int) -> Stored:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sane = len(raw) <= _NAME and isinstance(shape, list) and len(shape) <= _AXES  # before any of it is multiplied
        whole = sane and all(type(number) is int and 0 <= number <= _SIZE for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        whole, dtype = False, None
    if not whole or not isinstance(dtype, str) or len(dtype) > _NAME or start > stop:
        raise ValueError(f"{path}: the header's entry for {_cut(raw)} is malformed")
    if dtype in _STORED and stop - start != math.prod(shape) * np.dtype(DTYPES[_STORED[dtype]]).itemsize:
        raise ValueError(f"{path}: {raw} is {dtype} {tuple(shape)} but has {stop - start} bytes")
    return Stored(path, raw, dtype, tuple(shape), data + start, data + stop)


def _cut(text: str) -> str:
    """A text of the file for a message."""
    return text if len(text) <= 600 else f"{text[:500]}..."


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written; `values` fetches it when its turn comes, so that one at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def write_safetensors(tensors: Iterable[Outgoing], directory: str | Path) -> None:
    """model.safetensors, or numbered shards with model.safetensors.index.json beyond SHARD_BYTES, as transformers
    writes."""
    directory = Path(directory)
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(held.nbytes for held in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write_file(shards[0], directory / "model.safetensors")
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(shard, directory / file)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), file))
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2))


def _write_file(tensors: Sequence[Outgoing], path: Path) -> None:
    names = {dtype: name for name, dtype in _STORED.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for tensor in tensors:
        offsets = [at, at := at + tensor.nbytes]
        header[tensor.name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.values()).reshape(-1).view(np.uint8).data)

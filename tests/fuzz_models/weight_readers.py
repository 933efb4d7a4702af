"""The readers of weights: safetensors files and their index, the key table, PEFT adapters, a whole directory."""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from etils import epath
from fuzz_models.harness import Reader
from fuzz_models.mutations import dumps, mutate_bytes, mutate_document, mutate_file, mutate_json_text, strange
from fuzz_models.samples import file_of, mesh, tiny_config, twice, valid, weights_of, write_valid

from mmrlhf_jax.models import families, files, key_table, safetensors_files
from mmrlhf_jax.models.key_table import Key
from mmrlhf_jax.models.llava_onevision import adapter, weights
from mmrlhf_jax.models.safetensors_files import INDEX, SafetensorsDirectory
from mmrlhf_jax.nn.params import Param
from mmrlhf_jax.nn.sharding import ShardingRules

# --- safetensors --------------------------------------------------------------------------------------------------

_DTYPES = ("F32", "F16", "BF16", "I64", "F8_E4M3", "f32", "")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _tensors(names: str) -> dict[str, Any]:
    header, at = {}, 0
    for i, name in enumerate(names):
        shape = [[2, 3], [4], []][i % 3]
        size = int(np.prod(shape, dtype=int)) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at := at + size]}
    return header


def _write_tensors(rng: Random, path: Path, header: Any, change: bool) -> None:
    bytes_of = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    text = dumps(lying(rng, header) if change else header)
    if change and rng.random() < 0.15:
        text = mutate_json_text(rng, text)
    length = len(text)
    if change and rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 1, 2**24, 2**31, 2**63, 2**64 - 1))
    data = length.to_bytes(8, "little") + text + rng.randbytes(bytes_of)
    path.write_bytes(mutate_bytes(rng, data) if change and rng.random() < 0.1 else data)


def lying(rng: Random, header: dict[str, Any]) -> Any:
    if rng.random() < 0.3:
        return mutate_document(rng, header, rng.choice((1, 1, 3)))
    header = json.loads(json.dumps(header))
    entry = rng.choice(list(header.values()))
    kind = rng.randrange(6)
    if kind == 0:
        entry["dtype"] = rng.choice(_DTYPES)
    elif kind == 1:
        entry["shape"] = [rng.choice((0, 1, 2, 3, 2**20, 2**47)) for _ in range(rng.choice((0, 1, 2, 3, 8, 9)))]
    elif kind == 2:
        entry["data_offsets"] = [n + rng.choice((-4, 0, 4, 2**40)) for n in entry["data_offsets"]]
    elif kind == 3:
        entry["data_offsets"] = rng.choice(list(header.values()))["data_offsets"]
    elif kind == 4:
        header["x" * rng.choice((1, 2000))] = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
    else:
        header["__metadata__"] = strange(rng)
    return header


def write_safetensors_case(rng: Random, directory: Path) -> None:
    if rng.random() < 0.02:
        (directory / "few").touch()
    kind = rng.randrange(11)
    if kind < 4:
        _write_tensors(rng, directory / "model.safetensors", _tensors("abc"), True)
    elif kind == 4:
        for name in rng.sample(("pytorch_model.bin", "x.pt", "x.pth", "README.md"), rng.randrange(4)):
            (directory / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    elif kind == 5:
        mutate_file(rng, directory / "model.safetensors", twice, _tensors("ab"))
    elif kind == 6:
        _link(rng, directory)
    else:
        for shard, names in zip(SHARDS, ("abc", "d" + rng.choice("eeeA")), strict=True):  # A is read as a
            if rng.random() < 0.95:
                _write_tensors(rng, directory / shard, _tensors(names), rng.random() < 0.1)
        if rng.random() < 0.1:
            _write_tensors(rng, directory / "model.safetensors", _tensors("a"), False)
        index = {"metadata": {}, "weight_map": {**dict.fromkeys("abc", SHARDS[0]), **dict.fromkeys("de", SHARDS[1])}}
        mutate_file(rng, directory / INDEX, twice, index)


def _link(rng: Random, directory: Path) -> None:
    """As the hub's cache keeps a snapshot, whose files are links to blobs beside it, or elsewhere."""
    snapshot = directory / rng.choice(("snapshots", "snapshots", "others")) / "0"
    snapshot.mkdir(parents=True)
    (directory / "blobs").mkdir()
    _write_tensors(rng, directory / "blobs" / "1", _tensors("ab"), rng.random() < 0.3)
    target = rng.choice(("../../blobs/1", "../../blobs/1", "../../../outside/secret", "../../blobs", "../0", "gone"))
    os.symlink(target, snapshot / "model.safetensors")


def read_safetensors_case(directory: Path) -> None:
    for part in ("snapshots/0", "others/0"):
        if (directory / part).exists():
            directory = directory / part
    most = 4 if (directory / "few").exists() else safetensors_files._TENSORS  # as if there were very many tensors
    with (
        mock.patch.object(safetensors_files, "_TENSORS", most),
        SafetensorsDirectory(directory, str.lower) as source,
    ):
        for name in list(source.where)[:8]:
            if source.dtype(name) and np.prod(source.shape(name), dtype=float) <= 10**6:
                source.read(name)
                source.read(name, slice(1, 2))


# --- the key table ------------------------------------------------------------------------------------------------

_KEYS = [Key("w", "a.{layer}.weight", "(n h) d -> d n h"), Key("b", "b"), Key("u", "c", "e d -> d e"), Key("o", "o")]


def _declared() -> dict[str, Param]:
    """`o` of the table is optional."""
    return {
        "w": Param((2, 3, 2, 2), ("layers", None, None, None), "normal", fan_in=3),
        "b": Param((4,), (None,), "zeros"),
        "u": Param((3, 2), (None, None), "normal", fan_in=3),
    }


def write_key_case(rng: Random, directory: Path) -> None:
    shapes: dict[str, list[int]] = {"a.0.weight": [4, 3], "a.1.weight": [4, 3], "b": [4], "c": [2, 3]}
    if rng.random() < 0.8:
        name = rng.choice(list(shapes))
        kind = rng.randrange(4)
        if kind == 0:
            del shapes[name]
        elif kind == 1:
            shapes[name] = [rng.choice((0, 1, 2, 3, 4, 12)) for _ in range(rng.randrange(5))]
        elif kind == 2:
            shapes[rng.choice(("a.2.weight", "a.-1.weight", "a.{layer}.weight", "b.0", ""))] = shapes.pop(name)
        else:
            shapes[name + rng.choice(("x", ".", "\x1b[2J", "}" * 300))] = [2]
    header, at = {}, 0
    dtype = rng.choice(("F32", "F32", "F16", "BF16"))
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=int)) * (4 if dtype == "F32" else 2)
        kind = rng.choice(("I64", "F8_E4M3")) if rng.random() < 0.02 else dtype
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at := at + size]}
    text = dumps(header)
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + rng.randbytes(at))
    if rng.random() < 0.1:
        (directory / "large").touch()


def read_key_case(directory: Path) -> None:
    held = 0 if (directory / "large").exists() else key_table.HELD_BYTES  # as if the tensors were large
    with SafetensorsDirectory(directory, str) as source, mock.patch.object(key_table, "HELD_BYTES", held):
        declared = _declared()
        key_table.stored_dtypes(source, declared, _KEYS)
        key_table.load(source, declared, _KEYS, mesh(), ShardingRules())


# --- adapters -----------------------------------------------------------------------------------------------------

_ODD_SETTINGS = (
    {"r": 0}, {"r": -1}, {"r": 2**40}, {"r": 2.0}, {"r": 3}, {"r": True}, {"r": None}, {"peft_type": "LOHA"},
    {"use_dora": True}, {"use_rslora": True}, {"lora_alpha": "x"}, {"base_model_name_or_path": ""},
    {"modules_to_save": ["x"]},
)  # fmt: skip


@cache
def _adapter() -> tuple[Any, Any, bytes, Any, Any]:
    """adapter_config.json, header and data of adapter_model.safetensors, the declared base and its parameters."""
    from tiny import random_params

    from mmrlhf_jax.nn.lora import declare_adapted
    from mmrlhf_jax.nn.params import map_named

    declared = families.declare(tiny_config())
    adapted = declare_adapted(declared, ("decoder.layers.query_kernel", "projector.in_kernel"), 2, 4.0)
    params = map_named(lambda _, leaf: np.zeros(leaf.shape, np.float32), adapted)
    with tempfile.TemporaryDirectory() as top:
        adapter.save_adapter(params, f"{top}/adapter", base="owner/base")
        raw = (Path(top) / "adapter" / adapter.WEIGHTS).read_bytes()
        settings = json.loads((Path(top) / "adapter" / adapter.CONFIG).read_text())
    length = int.from_bytes(raw[:8], "little")
    return settings, json.loads(raw[8 : 8 + length]), raw[8 + length :], declared, random_params()


def write_adapter_case(rng: Random, directory: Path) -> None:
    settings, header, data, _, _ = _adapter()
    if rng.random() < 0.6:
        settings = {**settings, **rng.choice(_ODD_SETTINGS)} if rng.random() < 0.1 else settings
        mutate_file(rng, directory / adapter.CONFIG, twice, settings)
    else:
        (directory / adapter.CONFIG).write_bytes(dumps(settings))
        bare = {name: entry for name, entry in header.items() if name != "__metadata__"}
        header = lying(rng, bare) if rng.random() < 0.7 else mutate_document(rng, bare, 2)
        if rng.random() < 0.1:  # a name of nothing that is adapted
            header = {name.replace("lora_", "other_"): entry for name, entry in bare.items()}
    text = dumps(header)
    (directory / adapter.WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_adapter_case(directory: Path) -> None:
    _, _, _, declared, params = _adapter()
    if not adapter.is_adapter_directory(str(directory)):
        raise FileNotFoundError(f"{directory}: no adapter")
    adapter.load_adapted(str(directory), params, declared, mesh(), ShardingRules())


# --- a directory's weights and the files beside them -----------------------------------------------------------------


@cache
def _tiny_weights() -> tuple[dict[str, Any], bytes]:
    raw = weights_of()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_directory_case(rng: Random, directory: Path) -> None:
    header, data = _tiny_weights()
    write_valid(directory)
    if rng.random() < 0.2:
        odd = directory / rng.choice(list(valid()))
        odd.unlink()
        mutate_file(rng, odd, twice, {})
    tied = rng.random() < 0.5
    if tied and rng.random() < 0.9:  # the embeddings stand twice, as some writers leave them
        (begin, end), (to, stop) = (header[name]["data_offsets"] for name in (weights.EMBEDDING, weights.UNEMBEDDING))
        data = data[:to] + data[begin:end] + data[stop:]
    if rng.random() < 0.5:
        header = lying(rng, header)
    text = dumps(header)
    raw = len(text).to_bytes(8, "little") + text + data
    (directory / "model.safetensors").write_bytes(mutate_bytes(rng, raw) if rng.random() < 0.05 else raw)
    (directory / "tied").write_text(json.dumps(tied))


@cache
def _whole(tied: bool) -> tuple[Any, Any]:
    from dataclasses import replace

    tiny = tiny_config()
    config = replace(tiny, decoder=replace(tiny.decoder, tied=tied))
    return config, families.declare(config)


def read_directory_case(directory: Path) -> None:
    """The configuration has a reader of its own, and takes longer than the weights."""
    config, declared = _whole(json.loads((directory / "tied").read_text()))
    with tempfile.TemporaryDirectory() as top:
        weights.copy_assets(directory, epath.Path(top) / "assets")
    path = weights.resolve(str(directory))
    weights.stored_dtypes(path, declared)
    weights.load_params(path, declared, config, mesh(), ShardingRules())


READERS = (
    Reader("safetensors", write_safetensors_case, read_safetensors_case, {
        file_of(safetensors_files): ("nbytes", "write_safetensors", "_write_file"),  # they write
        # these are others' readers: of configs, of texts, of names
        file_of(files): ("size_problems", "is_number", "read_text", "check_model_name"),
    }),
    Reader("keys", write_key_case, read_key_case, {
        # they write; `prefixed` makes the table, at import
        file_of(key_table): ("export_tensors", "_fetch", "export_array", "prefixed"),
    }),
    Reader("adapter", write_adapter_case, read_adapter_case, {
        file_of(adapter): ("save_adapter", "_adapted_kernels", "_at", "_target_modules"),  # they write
    }),
    Reader("directory", write_directory_case, read_directory_case, {
        # they write; `resolve` is the reader "name"
        file_of(weights): ("resolve", "save_directory", "_write_whole", "_upload", "new_directory"),
    }),
)  # fmt: skip

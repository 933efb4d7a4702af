"""The readers of MODEL and RUN directories, each with valid files to begin from."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from etils import epath
from fuzz_models.harness import Reader
from fuzz_models.mutations import (
    TEXTS,
    dumps,
    mutate_bytes,
    mutate_document,
    mutate_file,
    mutate_json_text,
    places,
    strange,
)
from fuzz_models.templates import template_case

from mmrlhf_jax.models import files, key_table, safetensors_files
from mmrlhf_jax.models.critique_reward import config as reward_config
from mmrlhf_jax.models.families import read_config
from mmrlhf_jax.models.key_table import Key
from mmrlhf_jax.models.llava_onevision import (
    adapter,
    bounds,
    chat,
    config,
    lmms_lab,
    template_process,
    tokenizer,
    weights,
)
from mmrlhf_jax.models.safetensors_files import INDEX, SafetensorsDirectory
from mmrlhf_jax.nn.params import Param
from mmrlhf_jax.training import model as run_model

WRITERS = ("nbytes", "write_safetensors", "_write_file")
CRITIQUE = "[Question]: {question} [LMM Response]: {answer} [Evaluation]:"


@cache
def valid() -> dict[str, bytes]:
    """The small files of a tiny directory."""
    from tiny import TINY

    from mmrlhf_jax.models.llava_onevision.fresh import write_fresh_files

    few = dataclasses.replace(TINY, pinpoints=((42, 42), (42, 84), (84, 42)))  # else most changes would fall on them
    with tempfile.TemporaryDirectory() as directory:
        write_fresh_files(directory, few)
        return {file.name: file.read_bytes() for file in Path(directory).iterdir()}


@cache
def document(name: str) -> Any:
    return json.loads(valid()[name])


def write_valid(directory: Path, *without: str) -> None:
    for name, data in valid().items():
        if name not in without:
            (directory / name).write_bytes(data)


def twice(rng: Random, given: Any) -> Any:
    return mutate_document(rng, given, rng.choice((0, 1, 1, 1, 2, 4)))


# --- safetensors --------------------------------------------------------------------------------------------------

_DTYPES = ("F32", "F16", "BF16", "I64", "F8_E4M3", "f32", "")


def _tensors(names: str) -> dict[str, Any]:
    header, at = {}, 0
    for i, name in enumerate(names):
        shape = [[2, 3], [4], []][i % 3]
        size = int(np.prod(shape, dtype=int)) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at := at + size]}
    return header


def _write_tensors(rng: Random, path: Path, header: Any, change: bool) -> None:
    bytes_of = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    text = dumps(_lying(rng, header) if change else header)
    if change and rng.random() < 0.15:
        text = mutate_json_text(rng, text)
    length = len(text)
    if change and rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 1, 2**24, 2**31, 2**63, 2**64 - 1))
    data = length.to_bytes(8, "little") + text + rng.randbytes(bytes_of)
    path.write_bytes(mutate_bytes(rng, data) if change and rng.random() < 0.1 else data)


def _lying(rng: Random, header: dict[str, Any]) -> Any:
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
    kind = rng.randrange(10)
    if kind < 4:
        _write_tensors(rng, directory / "model.safetensors", _tensors("abc"), True)
    elif kind == 4:
        for name in rng.sample(("pytorch_model.bin", "x.pt", "x.pth", "README.md"), rng.randrange(4)):
            (directory / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    elif kind == 5:
        mutate_file(rng, directory / "model.safetensors", twice, _tensors("ab"))
    else:
        shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for shard, names in zip(shards, ("abc", "de"), strict=True):
            if rng.random() < 0.95:
                _write_tensors(rng, directory / shard, _tensors(names), rng.random() < 0.1)
        if rng.random() < 0.1:
            _write_tensors(rng, directory / "model.safetensors", _tensors("a"), False)
        index = {"metadata": {}, "weight_map": {**dict.fromkeys("abc", shards[0]), **dict.fromkeys("de", shards[1])}}
        mutate_file(rng, directory / INDEX, twice, index)


def read_safetensors_case(directory: Path) -> None:
    with SafetensorsDirectory(directory, str) as source:
        for name in list(source.where)[:8]:
            if source.dtype(name) and np.prod(source.shape(name), dtype=float) <= 10**6:
                source.read(name)
                source.read(name, slice(1, 2))


# --- the key table ------------------------------------------------------------------------------------------------

_KEYS = [Key("w", "a.{layer}.weight", "(n h) d -> d n h"), Key("b", "b"), Key("u", "c", "e d -> d e")]


def _declared(rows: int) -> dict[str, Param]:
    return {
        "w": Param((2, 3, 2, rows), ("layers", None, None, None), "normal", fan_in=3),
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


@cache
def _mesh() -> Any:
    import jax

    from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh

    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def read_key_case(directory: Path) -> None:
    from mmrlhf_jax.nn.sharding import ShardingRules

    with SafetensorsDirectory(directory, str) as source:
        declared = _declared(2)
        key_table.stored_dtypes(source, declared, _KEYS)
        key_table.load(source, declared, _KEYS, _mesh(), ShardingRules())


# --- configs ------------------------------------------------------------------------------------------------------


def write_config_case(rng: Random, directory: Path) -> None:
    write_valid(directory, "config.json", "processor_config.json")
    changed = rng.randrange(3)
    given = document("config.json")
    if rng.random() < 0.1:
        given = {**given, "num_labels": 10**9, "text_config": {**given["text_config"], "num_labels": 10**9}}
    if changed < 2:
        mutate_file(rng, directory / "config.json", twice, given)
        (directory / "processor_config.json").write_bytes(valid()["processor_config.json"])
    else:
        (directory / "config.json").write_bytes(valid()["config.json"])
        name = rng.choice(("processor_config.json", "processor_config.json", "preprocessor_config.json"))
        mutate_file(rng, directory / name, twice, document("processor_config.json"))
    if rng.random() < 0.2:
        settings = {"head": "linear", "critique": True, "template": CRITIQUE, "system": None}
        if rng.random() < 0.5:
            settings |= {"critique": False, "attributes": ["kind", "brief"], "quantiles": 9, "facts": True}
        mutate_file(rng, directory / "reward.json", twice, settings)


@cache
def _original() -> tuple[Any, bytes]:
    """config.json and model.safetensors of the original layout."""
    from original_layout import write_original
    from safetensors.numpy import save_file
    from tiny import random_params

    with tempfile.TemporaryDirectory() as top:
        hf = Path(top) / "hf"
        hf.mkdir()
        for name, data in valid().items():
            (hf / name).write_bytes(data)
        outgoing = key_table.export_tensors(random_params(), weights.KEYS, "float32")
        save_file({tensor.name: tensor.values() for tensor in outgoing}, hf / "model.safetensors")
        files_of = {file.name: file.read_bytes() for file in write_original(hf, Path(top) / "out").iterdir()}
    return json.loads(files_of["config.json"]), files_of["model.safetensors"]


def write_original_case(rng: Random, directory: Path) -> None:
    given, tensors = _original()
    write_valid(directory, "config.json", "processor_config.json", "chat_template.jinja", "generation_config.json")
    (directory / "model.safetensors").write_bytes(tensors)
    if rng.random() < 0.2:
        given = {**given, "is_rm": True} if rng.random() < 0.5 else {**given, "image_grid_pinpoints": "(1x1),(99x99)"}
    mutate_file(rng, directory / "config.json", twice, given)


def read_original_case(directory: Path) -> None:
    """The configuration alone: the tokenizer has a reader of its own, and takes longer."""
    path = epath.Path(directory)
    raw = files.read_json(path / "config.json")
    if not lmms_lab.is_original(raw):
        raise ValueError(f"{path}: not the original layout")
    ids = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<image>": 259, "<video>": 260}
    with SafetensorsDirectory(path, lmms_lab.canonical) as source:
        lmms_lab.read_original(path, raw, source, ids)
        lmms_lab._reward_settings(path, raw, source)


# --- tokenizers ---------------------------------------------------------------------------------------------------


@cache
def _tokenizer_places() -> list[tuple[Any, ...]]:
    """Few of the vocabulary's, all others."""
    every = places(document("tokenizer.json"))
    return [place for place in every if place[:2] != ("model", "vocab")] * 8 + every[-40:]


_PARTS = (
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 50},
    {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": []}]},
    {"type": "NFC"},
    {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}]},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
)
_SETTINGS = (
    {"tokenizer_file": "../outside/secret"}, {"vocab_file": "/etc/passwd", "merges_file": "/etc/passwd"},
    {"auto_map": {"AutoTokenizer": ["x.y", "x.y"]}}, {"tokenizer_class": "BertTokenizer"},
    {"tokenizer_class": "LlamaTokenizer"}, {"extra_special_tokens": {"a": "b"}}, {"chat_template": "{{ x }}"},
    {"added_tokens_decoder": {"-1": {"content": "x"}}}, {"added_tokens_decoder": {"999999999999": {"content": "x"}}},
    {"eos_token": {"__type": "AddedToken", "content": ""}}, {"model_max_length": 10**400}, {"vocab": {}},
    {"tokenizer_class": "Qwen2Tokenizer"}, {"init_inputs": [1, 2]}, {"fix_mistral_regex": True},
)  # fmt: skip


def write_tokenizer_case(rng: Random, directory: Path) -> None:
    write_valid(directory, "tokenizer.json", "tokenizer_config.json")
    given = json.loads(valid()["tokenizer.json"])
    if rng.random() < 0.3:
        given[rng.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder"))] = rng.choice(_PARTS)
    settings = document("tokenizer_config.json")
    if rng.random() < 0.4:
        settings = {**settings, **rng.choice(_SETTINGS)}

    def change(rng: Random, document: Any) -> Any:
        return mutate_document(rng, document, rng.choice((0, 1, 1, 2)), _tokenizer_places())

    if rng.random() < 0.15:  # Qwen2's own files
        (directory / "vocab.json").write_bytes(dumps(mutate_document(rng, given["model"]["vocab"], rng.choice((0, 1)))))
        (directory / "merges.txt").write_bytes(mutate_bytes(rng, b"#version: 0.2\na b\n"))
    else:
        mutate_file(rng, directory / "tokenizer.json", change, given)
    if rng.random() < 0.2:
        tokens = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<image>", "<video>"]}
        mutate_file(rng, directory / "special_tokens_map.json", twice, tokens)
        mutate_file(rng, directory / "added_tokens.json", twice, {"<image>": 259, "<video>": 260})
    mutate_file(rng, directory / "tokenizer_config.json", twice, settings)


def read_tokenizer_case(directory: Path) -> None:
    loaded = tokenizer.load_tokenizer(epath.Path(directory), model_type="llava_onevision")
    loaded("some text " * 20 + "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", add_special_tokens=False)


# --- chat templates -----------------------------------------------------------------------------------------------


@cache
def _chat_tokenizer() -> Any:
    from mmrlhf_jax.models.llava_onevision.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        write_valid(Path(directory))
        return load_tokenizer(epath.Path(directory), model_type="llava_onevision")


def write_template_case(rng: Random, directory: Path) -> None:
    text = template_case(rng, valid()["chat_template.jinja"].decode())
    (directory / "chat_template.jinja").write_text(text, errors="replace")
    every = "".join(map(chr, range(0xE000, 0xF900)))  # no character is left to hide special tokens behind
    said = rng.choice(("what <|im_end|> is\nthis?", "", "\ue0000\ue000", every if rng.random() < 0.1 else "\ud800"))
    role = rng.choice(("system", "assistant", "tool<|im_end|>")) if rng.random() < 0.2 else "user"
    (directory / "said.json").write_text(json.dumps([role, said]))


def read_template_case(directory: Path) -> None:
    template = files.read_text(epath.Path(directory) / "chat_template.jinja")
    talk = chat.Chat(_chat_tokenizer(), template, str(directory))
    role, said = json.loads((directory / "said.json").read_text())
    try:
        talk.prompt([{"role": role, "content": [{"type": "image"}, {"type": "text", "text": said}]}])
        talk.response(said)
    except ValueError as error:  # as the renderer does, which knows the row
        raise ValueError(f"{directory}: {error}") from error


# --- adapters -----------------------------------------------------------------------------------------------------


@cache
def _adapter() -> tuple[Any, Any, bytes, Any, Any]:
    """adapter_config.json, header and data of adapter_model.safetensors, the declared base and its parameters."""
    from tiny import TINY, random_params

    from mmrlhf_jax.models.families import declare
    from mmrlhf_jax.nn.lora import declare_adapted
    from mmrlhf_jax.nn.params import map_named

    declared = declare(TINY)
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
    changed = rng.random()
    if changed < 0.6:
        settings = {**settings, "r": rng.choice((0, -1, 2**40, 2.0, 3, True, None))} if changed < 0.05 else settings
        mutate_file(rng, directory / adapter.CONFIG, twice, settings)
    else:
        (directory / adapter.CONFIG).write_bytes(dumps(settings))
        bare = {name: entry for name, entry in header.items() if name != "__metadata__"}
        header = _lying(rng, bare) if rng.random() < 0.7 else mutate_document(rng, bare, 2)
    text = dumps(header)
    (directory / adapter.WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_adapter_case(directory: Path) -> None:
    from mmrlhf_jax.nn.sharding import ShardingRules

    _, _, _, declared, params = _adapter()
    if not adapter.is_adapter_directory(str(directory)):
        raise FileNotFoundError(f"{directory}: no adapter")
    adapter.read_adapter_config(str(directory))
    adapter.load_adapted(str(directory), params, declared, _mesh(), ShardingRules())


# --- names and runs -----------------------------------------------------------------------------------------------

_NAMES = ("../x", "a/b/c", "a\x00/b", "-a/b", "a/-b", "a b/c", "owner/na\nme", "..", "a/..", "a//b", "~/x", ".hidden/x")


def write_name_case(rng: Random, directory: Path) -> None:
    name = rng.choice((*_NAMES, *TEXTS))
    if rng.random() < 0.7:
        pieces = "abc/..-_~%@:\\ \x00\x1b\u202eé9AZ"
        name = "".join(rng.choice(pieces) for _ in range(rng.choice((1, 3, 5, 9, 30, 200))))
    if rng.random() < 0.02:
        name = rng.choice(("owner/name", "Owner-1/na.me_2", str(directory)))
    (directory / "name").write_text(json.dumps(name))


def read_name_case(directory: Path) -> None:
    name = json.loads((directory / "name").read_text())
    with mock.patch("huggingface_hub.snapshot_download", side_effect=OSError("off line")):  # it would look for a token
        weights.resolve(name)


def write_run_case(rng: Random, directory: Path) -> None:
    lora = {"rank": 4, "alpha": 8.0, "targets": ["decoder.layers.*_kernel"]}
    start = {"base": "owner/base", "lora": lora, "fingerprint": "x"}
    if rng.random() < 0.1:
        start["base"] = str(directory)
    mutate_file(rng, directory / "start.json", twice, start)
    (directory / "recipe.json").write_bytes(
        dumps(mutate_document(rng, {"evaluation.metric": "loss"}, rng.choice((0, 0, 1))))
    )
    records = [mutate_document(rng, {"step": n, "eval/loss": 1.0 / n}, rng.choice((0, 0, 1))) for n in (1, 2, 3)]
    lines = b"".join(dumps(record) + b"\n" for record in records)
    (directory / "evaluation.jsonl").write_bytes(mutate_bytes(rng, lines) if rng.random() < 0.1 else lines)


def read_run_case(directory: Path) -> None:
    run_model._check_chain(str(directory))
    run_model.base_of(str(directory))
    made_with = files.read_json(epath.Path(directory) / "start.json").get("lora")
    if made_with:
        run_model._lora_settings(str(directory), made_with)
    run_model._best(run_model.RunDirectory.at(directory), [1, 2, 3])


@cache
def _checkpointed() -> dict[str, bytes]:
    """The files of a RUN with one checkpoint, as Checkpoints.save lays it out."""
    import jax
    import orbax.checkpoint as ocp
    from tiny import random_params

    from mmrlhf_jax.nn.params import named_leaves

    leaves = {name: jax.numpy.asarray(leaf) for name, leaf in named_leaves(random_params())}
    position = {"step": 1, "dtypes": dict.fromkeys(leaves, "float32")}
    with tempfile.TemporaryDirectory() as top, ocp.CheckpointManager(f"{top}/checkpoints") as manager:
        parts = {"params": ocp.args.StandardSave(leaves), "position": ocp.args.JsonSave(position)}
        manager.save(1, args=ocp.args.Composite(**parts))
        manager.wait_until_finished()
        kept = {str(file.relative_to(top)): file.read_bytes() for file in Path(top).rglob("*") if file.is_file()}
    kept |= {f"model/{name}": data for name, data in valid().items()}
    tiny = json.loads(kept["model/config.json"])
    return {**kept, "recipe.json": b"{}", "start.json": b"{}", "model/config.json": dumps(tiny)}


def write_checkpoint_case(rng: Random, directory: Path) -> None:
    kept = _checkpointed()
    for name, data in kept.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    name = rng.choice([name for name in kept if name.startswith("checkpoints/")])
    data, kind = kept[name], rng.randrange(4)
    if kind == 0:
        (directory / name).unlink()
    elif data[:1] == b"{" and kind == 1:
        mutated = mutate_document(rng, json.loads(data), 1)
        (directory / name).write_bytes(dumps(mutated))
    else:
        (directory / name).write_bytes(mutate_bytes(rng, data))


def read_checkpoint_case(directory: Path) -> None:
    from mmrlhf_jax.nn.sharding import ShardingRules
    from mmrlhf_jax.training.recipe import INFERENCE

    run_model.load_model(str(directory), _mesh(), ShardingRules(), rates=INFERENCE)


def _file(module: Any) -> str:
    return str(module.__file__)


_CHAIN = ("load_model", "load_adapters", "_open", "check_family", "with_fresh_head", "model_fingerprint", "_reading",
          "with_fresh_adapters", "_stored_dtypes", "absolute", "assets_of", "_bare", "<lambda>")  # fmt: skip
_NOT_RESOLVE = (
    "stored_dtypes",
    "load_params",
    "save_directory",
    "_write_whole",
    "_upload",
    "copy_assets",
    "new_directory",
)
READERS = {
    reader.name: reader
    for reader in (
        Reader("safetensors", write_safetensors_case, read_safetensors_case,
               {_file(safetensors_files): WRITERS,
                _file(files): ("size_problems", "is_number", "read_text", "check_model_name")}),
        Reader("keys", write_key_case, read_key_case,
               {_file(key_table): ("export_tensors", "_fetch", "_load_by_layer", "_write_layer", "_cast", "_place",
                                   "export_array", "rows", "prefixed")}),
        Reader("config", write_config_case, lambda directory: read_config(directory),
               {_file(config): ("tile_cost", "tokens_per_tile"), _file(bounds): (), _file(reward_config):
                ("write", "read_template", "fill", "template_sha256")}),
        Reader("original", write_original_case, read_original_case,
               {_file(lmms_lab): ("assets_directory", "derive_assets", "_tokenizer")}),
        Reader("tokenizer", write_tokenizer_case, read_tokenizer_case, {_file(tokenizer): ("<genexpr>",)}),
        Reader("template", write_template_case, read_template_case, {_file(chat): (),
                _file(template_process): ("_forget", "serve", "_answer", "_environment")}),
        Reader("adapter", write_adapter_case, read_adapter_case,
               {_file(adapter): ("save_adapter", "_adapted_kernels", "_at", "_target_modules")}),
        Reader("name", write_name_case, read_name_case, {_file(weights): _NOT_RESOLVE}, names_case=False),
        Reader("checkpoint", write_checkpoint_case, read_checkpoint_case, {}),
        Reader("run", write_run_case, read_run_case, {_file(run_model): _CHAIN}),
    )
}  # fmt: skip

"""The readers of configurations: llava-hf's config.json with what lies beside it, lmms-lab's, the names of MODELs."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from etils import epath
from fuzz_models.harness import Reader
from fuzz_models.mutations import TEXTS, dumps, mutate_bytes, mutate_file
from fuzz_models.samples import document, file_of, twice, valid, weights_of, write_valid

from mmrlhf_jax.models import files
from mmrlhf_jax.models.critique_reward import config as reward_config
from mmrlhf_jax.models.families import read_config
from mmrlhf_jax.models.llava_onevision import bounds, config, lmms_lab, weights
from mmrlhf_jax.models.safetensors_files import SafetensorsDirectory
from mmrlhf_jax.training import model as run_model

CRITIQUE = "[Question]: {question} [LMM Response]: {answer} [Evaluation]:"

# --- configs ------------------------------------------------------------------------------------------------------

_ODD_TEXT = (
    {"num_key_value_heads": 3}, {"hidden_size": 33}, {"head_dim": 7}, {"head_dim": None, "hidden_size": 33},
    {"head_dim": None, "hidden_size": 36}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
    {"vocab_size": 100}, {"num_labels": 10**9},
)  # fmt: skip
_ODD_VISION = ({"hidden_size": 33}, {"patch_size": 43}, {"patch_size": 1, "image_size": 4000}, {"image_size": 100})
_ODD_WHOLE = (
    {"image_grid_pinpoints": []}, {"image_grid_pinpoints": [[43, 42]]}, {"image_grid_pinpoints": [[0, 42]]},
    {"text_config": []}, {"vision_aspect_ratio": "anyres"}, {"num_labels": 10**9}, {"image_token_index": 319},
)  # fmt: skip


def _odd_config(rng: Random, given: dict[str, Any]) -> dict[str, Any]:
    part = rng.randrange(3)
    if part == 0:
        return {**given, "text_config": {**given["text_config"], **rng.choice(_ODD_TEXT)}}
    if part == 1:
        return {**given, "vision_config": {**given["vision_config"], **rng.choice(_ODD_VISION)}}
    return {**given, **rng.choice(_ODD_WHOLE)}


def write_config_case(rng: Random, directory: Path) -> None:
    write_valid(directory, "config.json", "processor_config.json")
    changed = rng.randrange(3)
    given = document("config.json")
    if changed < 2:
        mutate_file(rng, directory / "config.json", twice, _odd_config(rng, given) if rng.random() < 0.1 else given)
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
    if rng.random() < 0.2:
        pieces = rng.choices((*CRITIQUE.split(), "{question}", "\n"), k=7) if rng.random() < 0.5 else [CRITIQUE, "\n"]
        text = mutate_bytes(rng, " ".join(pieces).encode()) if rng.random() < 0.5 else " ".join(pieces).encode()
        (directory / "template.txt").write_bytes(text)


def read_config_case(directory: Path) -> None:
    if (directory / "template.txt").exists():
        reward_config.read_template(str(directory / "template.txt"))
    read_config(directory)


# --- lmms-lab's layout ----------------------------------------------------------------------------------------------


@cache
def _original() -> tuple[Any, dict[str, Any], bytes, dict[str, bytes]]:
    """config.json, header and data of model.safetensors, and the tokenizer's files of the original layout."""
    from original_layout import write_original

    with tempfile.TemporaryDirectory() as top:
        hf = Path(top) / "hf"
        hf.mkdir()
        for name, data in {**valid(), "model.safetensors": weights_of()}.items():
            (hf / name).write_bytes(data)
        files_of = {file.name: file.read_bytes() for file in write_original(hf, Path(top) / "out").iterdir()}
    tensors = files_of.pop("model.safetensors")
    length = int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8 : 8 + length])
    return json.loads(files_of.pop("config.json")), header, tensors[8 + length :], files_of


_ODD_ORIGINAL = (
    {"is_rm": True}, {"image_grid_pinpoints": "(1x1),(99x99)"}, {"image_grid_pinpoints": "(1x1),(2x2)"},
    {"image_grid_pinpoints": [[42, 84]]}, {"vision_config": None}, {"mm_vision_tower": "clip"}, {"vision_config": {}},
    {"vision_config": {"num_attention_heads": 3, "image_size": 42}}, {"hidden_size": 33}, {"vocab_size": 200},
    {"vision_config": {"num_attention_heads": 2, "image_size": 5000}}, {"image_aspect_ratio": "pad"},
    {"rms_norm_eps": 7}, {"vocab_size": 0}, {"mm_vision_tower": "google/siglip-so400m-patch14-384",
    "vision_config": None}, {"model_type": "llava", "architectures": []}, {"model_type": "llava_qwen"},
)  # fmt: skip


def _odd_tensors(rng: Random, header: dict[str, Any]) -> dict[str, Any]:
    """The names and shapes decide the tower and whether there is a head; a name that ends differently is another's."""
    header = {name: dict(entry) for name, entry in header.items()}
    patch = next(name for name in header if name.endswith("patch_embedding.weight"))
    kind = rng.randrange(4)
    if kind == 0:
        header[f"{lmms_lab.REWARD_HEAD}dense.weight"] = header.pop("lm_head.weight")
    elif kind == 1:
        header[patch]["shape"] = rng.choice(([32, 3, 196, 1], [32, 3, 196], [32, 588], [588, 32, 1, 1]))
    elif kind == 2:
        gone = rng.choice(("patch_embedding.weight", "layers.0.mlp.fc1.weight", "layers.1.mlp.fc1.weight", "newline"))
        name = next(name for name in header if name.endswith(gone))
        header[name + "x"] = header.pop(name)
    else:
        name = next(name for name in header if name.endswith("layers.0.mlp.fc1.weight"))
        header[name]["shape"] = rng.choice(([2048], [2048, 1], [32, 64], [1, 1, 2048]))
    return header


def write_original_case(rng: Random, directory: Path) -> None:
    given, header, data, beside = _original()
    if whole := rng.random() < 0.05:
        for name, text in beside.items():
            if name == "tokenizer.json" and rng.random() < 0.2:
                text = text.replace(b"<|im_end|>", b"<|no_end|>")
            (directory / name).write_bytes(text)
        (directory / "whole").touch()
    if rng.random() < 0.2:
        header = _odd_tensors(rng, header)
    named = dumps(header)
    (directory / "model.safetensors").write_bytes(len(named).to_bytes(8, "little") + named + data)
    if rng.random() < 0.2:
        given = {**given, **rng.choice(_ODD_ORIGINAL)}
    mutate_file(rng, directory / "config.json", (lambda rng, given: given) if whole else twice, given)


def read_original_case(directory: Path) -> None:
    """The configuration, and seldom all files made of it: the tokenizer has a reader of its own, and takes longer."""
    path = epath.Path(directory)
    if (directory / "whole").exists():
        lmms_lab.assets_directory(path)
    raw = files.read_json(path / "config.json")
    if not lmms_lab.is_original(raw):
        raise ValueError(f"{path}: not the original layout")
    ids = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<image>": 259, "<video>": 260}
    with SafetensorsDirectory(path, lmms_lab.canonical) as source:
        lmms_lab.read_original(path, raw, source, ids)
        lmms_lab._reward_settings(path, raw, source)


# --- names ----------------------------------------------------------------------------------------------------------

_NAMES = ("../x", "a/b/c", "a\x00/b", "-a/b", "a/-b", "a b/c", "owner/na\nme", "..", "a/..", "a//b", "~/x", ".hidden/x")


def write_name_case(rng: Random, directory: Path) -> None:
    name = rng.choice((*_NAMES, *TEXTS))
    if rng.random() < 0.7:
        pieces = "abc/..-_~%@:\\ \x00\x1b\u202eé9AZ"
        name = "".join(rng.choice(pieces) for _ in range(rng.choice((1, 3, 5, 9, 30, 200))))
    if rng.random() < 0.1:
        name = rng.choice(("owner/name", "Owner-1/na.me_2", str(directory), "a" * 95 + "/b", "a" * 96 + "/" + "b" * 96))
    if rng.random() < 0.1:
        name += rng.choice(("@best", "@1", "@", "@-1", "@" + "9" * 5000, "@best@best", "@²"))
    (directory / "name").write_text(json.dumps(name))


def read_name_case(directory: Path) -> None:
    name = json.loads((directory / "name").read_text())
    with mock.patch("huggingface_hub.snapshot_download", side_effect=OSError("off line")):  # it would look for a token
        if "://" not in name:  # a bucket would be asked
            run_model.absolute(name)
        weights.resolve(name)


READERS = (
    Reader("config", write_config_case, read_config_case, {
        file_of(config): ("tile_cost", "tokens_per_tile"),  # they compute, from a configuration that is read
        file_of(bounds): (),
        file_of(reward_config): ("write", "fill", "template_sha256"),  # they write, or are for texts of a template
    }),
    Reader("original", write_original_case, read_original_case, {file_of(lmms_lab): ()}, traced=2),
    Reader("name", write_name_case, read_name_case, {
        # all but `resolve`: they write, or are the reader "directory"
        file_of(weights): ("stored_dtypes", "load_params", "save_directory", "_write_whole", "_upload", "copy_assets",
                           "new_directory", "<lambda>", "<genexpr>"),
    }, names_case=False),
)  # fmt: skip

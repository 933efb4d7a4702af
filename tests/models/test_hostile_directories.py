"""MODEL directories as strangers make them: refused in a message that names the file, before anything is allocated."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from etils import epath
from safetensors.numpy import save_file
from tiny import TINY, write_tiny_directory

from mmrlhf_jax.models.key_table import Key
from mmrlhf_jax.models.llava_onevision.adapter import CONFIG, read_adapter_config
from mmrlhf_jax.models.llava_onevision.config import read_config
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.models.llava_onevision.tokenizer import load_tokenizer
from mmrlhf_jax.models.llava_onevision.weights import copy_assets, resolve
from mmrlhf_jax.models.safetensors_files import SafetensorsDirectory
from mmrlhf_jax.training.model import assets_of


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_tiny_directory(tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes: object) -> None:
    """Sets top-level values, or `text_config__name` of a part."""
    raw = json.loads(file.read_text())
    for name, value in changes.items():
        part, _, inner = name.rpartition("__")
        (raw[part] if part else raw)[inner] = value
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("text_config__num_hidden_layers", 10**9, "from 1 to 1,024"),
        ("text_config__vocab_size", 10**12, "from 1 to 4,000,000"),
        ("text_config__hidden_size", 0, "from 1 to 131,072"),
        ("text_config__head_dim", 10**400, "from 2 to 4,096"),
        ("text_config__intermediate_size", "64", "from 1 to 1,048,576"),
        ("text_config__max_position_embeddings", 10**15, "from 1 to 16,777,216"),
        ("vision_config__image_size", 10**6, "from 1 to 4,096"),
        ("vision_config__patch_size", 0, "from 1 to 4,096"),
        ("vision_config__num_attention_heads", True, "from 1 to 4,096"),
        ("image_token_index", -1, "from 0 to 4,000,000"),
        ("image_grid_pinpoints", [[42, 42]] * 5000, "a list of 1 to 4,096 pairs"),
        ("image_grid_pinpoints", [[42, 42 * 10**6]], "from 1 to 2,688"),
    ],
)
def test_an_absurd_size_is_refused_by_its_name_and_bound(directory: Path, name: str, value: object, bound: str) -> None:
    edit(directory / "config.json", **{name: value})
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"config\.json: .*{name.replace('__', '[.]')}.*{bound}"):
        read_config(str(directory))
    assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    tracemalloc.stop()


def test_what_is_not_read_is_not_shown_to_transformers(directory: Path) -> None:
    """num_labels makes its configuration write a list of labels as long."""
    edit(directory / "config.json", num_labels=10**10, text_config__num_labels=10**10)
    assert read_config(str(directory)) == TINY


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_config__num_key_value_heads", 3),
        ("text_config__head_dim", 7),
        ("vision_config__hidden_size", 33),
        ("image_token_index", 320),
        ("text_config__rope_parameters", {"rope_type": "default", "rope_theta": -1.0}),
        ("text_config__rms_norm_eps", 0.0),
        ("text_config", []),
        ("vision_aspect_ratio", "anyres_max_²"),
        ("vision_aspect_ratio", ["anyres_max_9"]),
    ],
)
def test_sizes_that_cannot_go_together_are_refused(directory: Path, name: str, value: object) -> None:
    edit(directory / "config.json", **{name: value})
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_config(str(directory))


@pytest.mark.parametrize("value", [[0.5, 0.5], "0.5", [0.5, 0.5, None], [0, 0, 0], [1e300] * 3])
def test_colours_that_are_none_are_refused(directory: Path, value: object) -> None:
    file = directory / "processor_config.json"
    raw = json.loads(file.read_text())
    raw["image_processor"]["image_std"] = value
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"processor_config\.json: image_std = .*three numbers"):
        read_config(str(directory))


@pytest.mark.parametrize("text", ["[]", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 10**5, "\udcff", " " * (5 * 2**20)])
def test_a_config_that_is_no_json_object_is_refused(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_config(str(directory))


def test_the_shape_of_a_tensor_is_found_without_making_it() -> None:
    key = Key("w", "w", "(n h) d -> d n h")
    assert key.their_shape((2**40, 2**20, 2**20)) == (2**40, 2**40)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_the_directory_is_refused(directory: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes((directory / name).read_bytes())
    (directory / name).unlink()
    os.symlink("../outside", directory / name)
    with pytest.raises(ValueError, match=f"{name}: a link that leaves its directory"):
        load_renderer(str(directory))
    with pytest.raises(ValueError, match=f"{name}: a link that leaves its directory"):
        copy_assets(directory, tmp_path / "copy")


def test_the_links_of_the_hub_s_cache_are_followed(directory: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(directory.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        os.symlink(f"../../blobs/{number}", snapshot / file.name)
    assert load_renderer(str(snapshot)).config == TINY


def test_a_pipe_is_not_waited_for(directory: Path) -> None:
    os.mkfifo(directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a plain file"):
        SafetensorsDirectory(directory, str)


def test_a_header_of_many_numbers_is_refused_before_they_are_multiplied(tmp_path: Path) -> None:
    shape = [10**4000] * 3000
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=r"model\.safetensors: the header's entry for a is malformed"):
        SafetensorsDirectory(tmp_path, str)


def test_a_weight_file_behind_a_link_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "elsewhere.safetensors")
    (tmp_path / "model").mkdir()
    os.symlink("../elsewhere.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="a link that leaves its directory"):
        SafetensorsDirectory(tmp_path / "model", str)


@pytest.mark.parametrize(
    "name", ["../x", "a/b/c", "a/b\x00", "a/b\n", "-a/b", "a/-b", "a b/c", "a/..", "a/b..c", "a/b--c", "", "http://h/x"]
)
def test_an_odd_name_is_refused_before_any_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises((ValueError, OSError), match=r"no such directory|names no MODEL|lies on gs://"):
        resolve(name)


# --- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}}, "normalizer 'Replace'"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 5}}, "Sequence of up to 4"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(a+)+$"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            r"splits at .*\(a\+\)\+",
        ),
        ({"model": {"type": "Unigram", "vocab": []}}, "model is 'Unigram'"),
        ({"model": {"type": "BPE", "dropout": 0.5, "vocab": {}, "merges": []}}, "dropout = 0.5"),
        ({"added_tokens": [{"id": 1, "content": ""}]}, "added_tokens: those of 1 to 512 characters"),
        ({"added_tokens": [{"id": n, "content": str(n)} for n in range(9000)]}, "at most 8,192 added tokens"),
        ({"added_tokens": 1}, "at most 8,192 added tokens"),
    ],
)
def test_a_tokenizer_that_is_more_than_qwen2_s_is_refused(directory: Path, changes: dict, message: str) -> None:
    edit(directory / "tokenizer.json", **changes)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        load_tokenizer(epath.Path(directory))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoTokenizer": ["x.y", None]}}, "auto_map names code"),
        ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class = 'BertTokenizer', supported"),
        ({"model_max_length": [1]}, "model_max_length"),
    ],
)
def test_settings_that_name_code_are_refused(directory: Path, changes: dict, message: str) -> None:
    edit(directory / "tokenizer_config.json", **changes)
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        load_tokenizer(epath.Path(directory))


def test_no_other_file_is_read_for_a_tokenizer(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", tokenizer_file="/etc/passwd", vocab_file="../secret")
    assert len(load_tokenizer(epath.Path(directory))) == 261


def test_a_tokenizer_of_more_ids_than_rows_is_refused(directory: Path) -> None:
    edit(directory / "config.json", text_config__vocab_size=261)
    load_renderer(str(directory))
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    edit(directory / "tokenizer.json", added_tokens=[*tokens, {**tokens[-1], "id": 261, "content": "<more>"}])
    with pytest.raises(ValueError, match="the tokenizer has id 261, the model's vocabulary 261 rows"):
        load_renderer(str(directory))


def test_half_a_character_is_refused_by_name(directory: Path) -> None:
    with pytest.raises(ValueError, match="half of a character"):
        load_renderer(str(directory)).response_ids("a\ud800")


# --- adapters and runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"r": 0}, {"r": 10**9}, {"r": "8"}, {"lora_alpha": None}, {"lora_alpha": 10**400},
     {"base_model_name_or_path": ["x"]}, {"base_model_name_or_path": "a\x1b[2J"},
     {"base_model_name_or_path": "http://127.0.0.1/x"}],
)  # fmt: skip
def test_an_adapter_that_cannot_be_is_refused(tmp_path: Path, changes: dict) -> None:
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "a/b", **changes}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {next(iter(changes))}"):
        read_adapter_config(str(tmp_path))


def test_adapters_on_each_other_end_in_a_message(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="adapters on adapters without an end"):
        assets_of(str(tmp_path / "a"))

"""Law 4, lmms-lab's layout: a model of the original LLaVA code is its llava-hf twin, or is refused by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from original_layout import original_config, write_original
from safetensors.numpy import load_file, save_file
from tiny import TINY, random_params, write_tiny_directory

from mmrlhf_jax.groups import Group, Media, Origin, Response, Turn
from mmrlhf_jax.models import key_table
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig, read_config
from mmrlhf_jax.models.llava_onevision.lmms_lab import assets_directory, read_original
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.models.llava_onevision.names import REWARD_HEAD, canonical
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.models.llava_onevision.weights import KEYS, save_directory
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import LoadedModel, load_model, model_fingerprint
from mmrlhf_jax.training.recipe import INFERENCE, read_recipe
from mmrlhf_jax.training.train import train

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / ".." / "shared" / "oracles" / "keys"
SMALL = {"heads": 14, "kv_heads": 2, "head_dim": 64, "layers": 24, "mlp": 4864}


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("twin")
    write_tiny_directory(path / "assets")
    save_directory(random_params(), path / "assets", path / "model")
    return path / "model"


@pytest.fixture(scope="module")
def original(twin, tmp_path_factory) -> Path:
    return write_original(twin, tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def load(directory: Path) -> LoadedModel:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return load_model(str(directory), mesh, ShardingRules(), rates=INFERENCE, dtype="float32")


def configure(directory: Path, **changes) -> None:
    """Rewrites config.json; a change to ... removes the key."""
    raw = {**original_config(), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def export(monkeypatch, model: Path, output: Path) -> None:
    spec = importlib.util.spec_from_file_location("export", ROOT / "launch" / "export.py")
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "export", program)  # dataclasses look their module up
    spec.loader.exec_module(program)
    monkeypatch.setattr("sys.argv", ["export.py", str(model), "--output", str(output), "--dtype", "float32"])
    program.main()


# --- the same model -----------------------------------------------------------------------------------------------


def test_it_loads_as_its_twin_to_the_last_bit(original, twin):
    have, wanted = load(original), load(twin)
    assert have.config == wanted.config == TINY
    assert model_fingerprint(have.config, have.params) == model_fingerprint(wanted.config, wanted.params)
    for (name, ours), (_, theirs) in zip(named_leaves(have.params), named_leaves(wanted.params), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_its_prompts_are_its_twin_s(original, twin):
    media = (Media("image", "a.png", ((100, 60),)), Media("video", "b", ((64, 48),) * 3))
    group = Group(
        id="0",
        prompt=(Turn("system", "Be brief."), Turn("user", "What is <image> here?")),
        media=media,
        responses=(Response("Noise."), Response("<|im_end|>")),
        pairs=(),
        origins=(Origin("made.jsonl", 1),),
    )
    ours, theirs = load_renderer(str(original)), load_renderer(str(twin))
    assert ours.name == str(original)
    prompts = (renderer.with_pictures(group, renderer.prompt_ids(group)) for renderer in (ours, theirs))
    for have, wanted in zip(*prompts, strict=True):
        np.testing.assert_array_equal(have, wanted)
    assert ours.measure(group) == theirs.measure(group)


def test_exported_it_is_its_twin_exported(monkeypatch, original, twin, tmp_path):
    export(monkeypatch, original, tmp_path / "a")
    export(monkeypatch, twin, tmp_path / "b")
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {file.name for file in (tmp_path / "a").iterdir()} == {file.name for file in (tmp_path / "b").iterdir()}
    for file in ("config.json", "processor_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / file).read_text() == (tmp_path / "b" / file).read_text(), file
    assert read_config(str(tmp_path / "a")) == TINY


def test_what_is_derived_is_the_same_each_time_and_leaves_the_model_alone(original):
    before = sorted(file.name for file in original.iterdir())
    first, second = assets_directory(original), assets_directory(original)
    assert first != second
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in second.iterdir())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    assert sorted(file.name for file in original.iterdir()) == before


def test_a_llava_hf_directory_is_its_own_assets(twin):
    assert assets_directory(twin) == epath.Path(twin)


def test_media_tokens_take_the_next_free_ids_or_keep_theirs(copy):
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    like = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"].append({**like, "id": 259, "content": "<more>"})
    tokenizer["added_tokens"].append({**like, "id": 260, "content": "<video>"})
    file.write_text(json.dumps(tokenizer))
    config = load(copy).config
    assert (config.image_token, config.video_token) == (261, 260)


def test_a_tokenizer_in_qwen2_s_own_files(copy):
    """As the hub has it: vocab.json and merges.txt, special tokens in tokenizer_config.json, a template of its own."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (copy / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(token["id"]): token for token in tokenizer["added_tokens"]},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(copy).config == TINY
    ids = load_renderer(str(copy))._chat.prompt([{"role": "user", "content": [{"type": "image"}]}]).tolist()
    assert [ids[0], *(i for i in ids if i > 255)] == [257, 257, 259, 258, 257]


def test_a_list_of_pinpoints_is_width_first(copy):
    configure(copy, image_grid_pinpoints=[[42, 84], [126, 42]])
    assert load(copy).config.pinpoints == ((84, 42), (42, 126))  # ours: height first
    every = [[42 * w, 42 * h] for w in range(1, 7) for h in range(1, 7)]
    configure(copy, image_grid_pinpoints=every)
    assert load(copy).config == TINY


@pytest.mark.parametrize("model_type", ["llava_qwen", "llava_qwen2"])
def test_every_model_type_the_code_had(copy, model_type):
    configure(copy, model_type=model_type, mm_newline_position="one_token")
    assert load(copy).config == TINY


# --- the released ones --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listing", ["lmms-lab-0.5b", "lmms-lab-7b", "mm-rlhf-reward-7b"])
def test_the_released_models_fit_with_nothing_missing_or_surplus(listing):
    file = SHARED / f"{listing}.json"
    if not file.exists():
        pytest.skip("the hub's key listings lie in the shared folder beside the repository, which is not here")
    tensors = json.loads(file.read_text())["tensors"]
    head = {name for name in tensors if name.startswith(REWARD_HEAD)}
    assert len(head) == (4 if "reward" in listing else 0)
    vocab, embed = tensors["model.embed_tokens.weight"]
    shape = SMALL if embed == 896 else {}
    decoder = Qwen2Config(vocab=vocab, embed=embed, tied="lm_head.weight" not in tensors, **shape)
    source = SimpleNamespace(
        directory=listing,
        where={canonical(name): name for name in tensors},
        shape=lambda name: tuple(tensors[source.where[name]]),
    )
    assert len(source.where) == len(tensors)
    expected = key_table.expected_tensors(declare(LlavaOnevisionConfig(decoder=decoder)), KEYS)
    key_table.check(source, expected, head.__contains__)
    assert {item.name for item in expected} == set(source.where) - head


def test_the_released_7b_s_config_is_read_as_what_it_is():
    file = SHARED / "lmms-lab-7b.json"
    if not file.exists():
        pytest.skip("the hub's key listings lie in the shared folder beside the repository, which is not here")
    tensors = json.loads(file.read_text())["tensors"]
    source = SimpleNamespace(
        where={canonical(name): name for name in tensors}, shape=lambda name: tuple(tensors[source.where[name]])
    )
    raw = {
        **original_config(),
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "image_grid_pinpoints": [[384 * w, 384 * h] for w in range(1, 7) for h in range(1, 7)],
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    }
    del raw["vision_config"]
    ids = {"<image>": 151646, "<video>": 151647}
    assert read_original(epath.Path("7b"), raw, source, ids) == LlavaOnevisionConfig()


# --- what is not served -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("mm_newline_position", "grid", "mm_newline_position = 'grid', supported: 'one_token'"),
        ("mm_newline_position", "frame", "mm_newline_position = 'frame'"),
        ("mm_newline_position", "no_token", "mm_newline_position = 'no_token'"),
        ("mm_patch_merge_type", "flat", "mm_patch_merge_type = 'flat', supported: 'spatial_unpad'"),
        ("mm_patch_merge_type", ..., "mm_patch_merge_type = 'absent'"),
        ("mm_projector_type", "linear", "mm_projector_type = 'linear'"),
        ("mm_spatial_pool_mode", "average", "mm_spatial_pool_mode = 'average'"),
        ("mm_vision_select_layer", -1, "mm_vision_select_layer = -1"),
        ("mm_vision_select_feature", "cls_patch", "mm_vision_select_feature = 'cls_patch'"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end = True"),
        ("mm_resampler_type", "perceiver", "mm_resampler_type = 'perceiver'"),
        ("add_faster_video", True, "add_faster_video = True"),
        ("quantization_config", {"bits": 4}, "quantization_config ="),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling ="),
        ("image_aspect_ratio", "pad", "image_aspect_ratio = 'pad', supported: 'anyres_max_N'"),
        ("image_grid_pinpoints", [[42, 43]], "are not multiples of the tile size 42"),
        ("image_grid_pinpoints", "all", "image_grid_pinpoints = 'all'"),
        ("image_grid_pinpoints", ..., "image_grid_pinpoints = None"),
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336", "mm_vision_tower = 'openai/clip"),
        ("vision_config", ..., "mm_vision_tower = 'google/siglip-tiny', supported: 'siglip-so400m-patch14-384'"),
        ("vision_config", {"image_size": 42}, "vision_config must state num_attention_heads and image_size"),
        ("hidden_size", "32", "hidden_size = '32', a whole number from 1 to"),
        ("rope_theta", ..., "rope_theta = None, a number from 1 to"),
        ("rms_norm_eps", "small", "rms_norm_eps = 'small', a number from"),
        ("num_attention_heads", 3, "num_attention_heads = 3 does not divide into num_key_value_heads = 2"),
        ("vision_config", [], "vision_config must state"),
        ("vocab_size", 260, "<image> would be id 259 and <video> would be id 260: 261 rows are needed"),
        ("is_rm", True, "config.json says is_rm, but rm_head.dense.weight is not there"),
        ("architectures", ["LlavaForConditionalGeneration"], "model_type is 'llava'; supported"),
    ],
)
def test_a_setting_that_is_not_served_is_named(copy, setting, value, message):
    configure(copy, **{setting: value})
    with pytest.raises(ValueError, match=message) as error:
        load(copy)
    assert str(copy) in str(error.value)


def test_the_released_tower_s_name_must_fit_its_tensors(copy):
    configure(copy, mm_vision_tower="google/siglip-so400m-patch14-384", vision_config=...)
    with pytest.raises(ValueError, match=r"not those of google/siglip-so400m-patch14-384: they make .*embed=32"):
        load(copy)


def test_a_part_of_a_reward_head_is_a_surplus_tensor(copy):
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"rm_head.dense.bias": np.zeros(32, np.float32)}, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"surplus: rm_head.dense.bias"):
        load(copy)


def test_a_tower_left_elsewhere_is_missed(copy):
    tensors = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    save_file(kept, copy / "model.safetensors")
    with pytest.raises(ValueError, match="the tower's tensors are not there"):
        load(copy)


def test_a_tokenizer_must_be_there_and_be_qwen2_s(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<|im_end|>"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|im_end\|>"):
        load(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not readable as JSON"):
        load(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer there"):
        load(copy)


# --- used as any other MODEL --------------------------------------------------------------------------------------


def test_a_run_that_starts_from_it_is_its_twin_s_run(small_world, tmp_path):
    model = write_original(Path(small_world.model), tmp_path / "original")
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    data = dataclasses.replace(tiny.data, max_steps=2, max_buckets=1)
    finals = []
    for name, start in (("a", str(model)), ("b", small_world.model)):
        recipe = dataclasses.replace(tiny, model=start, dataset=small_world.dataset, reference="online", data=data)
        train(recipe, tmp_path / name)
        finals.append(load(tmp_path / name))
    assert (tmp_path / "a" / "model" / "processor_config.json").exists()  # a run carries what it needs
    for (at, ours), (_, theirs) in zip(*(named_leaves(final.params) for final in finals), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=at)

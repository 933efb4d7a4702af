"""Law 4: what is imported is exported, complete, and transformers loads it; what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import TINY, random_params, write_tiny_directory
from torchvision_shim import mend_torchvision

from mmrlhf_jax.batch import Entry, Totals, pack
from mmrlhf_jax.groups import Branch, Bucket, Rendered
from mmrlhf_jax.models import key_table, safetensors_files
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig, read_config
from mmrlhf_jax.models.llava_onevision.fresh import write_fresh_files
from mmrlhf_jax.models.llava_onevision.model import Compute, LlavaOnevision, declare, response_logps
from mmrlhf_jax.models.llava_onevision.weights import KEYS, canonical, load_params, save_directory
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracles" / "keys"
TIED = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, tied=True))
ROUNDED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def load(directory: Path, devices: int = 1, **mesh: int) -> LlavaOnevision:
    config = read_config(str(directory))
    over = make_mesh(MeshConfig(**mesh), jax.devices()[:devices])
    return load_params(directory, declare(config), config, over, ShardingRules())


def assert_same(have: LlavaOnevision, wanted: LlavaOnevision) -> None:
    wanted = dict(named_leaves(wanted))
    assert wanted.keys() == dict(named_leaves(have)).keys()
    for name, leaf in named_leaves(jax.device_get(have)):
        assert leaf.dtype == np.float32, name
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("assets")
    write_tiny_directory(path)
    return path


@pytest.fixture(scope="module")
def model(assets, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "whole"
    save_directory(random_params(), assets, path)
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tied")
    write_fresh_files(str(path / "assets"), TIED)
    save_directory(random_params(TIED), path / "assets", path / "whole")
    return path / "whole"


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def rewrite(directory: Path, change) -> None:
    """The weights of a directory as `change` makes them of {name: array}."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)


# --- out and in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROUNDED)
def test_what_is_written_is_what_loads(assets, tmp_path, dtype):
    save_directory(random_params(), assets, tmp_path / "out", dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    rounded = jax.tree.map(lambda x: x.astype(ROUNDED[dtype]).astype(np.float32), random_params())
    assert_same(load(tmp_path / "out"), rounded)


def test_an_export_is_complete(assets, model):
    files = {file.name for file in model.iterdir()}
    assert files == {file.name for file in assets.iterdir()} | {"model.safetensors"}
    assert {"generation_config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"} <= files
    assert read_config(str(model)) == TINY


def test_tensors_carry_the_hub_s_names(model):
    names = load_file(model / "model.safetensors").keys()
    assert {"image_newline", "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= names
    assert "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight" in names


def test_transformers_5_s_shorter_spelling_loads_too(copy):
    rewrite(
        copy, lambda tensors: {k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in tensors.items()}
    )
    assert not any("vision_model." in name for name in load_file(copy / "model.safetensors"))
    assert_same(load(copy), random_params())


def test_large_models_are_written_in_shards_with_an_index(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 80_000)
    out = tmp_path / "out"
    save_directory(random_params(), assets, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    count = len(shards)
    assert count > 2
    assert set(shards) == {f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)}
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in shards.values()]
    assert max(sizes) <= 80_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same(load(out), random_params())


def test_an_export_never_overwrites_and_leaves_nothing_half_done(assets, model, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        save_directory(random_params(), assets, model)
    with pytest.raises(ValueError, match="dtype 'int8'"):
        save_directory(random_params(), assets, tmp_path / "out", "int8")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        save_directory(random_params(), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_fp16_are_refused(assets, tmp_path):
    params = random_params()
    params.decoder.norm[3] = 1e5
    with pytest.raises(ValueError, match=r"norm\.weight: values up to 100000 overflow float16"):
        save_directory(params, assets, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


# --- what does not fit --------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_together(copy):
    def spoil(tensors):
        del tensors["image_newline"], tensors["language_model.model.layers.1.mlp.up_proj.weight"]
        bias = tensors["multi_modal_projector.linear_1.bias"]
        return tensors | {"rm_head.weight": bias, "multi_modal_projector.linear_1.bias": bias[:-1].copy()}

    rewrite(copy, spoil)
    with pytest.raises(ValueError) as error:
        load(copy)
    for problem in (
        "missing: image_newline",
        "missing: language_model.model.layers.1.mlp.up_proj.weight",
        "surplus: rm_head.weight",
        "misshapen: multi_modal_projector.linear_1.bias is (31,), config.json makes it (32,)",
    ):
        assert problem in str(error.value)
    assert str(copy) in str(error.value)


def test_a_tensor_that_stands_twice_is_refused(copy):
    newline = load_file(copy / "model.safetensors")["image_newline"]
    save_file({"image_newline": newline}, copy / "more.safetensors")
    with pytest.raises(ValueError, match="image_newline also stands in"):
        load(copy)


def test_pickles_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin: pickle runs code and is refused"):
        load(copy)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_may_bring_its_unembedding_if_it_is_the_embedding(tied, tmp_path, equal):
    directory = Path(shutil.copytree(tied, tmp_path / "copy"))
    assert "language_model.lm_head.weight" not in load_file(directory / "model.safetensors")

    def duplicate(tensors):
        table = tensors["language_model.model.embed_tokens.weight"].copy()
        table[5, 7] += 0 if equal else 1
        return tensors | {"language_model.lm_head.weight": table}

    rewrite(directory, duplicate)
    if equal:
        assert_same(load(directory), random_params(TIED))
    else:
        with pytest.raises(ValueError, match="ties the embeddings, yet"):
            load(directory)


def test_a_tied_model_with_its_unembedding_alone_lacks_its_embedding(tied, tmp_path):
    directory = Path(shutil.copytree(tied, tmp_path / "copy"))
    names = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")

    def rename(tensors):
        return {names[1] if name == names[0] else name: value for name, value in tensors.items()}

    rewrite(directory, rename)
    with pytest.raises(ValueError, match="embed_tokens"):
        load(directory)


def decoder_of(tensors: dict[str, list[int]], **shape: int | bool) -> LlavaOnevisionConfig:
    vocab, embed = tensors["language_model.model.embed_tokens.weight"]
    return LlavaOnevisionConfig(decoder=Qwen2Config(vocab=vocab, embed=embed, **shape))


@pytest.mark.parametrize(
    ("listing", "shape"),
    [
        ("llava-hf-0.5b", {"layers": 24, "heads": 14, "kv_heads": 2, "head_dim": 64, "mlp": 4864}),
        ("llava-hf-7b", {}),
    ],
)
def test_the_released_models_fit_with_nothing_missing_or_surplus(listing, shape):
    file = SHARED / f"{listing}.json"
    if not file.exists():
        pytest.skip("the hub's key listings lie in the shared folder beside the repository, which is not here")
    tensors = json.loads(file.read_text())["tensors"]
    tied = "language_model.lm_head.weight" not in tensors
    config = decoder_of(tensors, tied=tied, **shape)
    source = SimpleNamespace(
        directory=listing,
        where={canonical(name): None for name in tensors},
        shape=lambda name: tuple(tensors[name]),
    )
    key_table.check(source, key_table.expected_tensors(declare(config), KEYS), lambda name: False)


# --- shards -------------------------------------------------------------------------------------------------------


def test_each_of_8_devices_holds_only_its_share(model):
    params = load(model, devices=8, fsdp=4, tensor=2)
    held = dict.fromkeys(jax.devices(), 0)
    for name, leaf in named_leaves(params):
        for shard in leaf.addressable_shards:
            assert shard.data.nbytes == math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4, name
            held[shard.device] += shard.data.nbytes
    whole = sum(leaf.nbytes for _, leaf in named_leaves(params))
    assert len(set(held.values())) == 1
    assert max(held.values()) < whole / 6  # matrices are split eight ways; vectors, few, four or two
    for leaf in (params.decoder.embedding, params.decoder.layers.gate_kernel, params.tower.blocks.query_kernel):
        assert leaf.addressable_shards[0].data.nbytes * 8 == leaf.nbytes
    assert_same(params, random_params())


# --- transformers -------------------------------------------------------------------------------------------------


def our_logps(params: LlavaOnevision, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    side, none = TINY.tower.image_size, np.zeros((1, 1), np.float32)
    rendered = Rendered(
        tiles=np.zeros((0, side, side, 3), np.uint8),
        prompt=prompt,
        tap_index=np.zeros((len(prompt), 4), np.int32),
        tap_weight=np.zeros((len(prompt), 4), np.float32),
        branches=(Branch(response, np.ones(len(response), np.float32)),),
    )
    entry = Entry(0, rendered, none, none, np.zeros(1, np.int32), np.zeros(1, np.float32))
    sizes = {"responses": 1, "tokens_per_tile": TINY.tokens_per_tile, "tile_size": side}
    batch = pack([entry], Bucket(1, 0, len(prompt), len(response)), Totals(1, 1, 1, 1), **sizes)
    return np.asarray(jax.jit(lambda params: response_logps(params, TINY, batch, Compute()).logp)(params))[0]


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ROUNDED)
def test_transformers_loads_an_export_and_agrees(model, tmp_path, monkeypatch, dtype):
    torch = pytest.importorskip("torch")
    mend_torchvision()
    from transformers import LlavaOnevisionForConditionalGeneration

    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 80_000)
    save_directory(load(model), model, tmp_path / "out", dtype)
    params = load(tmp_path / "out")
    theirs, report = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rng = np.random.default_rng(0)
    prompt, response = (rng.integers(0, 256, count).astype(np.int32) for count in (24, 8))
    token = torch.from_numpy(np.concatenate([prompt, response])[None]).long()
    with torch.no_grad():
        wanted = torch.log_softmax(theirs.eval()(input_ids=token).logits, -1)[0, len(prompt) - 1 : -1]
    wanted = wanted.gather(1, token[0, len(prompt) :, None])[:, 0].numpy()
    np.testing.assert_allclose(our_logps(params, prompt, response), wanted, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("which", ["model", "tied"])
def test_what_stands_beside_the_weights_loads_in_transformers(request, which):
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    mend_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig

    directory = request.getfixturevalue(which)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("a picture")["input_ids"]) == "a picture"
    processor = AutoProcessor.from_pretrained(directory)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(directory).eos_token_id
    loaded, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    embedding, unembedding = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert bool((embedding == unembedding).all()) == (which == "tied")

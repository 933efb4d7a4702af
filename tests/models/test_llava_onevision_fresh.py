"""A model directory made from nothing is read by us and by transformers alike."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny import TINY, write_tiny_directory
from torchvision_shim import mend_torchvision

from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig, read_config
from mmrlhf_jax.models.llava_onevision.fresh import hf_config, write_fresh_files
from mmrlhf_jax.models.llava_onevision.render import load_renderer

mend_torchvision()

TEXTS = ["the cat sat on the mat and the dog sat on the cat", "the picture shows the cat"] * 20


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        LlavaOnevisionConfig(),
        dataclasses.replace(TINY, max_tiles=4, pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.1, 0.2, 0.3)),
        dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, head_dim=16, tied=True, rope_theta=1e4)),
        dataclasses.replace(TINY, tower=dataclasses.replace(TINY.tower, layers=3, norm_eps=1e-5)),
    ],
)
def test_the_written_configuration_is_read_back(tmp_path, config):
    written = write_fresh_files(str(tmp_path), config)
    assert read_config(str(tmp_path)) == written
    kept = dataclasses.replace(written.decoder, vocab=config.decoder.vocab)
    assert (
        dataclasses.replace(written, decoder=kept, image_token=config.image_token, video_token=config.video_token)
        == config
    )


def test_merges_are_learned_from_texts_up_to_the_vocab(tmp_path):
    config = write_fresh_files(str(tmp_path), TINY, texts=TEXTS, vocab=290)
    tokenizer = load_renderer(str(tmp_path)).tokenizer
    assert len(tokenizer) == 290
    assert config.decoder.vocab == 320
    plain = tmp_path / "plain"
    write_tiny_directory(plain)
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(load_renderer(str(plain)).tokenizer(TEXTS[0])["input_ids"])
    assert tokenizer.decode(tokenizer("naïve 🙂 the cat")["input_ids"]) == "naïve 🙂 the cat"


def test_the_vocab_of_few_texts_is_what_they_allow(tmp_path):
    write_fresh_files(str(tmp_path), TINY, texts=["ab ab ab"], vocab=5000)
    assert 261 < len(load_renderer(str(tmp_path)).tokenizer) < 280


def test_a_vocab_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab is 100; bytes and special tokens alone are 261"):
        write_fresh_files(str(tmp_path), TINY, vocab=100)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("processor_config.json", {"resample": 2}, "resample = 2, supported: 3"),
        ("processor_config.json", {"image_grid_pinpoints": [[42, 42]]}, "image_grid_pinpoints"),
        ("processor_config.json", {"size": {"height": 336, "width": 336}}, "size"),
        ("processor_config.json", {"image_mean": None}, "image_mean is missing"),
        ("processor_config.json", None, "no image processor in processor_config.json"),
    ],
)
def test_a_processor_that_makes_other_pixels_is_refused(tmp_path, file, change, message):
    write_tiny_directory(tmp_path)
    document = json.loads((tmp_path / file).read_text())
    (tmp_path / file).unlink()
    if change is not None:
        document["image_processor"] = {k: v for k, v in (document["image_processor"] | change).items() if v is not None}
        (tmp_path / file).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        read_config(str(tmp_path))


def test_readers_older_than_transformers_5_find_the_rope_base():
    assert hf_config(TINY)["text_config"]["rope_theta"] == 1e6


@pytest.mark.parity
def test_transformers_builds_a_model_and_a_processor_from_it(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from transformers import AutoConfig, AutoProcessor, GenerationConfig, LlavaOnevisionForConditionalGeneration

    config = write_tiny_directory(tmp_path)
    model = LlavaOnevisionForConditionalGeneration(AutoConfig.from_pretrained(tmp_path))
    assert model.lm_head.weight.shape == (config.decoder.vocab, config.decoder.embed)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__ == "LlavaOnevisionProcessor"
    assert processor.num_image_tokens == config.tokens_per_tile
    assert processor.image_token_id == config.image_token
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id[0] == processor.tokenizer.eos_token_id

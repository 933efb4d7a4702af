"""A configuration is read exactly or refused: what this implementation does not serve is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TINY, write_tiny_directory

from mmrlhf_jax.models.llava_onevision.config import read_config


@pytest.fixture
def directory(tmp_path) -> Path:
    write_tiny_directory(tmp_path)
    return tmp_path


def edit(directory: Path, changes: dict, file: str = "config.json") -> None:
    """Sets {"text_config.hidden_act": value}; None removes the key."""
    raw = json.loads((directory / file).read_text())
    for name, value in changes.items():
        *parents, last = name.split(".")
        at = raw
        for parent in parents:
            at = at[parent]
        at.pop(last, None) if value is None else at.update({last: value})
    (directory / file).write_text(json.dumps(raw))


def test_what_is_written_is_what_is_read(directory):
    assert read_config(str(directory)) == TINY


UNSUPPORTED = [
    ("vision_feature_select_strategy", "default"),
    ("vision_feature_layer", -2),
    ("projector_hidden_act", "relu"),
    ("multimodal_projector_bias", False),
    ("text_config.hidden_act", "gelu"),
    ("text_config.use_sliding_window", True),
    ("vision_config.hidden_act", "gelu"),
    ("vision_aspect_ratio", "pad"),
    ("vision_aspect_ratio", "anyres_max_"),
]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_an_unsupported_setting_is_named(directory, name, value):
    edit(directory, {name: value})
    with pytest.raises(ValueError, match=rf"config\.json: {name} = {value!r}, supported: "):
        read_config(str(directory))


def test_scaled_rotary_embeddings_are_refused(directory):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    edit(directory, {"text_config.rope_parameters": scaled})
    with pytest.raises(ValueError, match="rope type = 'linear'"):
        read_config(str(directory))


def test_all_unsupported_settings_are_named_together(directory):
    edit(directory, {"projector_hidden_act": "relu", "text_config.hidden_act": "gelu"})
    with pytest.raises(ValueError, match=r"projector_hidden_act.*text_config\.hidden_act"):
        read_config(str(directory))


def test_canvases_that_are_no_whole_tiles_are_refused(directory):
    edit(directory, {"image_grid_pinpoints": [[42, 84], [42, 50]]})
    with pytest.raises(ValueError, match=r"image_grid_pinpoints \[\[42, 50\]\] are not multiples of the tile size 42"):
        read_config(str(directory))


def test_another_kind_of_model_is_refused(directory):
    edit(directory, {"model_type": "qwen2_vl"})
    with pytest.raises(ValueError, match="model_type is 'qwen2_vl'"):
        read_config(str(directory))


@pytest.mark.parametrize(
    ("name", "value"),
    [("resample", 2), ("rescale_factor", 0.5), ("size", {"height": 84, "width": 84}), ("image_mean", None)],
)
def test_pixels_prepared_in_another_way_are_refused(directory, name, value):
    edit(directory, {f"image_processor.{name}": value}, "processor_config.json")
    with pytest.raises(ValueError, match=rf"processor_config\.json: {name}"):
        read_config(str(directory))


def test_pixels_prepared_in_an_unknown_way_are_refused(directory):
    (directory / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="no image processor in"):
        read_config(str(directory))


def test_the_older_layout_of_the_hub_reads_the_same(directory):
    """Before transformers 5: rope_theta beside the sizes, the image processor in a file of its own."""
    processor = json.loads((directory / "processor_config.json").read_text()).pop("image_processor")
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    (directory / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaOnevisionProcessor"}))
    edit(directory, {"text_config.rope_parameters": None, "text_config.rope_theta": 1e6})
    assert read_config(str(directory)) == TINY


@pytest.mark.parametrize("text", [True, False, None])
@pytest.mark.parametrize("whole", [True, False, None])
def test_embeddings_are_tied_when_either_place_says_so(directory, whole, text):
    """As transformers does: releases write `false` for the whole above `true` for the text model."""
    edit(directory, {"tie_word_embeddings": whole, "text_config.tie_word_embeddings": text})
    assert read_config(str(directory)).decoder.tied == bool(whole or text)

"""Law 4 on gs:// paths: a model in a bucket is the model on the disk."""

from __future__ import annotations

from pathlib import Path

import fake_bucket
import jax
import numpy as np
import pytest
from etils import epath
from original_layout import write_original
from tiny import TINY, random_params, write_tiny_directory

from mmrlhf_jax.models import safetensors_files
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.models.llava_onevision.weights import RECORD, copy_assets, save_directory
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import load_model
from mmrlhf_jax.training.recipe import INFERENCE

REMOTE = "gs://bucket/models/tiny"


@pytest.fixture
def bucket(monkeypatch):
    return fake_bucket.install(monkeypatch)


@pytest.fixture
def assets(tmp_path) -> Path:
    write_tiny_directory(tmp_path / "assets")
    return tmp_path / "assets"


def assert_loads(model: str) -> None:
    loaded = load_model(model, make_mesh(MeshConfig(), jax.devices()[:1]), ShardingRules(), rates=INFERENCE)
    assert loaded.config == TINY
    for (name, have), (_, want) in zip(named_leaves(loaded.params), named_leaves(random_params()), strict=True):
        np.testing.assert_array_equal(have, want, err_msg=name)


def test_a_model_is_uploaded_whole_its_marker_last_and_loads_from_there(bucket, assets, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 80_000)
    save_directory(random_params(), assets, REMOTE, record={"weights": "x"})
    assert bucket.written[-2:] == ["config.json", RECORD]
    assert len([name for name in bucket.written if name.endswith(".safetensors")]) > 2
    local = tmp_path / "local"
    save_directory(random_params(), assets, local, record={"weights": "x"})
    for file in local.iterdir():
        assert (epath.Path(REMOTE) / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in epath.Path(REMOTE).iterdir()} == {file.name for file in local.iterdir()}
    assert_loads(REMOTE)
    assert load_renderer(REMOTE).fingerprint == load_renderer(str(local)).fingerprint


def test_a_model_of_the_original_code_loads_from_there(bucket, assets, tmp_path):
    save_directory(random_params(), assets, tmp_path / "model")
    for file in write_original(tmp_path / "model", tmp_path / "original").iterdir():
        (epath.Path(REMOTE) / file.name).write_bytes(file.read_bytes())
    assert_loads(REMOTE)
    assert load_renderer(REMOTE).config == TINY


def test_assets_come_down_and_go_up(bucket, assets, tmp_path):
    copy_assets(assets, REMOTE)
    copy_assets(REMOTE, tmp_path / "back")
    for file in assets.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_nothing_there_is_written_over(bucket, assets):
    save_directory(random_params(), assets, REMOTE)
    with pytest.raises(FileExistsError, match="exists already; name another --output"):
        save_directory(random_params(), assets, REMOTE)
    (epath.Path(REMOTE) / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"without config\.json: an upload that was cut off"):
        save_directory(random_params(), assets, REMOTE)


def test_a_directory_that_is_not_there_is_missed(bucket):
    with pytest.raises(FileNotFoundError, match=f"{REMOTE}: no config"):
        assert_loads(REMOTE)

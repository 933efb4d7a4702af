"""RUN directories as strangers, or dying disks, make them: found by tests/fuzz_models/run.py."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from fuzz_models.run_readers import DECLARED, POSITION, checkpoint_files, small_state
from fuzz_models.samples import mesh

from mmrlhf_jax.nn.sharding import ShardingRules
from mmrlhf_jax.training import manifest, model, setup
from mmrlhf_jax.training.best import best_step
from mmrlhf_jax.training.recipe import INFERENCE, CheckpointConfig
from mmrlhf_jax.training.run import Checkpoints, RunDirectory


def write_manifest(checkpoint: Path, files: Any, **changes: Any) -> None:
    document = {"bytes": 1, "seconds": 1.0, "files": files, **changes}
    (checkpoint / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "files",
    [{"a": 7}, {"a": "crc32"}, {"a": [1]}, {"a": [1, 2]}, {"a": ["1", "crc32:0"]}, {"a": [1, "crc32:0", 3]}, [], None,
     {"a": [True, "crc32:0"]}, {"a": [-1, "crc32:0"]}, {"\x1b[2J": [1, "crc32:0"]}, {"x" * 5000: [1, "crc32:0"]}],
)  # fmt: skip
def test_a_manifest_that_nobody_writes_is_none(tmp_path: Path, files: Any) -> None:
    write_manifest(tmp_path, files)
    assert manifest.damage(epath.Path(tmp_path)) is None
    assert manifest.written(epath.Path(tmp_path)) is None


@pytest.mark.parametrize("changes", [{"bytes": "1"}, {"seconds": None}, {"bytes": 10**400}])
def test_figures_that_are_none_are_no_manifest(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_manifest(tmp_path, {"a": [1, "crc32:00000000"]}, **changes)
    assert manifest.written(epath.Path(tmp_path)) is None


def test_a_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**36)
    write_manifest(tmp_path, {"large": [5, "crc32:00000000"]})
    assert manifest.damage(epath.Path(tmp_path)) == f"large has {2**36} bytes of 5"


@pytest.mark.parametrize("name", ["position/metadata", "manifest.json", "params/d/0"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / name)
    assert manifest.damage(epath.Path(tmp_path)) == f"'{name}' is not a plain file"


@pytest.mark.parametrize("name", ["position/metadata", "params/manifest.ocdbt", "params/array_metadatas/process_0"])
def test_metadata_are_bounded_before_they_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**36)
    assert "such a file has" in (manifest.damage(epath.Path(tmp_path)) or "")


def test_a_pipe_for_evaluations_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"evaluation.metric": "loss"}')
    os.mkfifo(tmp_path / "evaluation.jsonl")
    with pytest.raises(ValueError, match=r"evaluation\.jsonl: not a plain file"):
        best_step(RunDirectory.at(tmp_path), [1])


def test_targets_that_the_model_has_not_are_named_with_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`base` is any MODEL; here one of few parameters, as the fuzzer's."""
    for name, data in checkpoint_files(False).items():
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_bytes(data)
    for run in (tmp_path, tmp_path / "base"):
        (run / "recipe.json").write_text("{}")
    start = {"base": str(tmp_path / "base"), "lora": {"rank": 4, "alpha": 8.0, "targets": ["-rf"]}}
    (tmp_path / "start.json").write_text(json.dumps(start))
    (tmp_path / "base" / "start.json").write_text("{}")
    monkeypatch.setattr(model, "read_config", lambda _: None)
    monkeypatch.setattr(model, "declare", lambda _: DECLARED)
    with pytest.raises(ValueError, match=r"start\.json: lora target '-rf' matches no parameter"):
        model.load_model(str(tmp_path), mesh(), ShardingRules(), rates=INFERENCE)


def test_a_base_that_is_not_there_is_named_with_the_file_that_names_it(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "-rf"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: its base is not there: '-rf'"):
        model.load_model(str(tmp_path), mesh(), ShardingRules(), rates=INFERENCE)


def resume(directory: Path, **position: Any) -> None:
    state, shardings = small_state()
    run = RunDirectory.at(directory)
    checkpoints = Checkpoints(run.checkpoints, CheckpointConfig())
    try:
        setup.resume(run, checkpoints, state, shardings, {**POSITION, **position}, whole=True)
    finally:
        checkpoints.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, data in checkpoint_files(False).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_what_its_manifest_vouches_for_and_still_does_not_read_is_a_message(run: Path) -> None:
    """Not moved aside: by its manifest it is what was written."""
    torn = run / "checkpoints" / "2" / "params" / "manifest.ocdbt"
    torn.write_bytes(torn.read_bytes()[:40])
    (run / "checkpoints" / "2" / "manifest.json").unlink()
    manifest.seal(epath.Path(run / "checkpoints" / "2"), 0.5)
    with pytest.raises(ValueError, match=r"checkpoints/2 does not read, though its files are as they were written: "):
        resume(run)
    assert not (run / "damaged").exists()


@pytest.mark.parametrize(
    "text", ['{"metrics": [7]}', "[]", '{"commit_timestamp_nsecs": 1' + "0" * 40 + "}", "[" * 50_000 + "]" * 50_000]
)
@pytest.mark.parametrize(("step", "resumed"), [(1, 2), (2, 1)])
def test_own_metadata_that_are_none_cost_their_checkpoint_alone(
    run: Path, capsys: pytest.CaptureFixture[str], text: str, step: int, resumed: int
) -> None:
    """orbax would read those of all checkpoints before one is chosen."""
    (run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text(text)
    resume(run)
    assert f"resuming after step {resumed}" in capsys.readouterr().out
    assert (run / "damaged" / "2").exists() == (step == 2)


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
@pytest.mark.parametrize(("step", "resumed"), [(1, 2), (2, 1)])
def test_own_metadata_are_plain_and_small_before_they_are_read(
    run: Path, capsys: pytest.CaptureFixture[str], kind: str, step: int, resumed: int
) -> None:
    """A pipe was waited for without an end, and /dev/zero read until no memory was left."""
    file = run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as large:
            large.truncate(2**36)
    resume(run)
    told = capsys.readouterr().out
    assert f"resuming after step {resumed}" in told
    if step == 2:
        assert re.search(
            r"checkpoint 2 is damaged \('?_CHECKPOINT_METADATA'? (is not a plain file|has \d+ bytes)", told
        )


def test_a_checkpoint_of_other_data_is_named_with_its_run(run: Path) -> None:
    with pytest.raises(ValueError, match=rf"{run}/checkpoints: checkpoint 2 was made with another plan"):
        resume(run, plan="other")

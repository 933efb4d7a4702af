"""A RUN on gs://, as the hosts of a TPU pod need it: they share no disk."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file
from small_world import ROOT, run, run_hosts

from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.recipe import CheckpointConfig, EvaluationConfig, LogConfig, read_recipe
from mmrlhf_jax.training.run import Checkpoints, RunDirectory, read_lines
from mmrlhf_jax.training.train import train


def recipe(world, **changes):
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    fields = {
        "objective": DPO(),
        "model": world.model,
        "dataset": world.dataset,
        "reference": "online",
        "data": dataclasses.replace(tiny.data, max_steps=4, max_buckets=1, groups_per_step=4),
        "checkpoint": CheckpointConfig(every=2, keep=1),
        "evaluation": EvaluationConfig(every=2, share=0.4),
    }
    return dataclasses.replace(tiny, **{**fields, **changes})


def without_times(records):
    return [{n: v for n, v in r.items() if "second" not in n} for r in records]


def test_a_run_on_a_bucket_is_the_run_on_a_disk(small_world, gs, tmp_path, capsys):
    train(recipe(small_world), f"{gs}/run")
    train(recipe(small_world), f"{gs}/run")
    assert f"{gs}/run is complete already" in capsys.readouterr().out
    train(recipe(small_world), tmp_path / "run")
    there, here = RunDirectory.at(f"{gs}/run"), RunDirectory.at(tmp_path / "run")
    assert without_times(read_lines(there.metrics)) == without_times(read_lines(here.metrics))
    assert without_times(read_lines(there.evaluation)) == without_times(read_lines(here.evaluation))
    assert Checkpoints(there.checkpoints).steps() == Checkpoints(here.checkpoints).steps()
    run("export", f"{gs}/run", "--output", tmp_path / "there", "--dtype", "float32")
    run("export", tmp_path / "run", "--output", tmp_path / "here", "--dtype", "float32")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("there", "here"))
    for name, weight in ours.items():
        np.testing.assert_array_equal(theirs[name], weight, err_msg=name)


def test_a_run_on_a_bucket_goes_on_where_it_stopped(small_world, gs, tmp_path):
    train(recipe(small_world, evaluation=EvaluationConfig()), f"{gs}/run")
    run_directory = RunDirectory.at(f"{gs}/run")
    whole = read_lines(run_directory.metrics)
    run_directory.complete.unlink()
    (run_directory.checkpoints / "4").rmtree()
    run_directory.metrics.write_text("".join(json.dumps(record) + "\n" for record in whole[:3]))
    train(recipe(small_world, evaluation=EvaluationConfig(), checkpoint=CheckpointConfig(every=3)), f"{gs}/run")
    assert without_times(read_lines(run_directory.metrics)) == without_times(whole)


def test_tensorboard_says_that_it_writes_local_files(small_world, gs):
    with pytest.raises(ValueError, match=r"log.tensorboard writes local files, gs://.* use log.wandb or metrics.jsonl"):
        train(recipe(small_world, log=LogConfig(tensorboard=True)), f"{gs}/run")


@pytest.mark.slow
def test_two_hosts_that_share_only_a_bucket_make_one_run(small_world, gs, tmp_path, monkeypatch):
    """Data, run and checkpoints on gs://, a cache of its own for each run of the test."""
    data = epath.Path(gs) / "data"
    data.mkdir(parents=True)
    for file in epath.Path(small_world.dataset).iterdir():
        if not file.is_dir():
            (data / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("MMRLHF_CACHE", str(tmp_path / "cache"))
    arguments = (
        "train", ROOT / "configs" / "tiny.py", "--model", small_world.model, "--dataset", data, "--output",
        f"{gs}/run", "--reference", "online", "--data.max-steps", 4, "--data.max-buckets", 1, "--checkpoint.every", 2,
    )  # fmt: skip
    printed = run_hosts(*arguments, "--mesh.data", 2, processes=2, devices=1)
    assert f"done: 4 steps, checkpoint {gs}/run/checkpoints/4" in printed[0]
    there = RunDirectory.at(f"{gs}/run")
    assert [record["step"] for record in read_lines(there.metrics)] == [1, 2, 3, 4]
    assert Checkpoints(there.checkpoints).steps() == [2, 4]
    shutil.rmtree(tmp_path / "cache")

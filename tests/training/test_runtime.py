"""What helps when a run is watched or fails: traces, a message for a full device, trackers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from small_world import ROOT, metrics, run

from mmrlhf_jax.command import CommandError, UsageError
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh
from mmrlhf_jax.objectives import DPO, Supervised
from mmrlhf_jax.training.planning import memory_advice
from mmrlhf_jax.training.recipe import (
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    LoraConfig,
    Recipe,
    read_recipe,
)
from mmrlhf_jax.training.runtime import explain_memory, parse_profile
from mmrlhf_jax.training.train import train


def recipe(world, **changes):
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    data = dataclasses.replace(tiny.data, max_steps=3, max_buckets=1, responses="best")
    fields = {"objective": Supervised(), "model": world.model, "dataset": world.dataset, "data": data}
    return dataclasses.replace(tiny, **{**fields, **changes})


def test_a_trace_of_the_steps_asked_for_is_kept_with_the_run(small_world, tmp_path):
    arguments = ("train", ROOT / "configs" / "tiny.py", "--model", small_world.model, "--dataset", small_world.dataset)
    run(*arguments, "--reference", "online", "--data.max-steps", 3, "--data.max-buckets", 1, "--output",
        tmp_path / "run", "--profile", "2:3")  # fmt: skip
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert b"qwen2" in trace.read_bytes()  # named scopes of the model


@pytest.mark.parametrize("text", ["3", "3:2", "0:1", "a:b", ":2"])
def test_a_profile_that_names_no_steps_is_bad_usage(text):
    with pytest.raises(UsageError, match="write START:STOP"):
        parse_profile(text)


def test_a_device_that_runs_out_of_memory_is_explained():
    """A real failure of XLA's, not a made-up one."""
    too_much = jax.jit(lambda: jnp.zeros(2**46, jnp.float32))
    with pytest.raises(CommandError, match=r"bucket 3 did not fit\n  \(RESOURCE_EXHAUSTED"):  # noqa: SIM117
        with explain_memory(lambda: "bucket 3 did not fit"):
            too_much().block_until_ready()


def test_other_errors_of_the_device_are_left_as_they_are():
    with pytest.raises(ValueError, match="mine"), explain_memory(lambda: "no"):
        raise ValueError("mine")


def test_the_advice_names_bucket_micro_batch_and_the_next_rung():
    mesh = make_mesh(MeshConfig(fsdp=8))
    bucket = Bucket(32, 10, 3072, 768)
    text = memory_advice(
        Recipe(objective=DPO(), compute=ComputeConfig(remat="projections"), data=DataConfig(slots_per_device=8192),
               reference="online"),
        7, bucket, mesh,
    )  # fmt: skip
    assert "step 7, bucket 32 x (10 tiles, 3072 + 768 tokens), 4 groups on each of 8 parts" in text
    assert "--compute.remat attention" in text
    assert "--data.slots-per-device 4096 halves the 4 groups" in text
    assert "--reference stored" in text
    least = Recipe(objective=DPO(), compute=ComputeConfig(remat="full"), lora=LoraConfig(rank=4))
    text = memory_advice(least, 7, Bucket(8, 10, 3072, 768), mesh)
    assert "--compute.remat" not in text
    assert "--data.slots-per-device" not in text
    assert "more devices" in text


def test_the_resolved_recipe_is_saved_with_the_run(small_world, tmp_path):
    train(recipe(small_world), tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert saved["objective"] == "Supervised"
    assert saved["data.max_steps"] == 3
    assert saved["optimizer.rates.tower"] == 0.0
    assert saved["lora.rank"] == 0


@pytest.mark.parity
def test_weights_and_biases_gets_what_the_files_get(small_world, tmp_path, monkeypatch):
    """Offline, which writes what would be sent; the run keeps its identity for a resumption."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    watched = recipe(small_world, log=LogConfig(wandb="mmrlhf-test"), evaluation=EvaluationConfig(every=2, share=0.4))
    train(watched, tmp_path / "run")
    identity = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    (sent,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/*.wandb")
    content = sent.read_bytes()
    for name in (b"learning_rate", b"eval/loss", b"groups_per_second", b"optimizer.rates.tower"):
        assert name in content
    assert len(metrics(tmp_path / "run")) == 3


def test_weights_and_biases_missing_names_its_extra(small_world, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log\.wandb needs the `wandb` extra"):
        train(recipe(small_world, log=LogConfig(wandb="p")), tmp_path / "run")

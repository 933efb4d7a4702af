"""Law 5, reward models: 1 device == 8 == 2 hosts, in training and in scoring, with critiques generated or given."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from small_world import ROOT, make_small_world, metrics, run, start_hosts, wait_for_hosts
from tiny_reward import write_reward_model

from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.rewards import read_rewards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_small_world(tmp_path_factory.mktemp("reward-devices"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_reward_model(tmp_path_factory.mktemp("reward-devices-model") / "judge")


def train(world, output, *mesh, devices):
    run(
        "train", ROOT / "configs" / "tiny_reward.py", "--model", world.model, "--dataset", world.dataset,
        "--output", output, "--data.max-steps", 3, "--data.groups-per-step", 6, "--optimizer.learning-rate", 1e-3,
        *mesh, devices=devices,
    )  # fmt: skip
    return metrics(output)


def test_training_on_eight_devices_is_training_on_one(world, tmp_path):
    one = train(world, tmp_path / "one", devices=1)
    eight = train(world, tmp_path / "eight", "--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2, devices=8)
    for here, there in zip(one, eight, strict=True):
        assert sorted(here["rows"]) == sorted(there["rows"])
        for name in ("loss", "loss/critique", "loss/bradley_terry", "loss/tie", "rewards/margins", "grad_norm"):
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-6), name


def arguments(dataset, judge, critiques):
    sampling = ("--temperature", 1.0, "--samples", 2, "--max-new-tokens", 12) if critiques == "generated" else ()
    return (
        "--dataset", dataset, "--model", judge, "--with", "reward", "--critiques", critiques, "--dtype", "float32",
        *sampling,
    )  # fmt: skip


def rewards(dataset):
    (store,) = find(dataset, "reward")
    return read_rewards(store, open_dataset(dataset))


def copy(world, path):
    shutil.copytree(world.dataset, path, ignore=shutil.ignore_patterns("annotations"))
    return str(path)


@pytest.mark.parametrize("critiques", ["generated", "human"])
def test_scoring_on_devices_and_hosts_is_scoring_on_one(world, judge, tmp_path, critiques):
    one, eight, hosts = (copy(world, tmp_path / name) for name in ("one", "eight", "hosts"))
    run("annotate", *arguments(one, judge, critiques))
    mesh = ("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2)
    run("annotate", *arguments(eight, judge, critiques), *mesh, devices=8)
    # hosts share `data` only: see the README on collectives of several processes on CPUs
    started = start_hosts("annotate", *arguments(hosts, judge, critiques), "--mesh.data", 2, processes=2, devices=1)
    assert wait_for_hosts(started) == [0, 0], [host.printed() for host in started]
    wanted = rewards(one)
    assert len(wanted) == world.groups
    for path in (eight, hosts):
        found = rewards(path)
        assert found.keys() == wanted.keys()
        for row, reward in wanted.items():
            assert found[row].critiques == reward.critiques
            np.testing.assert_allclose(found[row].scores, reward.scores, rtol=0, atol=1e-4)

"""Every objective of the registry in the built-in world, through launch/train.py's own path: a recipe, a prepared
dataset, a run directory, a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from board_world import make_board_world
from etils import epath
from small_world import ROOT, metrics

from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.objectives import (
    OBJECTIVES,
    AttributeObjective,
    CritiqueReward,
    QuantileReward,
    RewardObjective,
)
from mmrlhf_jax.training.model import load_model
from mmrlhf_jax.training.recipe import (
    INFERENCE,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    Recipe,
    RewardConfig,
)
from mmrlhf_jax.training.run import Checkpoints
from mmrlhf_jax.training.step import initial_averages
from mmrlhf_jax.training.train import train

STEPS = 3
ATTRIBUTES = ("correctness", "completeness", "brevity")
TEMPLATE = str(ROOT / "configs" / "quickstart" / "critique_template.txt")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("sklearn")
    return make_board_world(tmp_path_factory.mktemp("every-objective"))


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def start(world):
    return params_of(world.model)


def params_of(model):
    loaded = load_model(model, one_device(), ShardingRules(), rates=INFERENCE, dtype="float32")
    return {name: np.asarray(leaf) for name, leaf in named_leaves(loaded.params)}


def reward_of(objective) -> RewardConfig:
    if isinstance(objective, AttributeObjective):
        return RewardConfig(attributes=ATTRIBUTES, quantiles=5 if isinstance(objective, QuantileReward) else 0)
    return RewardConfig(template=TEMPLATE) if isinstance(objective, CritiqueReward) else RewardConfig()


def recipe(world, name) -> Recipe:
    objective = OBJECTIVES[name]()
    return Recipe(
        objective=objective,
        model=world.model,
        dataset=world.dataset,
        reference="online" if objective.needs_reference else "stored",
        reward=reward_of(objective),
        data=DataConfig(groups_per_step=4, max_steps=STEPS, max_buckets=1, multiple=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.0, schedule="constant"),
        compute=ComputeConfig(dtype="float32"),
        checkpoint=CheckpointConfig(every=STEPS, keep=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_on_boards(world, start, name, tmp_path):
    train(recipe(world, name), tmp_path / "run")
    steps = metrics(tmp_path / "run")
    assert len(steps) == STEPS
    for step in steps:
        assert all(math.isfinite(value) for value in step.values() if isinstance(value, float)), step
        assert step["grad_norm"] > 0
    end = params_of(str(tmp_path / "run"))
    heads = {leaf for leaf in end if leaf.startswith("head.")}
    assert bool(heads) == isinstance(OBJECTIVES[name](), RewardObjective)
    assert end.keys() - heads == start.keys()
    moved = {leaf for leaf in start if not np.array_equal(end[leaf], start[leaf])}
    assert {leaf for leaf in start if leaf.startswith("decoder.layers") and leaf.endswith("kernel")} <= moved
    assert not {leaf for leaf in moved if leaf.startswith("tower.")}  # which has no rate


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beta_dpo", "min_avgout"])
def test_what_an_objective_keeps_over_steps_is_resumed_with_the_run(world, name, tmp_path):
    """A run that lost its last checkpoint does the steps since again, to the bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = recipe(world, name)
    asked = dataclasses.replace(asked, checkpoint=CheckpointConfig(every=1, keep=STEPS))
    train(asked, whole)
    shutil.copytree(whole, cut)
    (cut / "complete.json").unlink()
    for step in range(2, STEPS + 1):
        shutil.rmtree(cut / "checkpoints" / str(step))
    train(asked, cut)
    kept = [averages_of(run, STEPS) for run in (whole, cut)]
    assert kept[0].keys() == initial_averages(asked.objective, 5).keys()
    for key, value in kept[0].items():
        np.testing.assert_array_equal(value, kept[1][key], err_msg=key)
        assert not np.array_equal(value, averages_of(whole, 1)[key])  # they do move
    one, other = params_of(str(whole)), params_of(str(cut))
    for leaf, value in one.items():
        np.testing.assert_array_equal(value, other[leaf], err_msg=leaf)
    assert [step["loss"] for step in metrics(whole)] == [step["loss"] for step in metrics(cut)]


def averages_of(run, step):
    checkpoints = Checkpoints(epath.Path(run / "checkpoints"))
    found = checkpoints.manager.restore(step, args=ocp.args.Composite(averages=ocp.args.StandardRestore()))["averages"]
    checkpoints.close()
    return {name: np.asarray(value) for name, value in found.items()}

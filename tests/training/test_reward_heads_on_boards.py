"""Reward models of attributes, of quantiles and with facts, in the built-in world: trained, stored beside the data, and
exported, by the programs a user runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from board_world import make_board_world
from small_world import make_small_world, metrics, run

from mmrlhf_jax.data.annotations import AnnotationError, find
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.rewards import content_of, read_rewards
from mmrlhf_jax.models.critique_reward.config import read_settings
from mmrlhf_jax.objectives import MultiObjectiveReward, QuantileReward, ScalarReward
from mmrlhf_jax.training.recipe import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    Recipe,
    RewardConfig,
)
from mmrlhf_jax.training.train import train

pytestmark = pytest.mark.slow
ATTRIBUTES = ("correctness", "completeness", "brevity")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("sklearn")
    return make_board_world(tmp_path_factory.mktemp("reward-heads"))


def recipe(world, objective, reward, steps):
    return Recipe(
        objective=objective,
        model=world.model,
        dataset=world.dataset,
        reward=reward,
        data=DataConfig(groups_per_step=world.groups, max_steps=steps, max_buckets=1, multiple=16),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0, schedule="constant"),
        compute=ComputeConfig(dtype="float32"),
        checkpoint=CheckpointConfig(every=steps, keep=1),
    )


def annotate(world, model, *more):
    return run("annotate", "--dataset", world.dataset, "--model", model, "--with", "reward", "--dtype", "float32",
               "--multiple", 16, *more)  # fmt: skip


def scores(world, chosen):
    store = next(store for store in find(world.dataset, "reward") if chosen(store.key))
    found = read_rewards(store, open_dataset(world.dataset))
    return np.concatenate([found[row].score for row in sorted(found)])


def ratings(world, name):
    responses = [response for group in open_dataset(world.dataset).groups() for response in group.responses]
    return np.array([dict(response.ratings).get(name, np.nan) for response in responses])


def test_attributes_are_learned_and_read_in_any_direction(world, tmp_path, capsys):
    output = tmp_path / "run"
    train(recipe(world, MultiObjectiveReward(), RewardConfig(attributes=ATTRIBUTES), 60), output)
    said = capsys.readouterr().out
    assert f"correctness {(~np.isnan(ratings(world, 'correctness'))).sum()}" in said
    assert f"completeness {(~np.isnan(ratings(world, 'completeness'))).sum()}" in said
    first, last = metrics(output)[0], metrics(output)[-1]
    assert last["loss/squares"] < 0.5 * first["loss/squares"]
    for name in ("correctness", "brevity"):
        annotate(world, output, "--direction", name, 1)
        weights = [float(each == name) for each in ATTRIBUTES]
        found = scores(world, lambda key, weights=weights: key.get("reading", {}).get("direction") == weights)
        assert np.corrcoef(found, ratings(world, name))[0, 1] > 0.5, name
    run("export", output, "--output", tmp_path / "exported", "--dtype", "float32")
    settings = read_settings(tmp_path / "exported")
    assert settings is not None
    assert (settings.attributes, settings.quantiles, settings.critique) == (ATTRIBUTES, 0, False)
    assert "done already" in annotate(world, tmp_path / "exported", "--direction", "brevity", 1)


def test_quantiles_are_learned_and_read_by_their_risk(world, tmp_path):
    output = tmp_path / "run"
    train(recipe(world, QuantileReward(), RewardConfig(attributes=ATTRIBUTES, quantiles=5), 60), output)
    first, last = metrics(output)[0], metrics(output)[-1]
    assert last["loss/pinball"] < 0.7 * first["loss/pinball"]
    annotate(world, output, "--risk", "cvar", "--alpha", 0.2)
    annotate(world, output, "--risk", "entropic", "--aversion", 3)
    annotate(world, output)
    worst, averse, mean = (
        scores(world, lambda key, risk=risk: len(key.get("reading", {}).get("direction", ())) == 3
               and key["reading"]["risk"] == risk and key["reading"]["direction"][0] == 1 / 3)
        for risk in ("cvar", "entropic", "mean")
    )  # fmt: skip
    assert (worst < averse).all()
    assert (averse < mean).all()


def test_facts_are_shown_in_training_and_scoring_alike(world, tmp_path, capsys):
    output = tmp_path / "run"
    train(recipe(world, ScalarReward(), RewardConfig(facts=True), 2), output)
    assert f"facts of {world.groups} groups are shown to the reward model" in capsys.readouterr().out
    settings = read_settings(output / "model")
    assert settings is not None
    assert settings.facts
    assert f"{world.groups} groups scored" in annotate(world, output)
    store = next(store for store in find(world.dataset, "reward") if store.key.get("facts"))
    dataset = open_dataset(world.dataset)
    assert len(read_rewards(store, dataset)) == world.groups
    with pytest.raises(AnnotationError, match="computed for other content"):
        store.read(dataset, lambda group: content_of(dataclasses.replace(group, facts=("Nothing.",)), "none", True))


def test_groups_without_facts_are_refused_and_counted_before_any_work(world, tmp_path):
    bare = make_small_world(tmp_path / "bare", groups=4)
    asked = recipe(world, ScalarReward(), RewardConfig(facts=True), 2)
    with pytest.raises(ValueError, match=r"4 of 4 groups have no facts \(.*--map facts=FIELD"):
        train(dataclasses.replace(asked, model=bare.model, dataset=bare.dataset), tmp_path / "run")
    train(asked, tmp_path / "judge")
    with pytest.raises(AssertionError, match="4 of 4 groups have no facts"):
        run("annotate", "--dataset", bare.dataset, "--model", tmp_path / "judge", "--with", "reward")


def test_ratings_that_the_data_lacks_are_named(world, tmp_path):
    asked = recipe(world, MultiObjectiveReward(), RewardConfig(attributes=("correctness", "kindness")), 2)
    with pytest.raises(ValueError, match="is rated in kindness; they are rated in brevity, completeness, correctness"):
        train(asked, tmp_path / "run")

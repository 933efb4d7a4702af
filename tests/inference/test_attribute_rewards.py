"""Reward models of attributes and quantiles: their layout, and how one score is read from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_world import make_small_world, run
from tiny import TINY
from tiny_reward import write_reward_model

from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.rewards import read_rewards
from mmrlhf_jax.groups import Group, Origin, Response, Turn
from mmrlhf_jax.inference.reading import HeadReading, ReadingConfig, key_of, reading_of, weights_of
from mmrlhf_jax.inference.reward import RewardModel, Scoring, score_attributes, score_groups
from mmrlhf_jax.models import families
from mmrlhf_jax.models.critique_reward.config import RewardSettings, read_settings
from mmrlhf_jax.models.critique_reward.render import load_reward_renderer, settings_for_training
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.objectives import CritiqueReward, MultiObjectiveReward, QuantileReward, ScalarReward
from mmrlhf_jax.objectives.reward_heads import conditional_value_at_risk, exponential_utility
from mmrlhf_jax.training.model import load_model, model_fingerprint
from mmrlhf_jax.training.recipe import INFERENCE, DataConfig, Recipe, RewardConfig, differences, flatten

NAMES = ("correct", "brief")
SETTINGS = {
    "attributes": RewardSettings("linear", critique=False, attributes=NAMES),
    "quantiles": RewardSettings("tanh", critique=False, attributes=NAMES, quantiles=5),
}


def judge(directory) -> RewardModel:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = load_model(str(directory), mesh, ShardingRules(), rates=INFERENCE, dtype="float32")
    return RewardModel(model, load_reward_renderer(str(model.assets)), mesh, Compute())


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    return {name: judge(write_reward_model(folder / name, settings)) for name, settings in SETTINGS.items()}


def groups():
    def group(*answers):
        responses = tuple(Response(text, rank) for rank, text in enumerate(answers))
        return Group(answers[0], (Turn("user", "How many cats?"),), (), responses, (), (Origin("made.jsonl", 1),))

    return [group("Two cats.", "Two dogs and a lamp.", "None."), group("One.", "A cat, I think.")]


def config_of(name):
    settings = SETTINGS[name]
    return families.reward_config(TINY, settings.head, settings.attributes, settings.quantiles)


# --- directions and risks --------------------------------------------------------------------------------------------


def test_a_direction_weighs_attributes(judges):
    scorer = judges["attributes"]
    attributes = score_attributes(groups(), scorer, Scoring())
    assert [each.shape for each in attributes] == [(3, 2), (2, 2)]
    assert min(np.ptp(each, axis=0).min() for each in attributes) > 1e-3  # answers differ in both
    for direction, weights in (
        ((), (0.5, 0.5)),
        ((("brief", -0.25), ("correct", 2.0)), (2.0, -0.25)),
        ((("brief", 1.0),), (0.0, 1.0)),
    ):
        found = score_groups(groups(), scorer, Scoring(reading=ReadingConfig(direction)))
        for reward, each in zip(found, attributes, strict=True):
            np.testing.assert_allclose(reward.score, each @ np.array(weights), rtol=1e-5, atol=1e-6)


def test_a_measure_of_risk_is_taken_of_the_reward_in_a_direction(judges):
    scorer, rng = judges["quantiles"], np.random.default_rng(0)
    hidden, head = rng.normal(size=(7, TINY.decoder.embed)).astype(np.float32), scorer.model.params.head
    inner = np.tanh(hidden @ np.asarray(head.dense_kernel) + np.asarray(head.dense_bias))
    output = (inner @ np.asarray(head.out_kernel) + np.asarray(head.out_bias)).reshape(7, 2, 5)
    mixed = np.sort(np.einsum("a,naq->nq", [0.5, 1.5], output), axis=-1)
    direction = (("correct", 0.5), ("brief", 1.5))
    for reading, expected in (
        (ReadingConfig(direction), mixed.mean(-1)),
        (ReadingConfig(direction, "cvar", alpha=0.4), mixed[:, :2].mean(-1)),
        (ReadingConfig(direction, "entropic", aversion=2.0), -np.log(np.exp(-2 * mixed).mean(-1)) / 2),
    ):
        read = HeadReading(scorer.model.config, reading)
        np.testing.assert_allclose(read(scorer.model.params, hidden), expected, rtol=1e-5, atol=1e-5)
    alone = HeadReading(scorer.model.config, ReadingConfig(risk="cvar", alpha=0.3))
    np.testing.assert_allclose(
        alone.attributes(scorer.model.params, hidden), conditional_value_at_risk(output, 0.3), rtol=1e-5, atol=1e-5
    )
    averse = HeadReading(scorer.model.config, ReadingConfig(risk="entropic", aversion=1.0))
    np.testing.assert_allclose(
        averse.attributes(scorer.model.params, hidden), exponential_utility(output, 1.0), rtol=1e-5, atol=1e-5
    )


def test_what_a_reading_would_not_use_is_refused(judges):
    for make, message in (
        (lambda: ReadingConfig(alpha=0.2), "--risk mean reads no --alpha"),
        (lambda: ReadingConfig(risk="cvar"), "--risk cvar needs --alpha"),
        (lambda: ReadingConfig(risk="cvar", alpha=0.2, aversion=1.0), "--risk cvar reads no --aversion"),
        (lambda: ReadingConfig(risk="cvar", alpha=1.5), r"a share in \(0, 1\], got 1.5"),
        (lambda: ReadingConfig(risk="entropic", aversion=-1.0), "--aversion must be positive"),
        (lambda: ReadingConfig((("a", 1.0), ("a", 2.0))), "names an attribute twice: a a"),
        (lambda: ReadingConfig((("a", 0.0),)), "nothing would be read"),
        (lambda: ReadingConfig((("a", float("nan")),)), "not finite"),
        (lambda: reading_of(TINY, ReadingConfig((("a", 1.0),))), "this one has a score"),
        (lambda: reading_of(config_of("attributes"), ReadingConfig((("kind", 1.0),))), "no attribute kind; .* correct"),
        (lambda: reading_of(config_of("attributes"), ReadingConfig(risk="cvar", alpha=0.2)), "of a distribution"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="leave it out where each is asked for"):
        score_attributes(groups(), judges["attributes"], Scoring(reading=ReadingConfig((("brief", 1.0),))))


def test_stored_scores_know_how_they_were_read():
    def key(*direction):
        return key_of(reading_of(config_of("attributes"), ReadingConfig(direction)))

    assert key(("correct", 0.5), ("brief", 0.5)) == key()
    assert key(("brief", 1.0)) == key(("correct", 0.0), ("brief", 1.0)) != key()
    assert weights_of(config_of("attributes"), ReadingConfig((("brief", 2.0),))) == (0.0, 2.0)
    assert key_of(reading_of(families.reward_config(TINY, "tanh"), ReadingConfig())) == {}


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wide_head_comes_back_as_it_was_saved(tmp_path, name):
    first = write_reward_model(tmp_path / "first", SETTINGS[name])
    run("export", first, "--output", tmp_path / "second", "--dtype", "float32")
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "second" / "model.safetensors").read_bytes()
    assert read_settings(tmp_path / "second") == SETTINGS[name]
    assert judge(tmp_path / "second").model.config == config_of(name)
    weight = load_file(tmp_path / "second" / "model.safetensors")
    rows = {key: len(tensor) for key, tensor in weight.items() if key.startswith("rm_head.") and tensor.ndim == 2}
    tanh = {"rm_head.dense.weight": 32, "rm_head.out_proj.weight": 10}
    assert rows == ({"rm_head.weight": 2} if name == "attributes" else tanh)


def test_a_model_of_one_score_is_named_and_described_as_before(tmp_path):
    RewardSettings("linear", False).write(tmp_path)
    assert json.loads((tmp_path / "reward.json").read_text()).keys() == {"head", "critique", "template", "system"}
    weights = {"kernel": jnp.ones(2)}
    wide, plain = (model_fingerprint(families.reward_config(TINY, "linear", names), weights) for names in (NAMES, ()))
    shape = {**dataclasses.asdict(TINY), "head": "linear"}  # all that there was to name
    described = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
    assert wide != plain
    assert plain.endswith(f"-{described}")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"attributes": "correct"}, "attributes is a list of names"),
        ({"attributes": [1]}, "attributes is a list of names"),
        ({"attributes": ["a", "a"], "critique": False}, "names, each once"),
        ({"attributes": ["a"], "critique": False, "quantiles": True}, "quantiles a whole number"),
        ({"attributes": ["a"], "critique": False, "quantiles": 1}, "1 quantiles: at least 2"),
        ({"critique": False, "quantiles": 9}, "of attributes that are named"),
        ({"attributes": ["a"], "critique": False, "quantiles": 10**9}, "are over 4096"),
        ({"attributes": ["a"]}, "it has no critique"),
    ],
)
def test_outputs_that_make_no_sense_are_named(tmp_path, raw, message):
    (tmp_path / "reward.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as error:
        read_settings(tmp_path)
    assert "reward.json" in str(error.value)


def test_training_on_asks_for_the_same_outputs(tmp_path):
    SETTINGS["quantiles"].write(tmp_path)
    same = settings_for_training(tmp_path, "tanh", False, "", attributes=NAMES, quantiles=5)
    assert same == SETTINGS["quantiles"]
    with pytest.raises(ValueError, match=r"its quantiles are 5, the recipe asks for 9: set reward\.quantiles"):
        settings_for_training(tmp_path, "tanh", False, "", attributes=NAMES, quantiles=9)
    with pytest.raises(ValueError, match=r"its attributes are \('correct', 'brief'\), the recipe asks for \(\)"):
        settings_for_training(tmp_path, "tanh", False, "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": ScalarReward(), "reward": RewardConfig(attributes=NAMES)}, "outputs that ScalarReward does not"),
        ({"objective": CritiqueReward(), "reward": RewardConfig(quantiles=3)}, "outputs that CritiqueReward does not"),
        ({"objective": MultiObjectiveReward()}, "name them in reward.attributes"),
        (
            {"objective": MultiObjectiveReward(), "reward": RewardConfig(attributes=NAMES, quantiles=3)},
            "quantiles is 3; of MultiObjectiveReward it is 0",
        ),
        ({"objective": QuantileReward(), "reward": RewardConfig(attributes=NAMES)}, "is 0; of QuantileReward it is"),
        (
            {"objective": QuantileReward(), "reward": RewardConfig(attributes=("a", "a"), quantiles=3)},
            "names, each once",
        ),
        (
            {
                "objective": MultiObjectiveReward(),
                "reward": RewardConfig(attributes=NAMES),
                "data": DataConfig(mean="groups"),
            },
            "which MultiObjectiveReward without bradley_terry does not",
        ),
    ],
)
def test_a_recipe_whose_outputs_its_objective_does_not_train_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_a_run_of_attributes_may_go_on_and_another_one_may_not():
    asked = Recipe(objective=MultiObjectiveReward(), reward=RewardConfig(attributes=NAMES))
    saved = {name: value for name, value in flatten(asked).items() if name != "reward.facts"}  # before there were any
    assert differences(saved, asked) == []
    other = Recipe(objective=MultiObjectiveReward(), reward=RewardConfig(attributes=NAMES[:1], facts=True))
    assert differences(saved, other) == [
        "reward.attributes: was ['correct', 'brief'], now ['correct']",
        "reward.facts: was False, now True",
    ]


# --- the programs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_in_two_directions_lie_in_two_stores(tmp_path):
    world = make_small_world(tmp_path)
    model = write_reward_model(tmp_path / "judge", SETTINGS["quantiles"])
    arguments = ("--dataset", world.dataset, "--model", model, "--with", "reward", "--dtype", "float32")
    run("annotate", *arguments, "--direction", "correct", 1)
    assert "done already" in run("annotate", *arguments, "--direction", "correct", 1.0, "brief", 0)
    run("annotate", *arguments, "--direction", "correct", 1, "--risk", "cvar", "--alpha", 0.2)
    stores = find(world.dataset, "reward")
    assert sorted(store.key["reading"]["risk"] for store in stores) == ["cvar", "mean"]
    mean, worst = (
        read_rewards(next(s for s in stores if s.key["reading"]["risk"] == risk), open_dataset(world.dataset))
        for risk in ("mean", "cvar")
    )
    assert all((worst[row].scores < mean[row].scores).all() for row in mean)
    with pytest.raises(AssertionError, match="no attribute kind; the model has correct, brief"):
        run("annotate", *arguments, "--direction", "kind", 1)

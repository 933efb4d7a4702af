"""A critique reward model from a policy, its scores beside the data, and MM-DPO on the margins they make."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_world import ROOT, metrics, run
from tiny import TINY

from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.rewards import read_rewards
from mmrlhf_jax.models.critique_reward.config import read_settings, read_template
from mmrlhf_jax.models.critique_reward.render import RewardRenderer, without_critiques
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.nn import lora
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import BatchShare, MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.objectives import DPO, MMDPO, ScalarReward
from mmrlhf_jax.training.data import measure_data, plan_data
from mmrlhf_jax.training.model import load_adapters, load_model
from mmrlhf_jax.training.recipe import INFERENCE, LoraConfig, RewardConfig, read_recipe
from mmrlhf_jax.training.run import Checkpoints
from mmrlhf_jax.training.train import train

STEPS = 6


def recipe(world, **changes):
    tiny = read_recipe(ROOT / "configs" / "tiny_reward.py")
    fields = {
        "model": world.model,
        "dataset": world.dataset,
        "data": dataclasses.replace(tiny.data, max_steps=STEPS, max_buckets=1, groups_per_step=12),
        "optimizer": dataclasses.replace(tiny.optimizer, learning_rate=1e-2, warmup=0.0, schedule="constant"),
    }
    return dataclasses.replace(tiny, **{**fields, **changes})


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world of its own: rewards are stored beside its dataset."""
    from small_world import make_small_world

    return make_small_world(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def judge(world):
    output = world.directory / "judge"
    train(recipe(world), output)
    return output


@pytest.fixture(scope="module")
def store(world, judge):
    said = run("annotate", "--dataset", world.dataset, "--model", judge, "--with", "reward", "--critiques", "human",
               "--dtype", "float32")  # fmt: skip
    assert "12 groups scored" in said
    (found,) = find(world.dataset, "reward")
    return found


def test_critiques_and_scores_are_learned_together(judge):
    first, last = metrics(judge)[0], metrics(judge)[-1]
    assert first["loss/bradley_terry"] == pytest.approx(np.log(2), abs=0.5)
    for name in ("loss", "loss/critique", "loss/bradley_terry"):
        assert last[name] < first[name], name
    assert last["rewards/accuracies"] > 0.5
    assert first["loss"] == pytest.approx(
        first["loss/critique"] + first["loss/bradley_terry"] + 0.01 * first["loss/centre"] + first["loss/tie"], rel=1e-5
    )


def test_the_run_is_a_model_that_knows_its_head_and_template(world, judge):
    settings = read_settings(judge / "model")
    assert settings is not None
    assert (settings.head, settings.critique, settings.template) == ("linear", True, read_template(""))
    run("export", judge, "--output", judge / "exported", "--dtype", "float32")
    exported = load_file(judge / "exported" / "model.safetensors")
    loaded = load_model(str(judge), one_device(), ShardingRules(), rates=INFERENCE, dtype="float32")
    np.testing.assert_array_equal(exported["rm_head.weight"].T, loaded.params.head.kernel)


@pytest.mark.slow
def test_an_export_scores_as_the_run_so_its_rewards_are_there_already(world, judge, store):
    run("export", judge, "--output", judge / "twin", "--dtype", "float32")
    said = run("annotate", "--dataset", world.dataset, "--model", judge / "twin", "--with", "reward",
               "--critiques", "human", "--dtype", "float32")  # fmt: skip
    assert "done already: 12 stored" in said


def test_margins_are_differences_of_the_stored_scores(world, store, tmp_path):
    dataset = open_dataset(world.dataset)
    rewards = read_rewards(store, dataset)
    margins = [
        rewards[row].score[pair.chosen] - rewards[row].score[pair.rejected]
        for row, group in enumerate(dataset.groups())
        for pair in group.pairs
    ]
    objective = MMDPO(beta=0.1, w=2.0, k=1.0, gamma=0.0)
    changes = {"objective": objective, "reference": "online", "margins": "reward"}
    train(recipe(world, data=dataclasses.replace(recipe(world).data, max_steps=1), **changes), tmp_path / "run")
    (step,) = metrics(tmp_path / "run")
    assert step["margin/mean"] == pytest.approx(np.mean(margins), rel=1e-4)
    betas = 0.1 * (1 + 2 * (1 - np.exp(-np.maximum(margins, 0))))
    assert step["beta/mean"] == pytest.approx(betas.mean(), rel=1e-4)
    assert len(json.loads((tmp_path / "run" / "start.json").read_text())["margins"]) == 64


def test_rewards_are_readable_for_people(world, store):
    lines = [json.loads(line) for line in (store.directory / "rewards.jsonl").read_text().splitlines()]
    groups = list(open_dataset(world.dataset).groups())
    assert [line["id"] for line in lines] == [group.id for group in groups]
    for line, group in zip(lines, groups, strict=True):
        assert [r["critiques"] for r in line["responses"]] == [[response.reason] for response in group.responses]


@pytest.mark.slow
def test_what_is_missing_or_ambiguous_is_named_with_its_cure(world, judge, store, tmp_path):
    wants = recipe(world, objective=MMDPO(), reference="online", margins="reward-0123456789abcdef")
    with pytest.raises(ValueError, match=rf"no rewards 'reward-0123456789abcdef'; there: {store.directory.name}"):
        train(wants, tmp_path / "run")
    run("annotate", "--dataset", world.dataset, "--model", judge, "--with", "reward", "--critiques", "none",
        "--dtype", "float32")  # fmt: skip
    other = next(found for found in find(world.dataset, "reward") if found.key["critiques"] == "none")
    try:
        with pytest.raises(ValueError, match=r"made in several ways; choose with --margins one of\n  reward-"):
            train(dataclasses.replace(wants, margins="reward"), tmp_path / "run")
    finally:
        other.directory.rmtree()


@pytest.mark.slow
def test_generated_critiques_are_stored_with_their_scores(world, judge):
    arguments = ("--dataset", world.dataset, "--model", judge, "--with", "reward", "--dtype", "float32", "--samples", 2,
                 "--temperature", 1.0, "--max-new-tokens", 8)  # fmt: skip
    said = run("annotate", *arguments)
    assert "12 groups scored" in said
    assert "note: " in said  # eight tokens cut most of them short
    assert "done already" in run("annotate", *arguments)
    found = next(s for s in find(world.dataset, "reward") if s.key["critiques"] == "generated")
    dataset = open_dataset(world.dataset)
    rewards = read_rewards(found, dataset)
    try:
        for row, group in enumerate(dataset.groups()):
            reward = rewards[row]
            assert reward.scores.shape == (len(group.responses), 2)
            assert np.isfinite(reward.scores).all()
            assert all(len(each) == 2 for each in reward.critiques)
            assert reward.score == pytest.approx(reward.scores.mean(1))
        assert any(each[0] != each[1] for reward in rewards.values() for each in reward.critiques)
    finally:
        found.directory.rmtree()


@pytest.mark.slow
def test_a_scalar_model_is_trained_and_scores_without_critiques(world, tmp_path):
    train(recipe(world, objective=ScalarReward(), reward=RewardConfig(head="tanh")), tmp_path / "scalar")
    first, last = metrics(tmp_path / "scalar")[0], metrics(tmp_path / "scalar")[-1]
    assert last["loss/bradley_terry"] < first["loss/bradley_terry"]
    settings = read_settings(tmp_path / "scalar" / "model")
    assert (settings.head, settings.critique, settings.template) == ("tanh", False, None)
    arguments = ("--dataset", world.dataset, "--model", tmp_path / "scalar", "--with", "reward", "--dtype", "float32")
    with pytest.raises(AssertionError, match="a scalar reward model reads no critiques: use --critiques none"):
        run("annotate", *arguments, "--critiques", "human")
    run("annotate", *arguments)
    found = next(s for s in find(world.dataset, "reward") if s.key["critiques"] == "none")
    found.directory.rmtree()


@pytest.mark.slow
def test_policies_and_reward_models_are_not_taken_for_each_other(world, judge, tmp_path):
    with pytest.raises(ValueError, match=r"a reward model .*; a policy is asked for here"):
        train(recipe(world, objective=DPO(), reference="online", model=str(judge)), tmp_path / "policy")
    with pytest.raises(AssertionError, match="a policy is asked for here"):
        run("annotate", "--dataset", world.dataset, "--model", judge, "--with", "reference")
    with pytest.raises(AssertionError, match="a reward model is asked for here"):
        run("annotate", "--dataset", world.dataset, "--model", world.model, "--with", "reward")
    with pytest.raises(AssertionError, match="is for --with reward"):
        run("annotate", "--dataset", world.dataset, "--model", world.model, "--with", "reference", "--samples", 2)


def test_a_reward_model_is_trained_on(world, judge, tmp_path):
    train(recipe(world, model=str(judge)), tmp_path / "more")
    assert metrics(tmp_path / "more")[0]["loss"] < metrics(judge)[0]["loss"]
    with pytest.raises(ValueError, match="its head is 'linear', the recipe asks for 'tanh'"):
        train(recipe(world, model=str(judge), reward=RewardConfig(head="tanh")), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "online"}, "a second forward that this objective never reads"),
        ({"margins": "reward"}, "CritiqueReward reads no margins"),
        ({"objective": DPO(), "reward": RewardConfig(head="tanh")}, r"reward\.\* is for reward models"),
        ({"objective": ScalarReward(), "reward": RewardConfig(template="t.txt")}, "which ScalarReward does without"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(world, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(world, **changes)


@pytest.mark.slow
def test_with_lora_the_head_trains_beside_the_adapters(world, tmp_path):
    train(recipe(world, lora=LoraConfig(rank=4, alpha=8.0)), tmp_path / "lora")
    checkpoints = Checkpoints(tmp_path / "lora" / "checkpoints")
    stored = set(checkpoints.position(STEPS)["dtypes"])
    checkpoints.close()
    assert {name for name in stored if not lora.is_adapter(name)} == {"head.kernel", "head.bias"}
    adapted = load_adapters(str(tmp_path / "lora"), one_device(), ShardingRules())
    start = dict(named_leaves(load_model(world.model, one_device(), ShardingRules(), rates=INFERENCE).params))
    for name, leaf in named_leaves(lora.strip(adapted.params)):
        if name in start:
            np.testing.assert_array_equal(leaf, start[name], err_msg=name)
    run("export", tmp_path / "lora", "--output", tmp_path / "merged", "--dtype", "float32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_array_equal(merged["rm_head.bias"], adapted.params.head.bias)
    with pytest.raises(AssertionError, match="is a reward model, whose head no PEFT directory holds"):
        run("export", tmp_path / "lora", "--output", tmp_path / "adapter", "--adapter")


@pytest.mark.slow
def test_held_out_groups_are_judged_too(world, tmp_path):
    tiny = recipe(world)
    evaluation = dataclasses.replace(tiny.evaluation, every=3, share=0.3, metric="rewards/accuracies")
    train(dataclasses.replace(tiny, evaluation=evaluation), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 3, 6]
    assert all("eval/loss/critique" in record for record in records)


def test_without_a_reason_there_is_no_critique_to_learn(world, tmp_path):
    """Refused before anything is trained: what would come out writes empty critiques."""
    dataset = open_dataset(world.dataset)
    measured = measure_data(recipe(world), dataset, renderer_for(world))
    bare = [without_critiques(group) for group in measured.groups]
    with pytest.raises(ValueError, match=r"none of \d+ responses has a reason, .* or train ScalarReward"):
        plan_data(recipe(world), dataclasses.replace(measured, groups=bare), TINY, BatchShare((0,), 1))
    learned = plan_data(recipe(world), measured, TINY, BatchShare((0,), 1)).critiques
    assert learned is not None
    assert learned[0] == learned[1] > 0


def renderer_for(world):
    return RewardRenderer(load_renderer(world.model), read_template(""))

"""Held-out evaluation: nothing seen in training, the same numbers as the training loss, the best checkpoint kept."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from small_world import ROOT, metrics, run

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.groups import Group, Turn
from mmrlhf_jax.objectives import DPO, MMDPO, MMDPOReleasedBatch, Supervised
from mmrlhf_jax.training.best import best_record, is_best, ran_out_of_patience
from mmrlhf_jax.training.held_out import held_out_rows
from mmrlhf_jax.training.recipe import CheckpointConfig, EvaluationConfig, read_recipe
from mmrlhf_jax.training.run import Checkpoints
from mmrlhf_jax.training.train import train

SHARE = EvaluationConfig(every=2, share=0.4)


def recipe(world, evaluation=SHARE, objective=None, **changes):
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    objective = objective or MMDPO()
    fields = {
        "objective": objective,
        "model": world.model,
        "dataset": world.dataset,
        "reference": "stored" if isinstance(objective, Supervised) else "online",
        "data": dataclasses.replace(tiny.data, max_steps=4, max_buckets=1, groups_per_step=4),
        "optimizer": dataclasses.replace(tiny.optimizer, learning_rate=3e-3),
        "checkpoint": CheckpointConfig(every=100, keep=1),
        "evaluation": evaluation,
    }
    return dataclasses.replace(tiny, **{**fields, **changes})


def evaluations(output):
    return [json.loads(line) for line in (output / "evaluation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(small_world):
    output = small_world.directory / "held-out"
    train(recipe(small_world), output)
    return output


def test_an_evaluation_that_is_not_finite_is_never_the_best_and_no_reason_to_stop():
    def records(*values):
        return [{"step": 2 * i, "eval/loss": value} for i, value in enumerate(values)]

    nan = float("nan")
    assert best_record(records(nan, 0.6, nan, 0.5), "loss")["step"] == 6
    assert not is_best(records(0.7, 0.6, nan), "loss")
    assert is_best(records(0.7, nan, 0.9), "loss")  # the first that says anything
    assert best_record(records(nan, nan), "loss") is None
    assert not ran_out_of_patience(records(nan, nan, nan, nan), "loss", 2)
    assert ran_out_of_patience(records(0.5, nan, nan), "loss", 2)


def test_no_held_out_group_is_ever_trained_on(small_world, evaluated):
    groups = list(open_dataset(small_world.dataset).groups())
    aside = held_out_rows(groups, 0.4, 0)
    trained = {row for record in metrics(evaluated) for row in record["rows"]}
    assert trained == set(range(small_world.groups)) - set(aside)
    assert {record["groups"] for record in evaluations(evaluated)} == {len(aside)}


def test_it_is_scored_before_the_first_step_now_and_then_and_after_the_last(evaluated):
    records = evaluations(evaluated)
    assert [record["step"] for record in records] == [0, 2, 4]
    assert records[0]["eval/loss/preference"] == pytest.approx(np.log(2), abs=1e-5)
    names = ("rewards/accuracies", "rewards/margins", "loss/nll", "length/chosen", "length/rejected", "beta/mean")
    assert all(f"eval/{name}" in record for record in records for name in names)
    assert len({record["eval/loss"] for record in records}) == 3


@pytest.mark.parametrize("objective", [DPO(gamma=0.5), Supervised()], ids=["dpo", "supervised"])
def test_an_evaluation_is_the_loss_a_step_over_the_same_groups_would_log(small_world, tmp_path, objective):
    """The whole dataset as its own evaluation set, and as one training step at rate ~0."""
    whole = EvaluationConfig(every=1, dataset=small_world.dataset)
    tiny = recipe(small_world, whole, objective)
    once = dataclasses.replace(tiny.data, max_steps=1, groups_per_step=small_world.groups)
    train(dataclasses.replace(tiny, data=once), tmp_path / "run")
    (step,) = metrics(tmp_path / "run")
    before, _ = evaluations(tmp_path / "run")
    shared = {name.removeprefix("eval/") for name in before if name.startswith("eval/")}
    assert {"loss", "loss/nll"} <= shared
    for name in shared - {"rewards/accuracies"}:  # of differences that are rounding, before anything moved
        assert before[f"eval/{name}"] == pytest.approx(step[name], rel=1e-5, abs=1e-6), name


def test_the_best_checkpoint_outlives_later_ones(small_world, tmp_path):
    """A rate that ruins the model: the first evaluated step stays the best, and stays on disk."""
    output = tmp_path / "run"
    ruin = dataclasses.replace(recipe(small_world).optimizer, learning_rate=0.3, warmup=0.0, schedule="constant")
    train(recipe(small_world, optimizer=ruin, checkpoint=CheckpointConfig(every=1, keep=1)), output)
    records = [r for r in evaluations(output) if r["step"]]
    best = best_record(records, "loss")["step"]
    checkpoints = Checkpoints(output / "checkpoints")
    assert checkpoints.steps() == sorted({best, 4})
    checkpoints.close()
    said = run("export", f"{output}@best", "--output", tmp_path / "best")
    assert f"from checkpoint {best}" in said


def test_early_stopping_ends_the_run_and_its_resumption(small_world, tmp_path, capsys):
    ruin = dataclasses.replace(recipe(small_world).optimizer, learning_rate=0.3, warmup=0.0, schedule="constant")
    impatient = recipe(small_world, dataclasses.replace(SHARE, every=1, patience=1), optimizer=ruin)
    train(impatient, tmp_path / "run")
    done = json.loads((tmp_path / "run" / "complete.json").read_text())
    assert done == {"steps": 1, "planned": 4}
    assert "done: 1 steps, stopped early of 4" in capsys.readouterr().out
    (tmp_path / "run" / "complete.json").unlink()  # killed after the checkpoint, before the last word
    train(impatient, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "complete.json").read_text()) == done
    assert [r["step"] for r in evaluations(tmp_path / "run")] == [0, 1]


def test_a_resumed_run_evaluates_what_is_missing_and_nothing_twice(small_world, evaluated, tmp_path):
    output = tmp_path / "run"
    run_recipe = recipe(small_world, checkpoint=CheckpointConfig(every=2, keep=2))
    train(run_recipe, output)
    (output / "complete.json").unlink()
    shutil.rmtree(output / "checkpoints" / "4")
    train(run_recipe, output)
    ours, theirs = evaluations(output), evaluations(evaluated)
    assert [{**r, "seconds": 0} for r in ours] == [{**r, "seconds": 0} for r in theirs]


def test_a_prompt_never_stands_on_both_sides():
    """A row's side depends on its prompt and pictures only: neither its answers nor its neighbours matter."""

    def group(i: int, prompt: str) -> Group:
        return Group(str(i), (Turn("user", prompt),), (), (), (), ())

    groups = [group(i, f"question {i // 2}") for i in range(400)]
    aside = held_out_rows(groups, 0.3, 0)
    assert all((row ^ 1) in aside for row in aside)
    assert 80 < len(aside) < 160
    fewer = [groups[row] for row in range(0, 400, 2)]
    assert held_out_rows(fewer, 0.3, 0) == [row // 2 for row in aside if row % 2 == 0]
    assert held_out_rows(groups, 0.3, 1) != aside


def test_a_row_that_a_mixture_repeats_is_evaluated_once(small_world, tmp_path):
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"parts": [{"dataset": small_world.dataset, "weight": 3.0}]}))
    data = dataclasses.replace(recipe(small_world).data, max_steps=1)
    train(recipe(small_world, dataset=str(mixture), data=data), tmp_path / "run")
    aside = held_out_rows(list(open_dataset(small_world.dataset).groups()), 0.4, 0)
    assert {record["groups"] for record in evaluations(tmp_path / "run")} == {len(aside)}


def test_the_evaluation_dataset_may_be_smaller_than_what_is_trained_on(small_world, tmp_path):
    """The step's tokens are counted from the lengths of the rows that train."""
    mixture = tmp_path / "few.json"
    mixture.write_text(json.dumps({"parts": [{"dataset": small_world.dataset, "limit": 3}]}))
    data = dataclasses.replace(recipe(small_world).data, max_steps=1)
    for name, evaluation in (("few", EvaluationConfig(every=1, dataset=str(mixture))), ("none", EvaluationConfig())):
        train(recipe(small_world, evaluation, data=data), tmp_path / name)
    few, none = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("few", "none")
    )
    assert few["tokens_per_second"] * few["seconds"] == pytest.approx(none["tokens_per_second"] * none["seconds"])


def test_a_share_that_leaves_a_side_empty_is_refused():
    groups = [Group("0", (Turn("user", "?"),), (), (), (), ())]
    with pytest.raises(ValueError, match=r"sets \d of 1 groups aside: choose a share that leaves groups on both sides"):
        held_out_rows(groups, 0.5, 0)


def test_the_best_is_low_for_losses_and_high_for_the_rest():
    records = [
        {"step": 1, "eval/loss": 2.0, "eval/rewards/accuracies": 0.5},
        {"step": 2, "eval/loss": 3.0, "eval/rewards/accuracies": 0.9},
    ]
    assert best_record(records, "loss") is records[0]
    assert is_best(records, "rewards/accuracies")
    assert ran_out_of_patience(records, "loss", 1)
    assert not ran_out_of_patience(records, "loss", 2)
    assert not ran_out_of_patience(records, "loss", 0)


def test_an_objective_of_step_statistics_is_evaluated_as_dpo_at_its_beta(small_world, tmp_path):
    batch = {"objective": MMDPOReleasedBatch()}
    data = dataclasses.replace(recipe(small_world).data, max_steps=1, groups_per_step=2)
    train(recipe(small_world, **batch, data=data), tmp_path / "run")
    assert [r["eval/beta/mean"] for r in evaluations(tmp_path / "run")] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"every": 2}, "needs groups to evaluate on: set evaluation.share or evaluation.dataset"),
        ({"share": 0.1}, "do nothing without evaluation.every"),
        ({"every": 2, "share": 0.1, "dataset": "d"}, "needs groups to evaluate on"),
        ({"every": 1, "share": 1.0}, r"share must lie in \[0, 1\)"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(small_world, evaluation, message):
    with pytest.raises(ValueError, match=message):
        recipe(small_world, EvaluationConfig(**evaluation))


def test_an_unknown_metric_is_refused_before_any_work(small_world, tmp_path):
    with pytest.raises(ValueError, match=r"'accuracy' is not measured; choose one of loss, beta/mean, "):
        train(recipe(small_world, dataclasses.replace(SHARE, metric="accuracy")), tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""The quickstart, made small: not to learn anything, but to see that every stage runs, is run once and adds up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_world import ROOT, command, environment

from mmrlhf_jax.data.digit_boards.measures import faults
from mmrlhf_jax.data.digit_boards.world import read_questions, scene_of
from mmrlhf_jax.quickstart import read_answers
from mmrlhf_jax.training.recipe import Recipe, read_recipe

TINY = ("--boards", 24, "--held-out-boards", 8, "--sft-steps", 2, "--reward-steps", 1, "--preference-steps", 2)
QUESTIONS = 3 * 8 + 2 * 2  # three a board, two a clip
POLICIES = ("sft", "sft_best", "dpo", "mm_dpo")


def quickstart(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Its stages in its own process (as programs of their own they run in test_supply_chain.py)."""
    words = [sys.executable, str(ROOT / "tests" / "one_process.py"), *command("quickstart", *arguments)[1:]]
    return subprocess.run(words, env=environment(1), capture_output=True, text=True, timeout=900)


def recipe(name: str) -> Recipe:
    return read_recipe(ROOT / "configs" / "quickstart" / f"{name}.py")


@pytest.mark.parametrize("control", ["sft_best", "dpo"])
def test_what_runs_beside_mm_dpo_differs_in_its_objective_and_answers_only(control: str) -> None:
    ours, other = recipe("mm_dpo"), recipe(control)
    assert ours.data.max_steps == other.data.max_steps
    assert ours.data.groups_per_step == other.data.groups_per_step
    assert (ours.optimizer, ours.compute, ours.seed) == (other.optimizer, other.compute, other.seed)


def test_dpo_and_mm_dpo_differ_in_the_margins_only() -> None:
    ours, other = recipe("mm_dpo"), recipe("dpo")
    assert (ours.objective.beta, ours.objective.gamma) == (other.objective.beta, other.objective.gamma)
    assert (ours.data, ours.margins, other.margins) == (other.data, "reward", "data")


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    refused = quickstart("--output", tmp_path)
    assert refused.returncode == 2
    assert "holds no quickstart" in refused.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def check_all_is_there(output: Path, printed: str) -> None:
    (parameters,) = re.findall(r"([\d,]+) parameters", printed)
    assert int(parameters.replace(",", "")) <= 3_000_000
    results = json.loads((output / "results.json").read_text())
    truth = {row["id"]: row for row in read_questions(output / "world", "held_out")}
    table = printed[printed.index("questions about held-out boards") :].splitlines()
    for policy, title in zip(POLICIES, ("SFT (before)", "SFT on the best", "DPO", "MM-DPO"), strict=True):
        found = results["policies"][policy]
        assert found["answers"] == QUESTIONS == len(truth)
        assert {"all", "board", "video"} <= set(found["hallucination"])
        shares = [*found["hallucination"].values(), found["refusal"], found["over_refusal"]]
        assert all(0 <= share <= 1 for share in shares)
        (line,) = [line for line in table if line.startswith(title + " ")]
        assert f"{found['hallucination']['all']:.1%}" in line
        for answer in read_answers(output / "answers" / "marked" / f"{policy}.jsonl"):
            row, (said,) = truth[answer["id"]], answer["responses"]
            expected = faults(scene_of(row), row["question"], said["text"])
            assert tuple(tuple(span) for span in said["wrong"]) == expected.wrong
            assert (tuple(said["missing"]), said["claims"]) == (expected.missing, expected.claims)
    assert 0.6 < results["reward_model"]["annotator_accuracy"] < 1
    assert 0 <= results["reward_model"]["reward_model_accuracy"] <= 1
    assert (output / "mm_dpo_hf" / "model.safetensors").exists()
    page = (output / "report.html").read_text()
    for title in ("Curves", "Calibration", "Answers", "SFT on the best", "MM-DPO"):
        assert title in page


def test_the_whole_pipeline_runs_once(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = tmp_path / "out"
    first = quickstart("--output", output, *TINY)
    assert first.returncode == 0, first.stdout + first.stderr
    check_all_is_there(output, first.stdout)

    began = time.perf_counter()
    second = quickstart("--output", output, *TINY)
    assert second.returncode == 0
    assert time.perf_counter() - began < 30
    assert second.stdout.count("done already") == len(list((output / "stages").iterdir()))
    table = first.stdout[first.stdout.index("questions about held-out boards") :]
    assert second.stdout.endswith(table)

    changed = quickstart("--output", output, *TINY, "--seed", 1)
    assert changed.returncode == 2
    assert "made with other options" in changed.stderr

"""The study, made small: not to learn anything, but to see that it stops, goes on, runs once and adds up."""

from __future__ import annotations

import json
import math
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_world import ROOT, command, environment, metrics

from mmrlhf_jax.command import UsageError

PROGRAM = runpy.run_path(str(ROOT / "launch" / "study.py"), run_name="study")
ARMS = ("dpo", "mm_dpo")
TINY = (
    "--boards", 24, "--held-out-boards", 8, "--sft-steps", 2, "--reward-steps", 1, "--preference-steps", 2,
    "--seeds", 3, 4, "--grid-seeds", 0, "--arms", *ARMS,
)  # fmt: skip
T_OF_ONE_DEGREE = 12.7062


def study(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Its stages in its own process, which saves starting Python for each."""
    words = [sys.executable, str(ROOT / "tests" / "one_process.py"), *command("study", *arguments)[1:]]
    return subprocess.run(words, env=environment(1), capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"arms": ("dpo", "ppo")}, "--arms dpo ppo: name some of sft_best, dpo"),
        ({"arms": ()}, "--arms"),
        ({"arms": ("dpo_mean_beta", "dpo")}, "dpo_mean_beta needs mm_dpo"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"grid_seeds": -1}, "--grid-seeds -1"),
        ({"at_once": 0}, "--at-once 0"),
        ({"boards": 0}, "--boards 0"),
        ({"arms": ("ipo",)}, "--arms ipo: name some of sft_best, dpo"),
        ({"family": True, "arms": ("mm_dpo",)}, "--arms mm_dpo: name some of scalar_reward"),
    ],
)
def test_what_makes_no_study_is_bad_usage(asked: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        PROGRAM["Arguments"](**asked)


def test_a_subset_of_arms_needs_the_reward_models_of_its_margins_only() -> None:
    arguments = PROGRAM["Arguments"]
    assert list(arguments(arms=("sft_best", "dpo", "known_margins")).sources) == []
    assert list(arguments(arms=("mm_dpo",)).sources) == ["generated"]
    assert list(arguments().sources) == ["scalar", "generated", "human"]
    assert arguments(arms=("dpo",)).of_grid == ()
    assert arguments(seeds=(7, 8, 9), grid_seeds=2).of_grid == (7, 8)


def test_the_family_needs_the_scalar_reward_model_only_for_margins() -> None:
    arguments = PROGRAM["Arguments"]
    assert list(arguments(family=True, arms=("dpo", "ipo")).sources) == []
    asked = arguments(family=True, arms=("tokenwise_reward", "mmpo"))
    assert list(asked.sources) == ["scalar_reward", "tokenwise_reward"]
    assert (asked.margins, list(asked.policies), asked.of_grid) == ({"scalar_reward"}, ["mmpo"], ())
    assert len(arguments(family=True).names) == len(set(arguments(family=True).names)) > 34


def interrupted(output: Path) -> None:
    """Starts the study as a user would, two seeds at once, and stops it when one of them has begun to train."""
    with (output.parent / "first.txt").open("w") as printed:
        process = subprocess.Popen(
            command("study", "--output", output, *TINY, "--at-once", 2),
            env=environment(1), stdout=printed, stderr=subprocess.STDOUT,
        )  # fmt: skip
    prepared = [output / f"seed_{seed}" / "stages" / "prepare_held_out.json" for seed in (3, 4)]
    until = time.monotonic() + 300
    while not any(file.exists() for file in prepared) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = (output.parent / "first.txt").read_text
    assert process.wait(120) == 75, said()
    assert "run the same command to go on" in said()
    assert any("interrupted" in (output / f"seed_{seed}" / "log.txt").read_text() for seed in (3, 4))


def check_the_tables_arithmetic(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    seeds = {seed: json.loads((output / f"seed_{seed}" / "results.json").read_text()) for seed in ("3", "4")}
    assert results["seeds"] == seeds
    table = (output / "table.md").read_text()
    for arm in ("sft", *ARMS):
        first, second = (seeds[seed]["policies"][arm]["hallucination"]["all"] for seed in ("3", "4"))
        found = results["summary"]["means"]["policies"][arm]["hallucination/all"]
        half = T_OF_ONE_DEGREE * abs(first - second) / 2  # s = |a - b| / sqrt 2, over sqrt 2
        assert found["mean"] == pytest.approx((first + second) / 2)
        assert found["half"] == pytest.approx(half, rel=1e-5)
        assert f"{100 * (first + second) / 2:.1f} ± {100 * half:.1f}" in table
    for figure in ("preference_accuracy", "length"):
        ours, theirs = ([seeds[seed]["policies"][arm][figure] for seed in ("3", "4")] for arm in ("mm_dpo", "dpo"))
        less = [a - b for a, b in zip(ours, theirs, strict=True)]
        found = results["summary"]["differences"]["dpo"]["mm_dpo"][figure]
        assert found["mean"] == pytest.approx(sum(less) / 2, abs=1e-12)
        assert found["half"] == pytest.approx(T_OF_ONE_DEGREE * abs(less[0] - less[1]) / 2, rel=1e-5, abs=1e-9)
    for seed in seeds.values():
        dpo, mm_dpo = (seed["policies"][arm] for arm in ARMS)
        for what in ("items", "pairs"):  # a rate times seconds
            assert dpo["step"][what] == pytest.approx(mm_dpo["step"][what])
        assert dpo["step"]["beta"] == pytest.approx(0.1)
        assert 0.1 <= mm_dpo["step"]["beta"] <= 0.15
        assert math.isclose(dpo["step"]["gigaflop"], mm_dpo["step"]["gigaflop"])
        assert set(seed["scores"]) == {"longer", "annotators", "generated"}  # nobody needs a scalar reward model


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped_and_adds_up(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = tmp_path / "out"
    interrupted(output)
    there = {file: file.read_text() for file in output.glob("seed_*/stages/*.json")}

    done = study("--output", output, *TINY, "--at-once", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done already") == len(there)
    assert all(file.read_text() == record for file, record in there.items())
    (stages,) = [int(line.split()[-4]) for line in done.stdout.splitlines() if line.endswith("stages in all")]
    assert stages == len(list(output.glob("seed_*/stages/*.json")))
    check_the_tables_arithmetic(output)

    began = time.perf_counter()
    again = study("--output", output, *TINY)
    assert again.returncode == 0
    assert time.perf_counter() - began < 60
    assert again.stdout.count("done already") == stages
    assert (output / "table.md").read_text() in again.stdout


@pytest.mark.slow
def test_the_family_runs_resumes_and_says_what_each_costs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output, seed = tmp_path / "out", tmp_path / "out" / "seed_3"
    asked = ("--family", "--output", output, *TINY[: TINY.index("--seeds")], "--seeds", 3, "--arms")
    done = study(*asked, "dpo", "mmpo", "tokenwise_reward")
    assert done.returncode == 0, done.stdout + done.stderr
    (stages,) = [int(line.split()[-4]) for line in done.stdout.splitlines() if line.endswith("stages in all")]
    assert stages == len(list(seed.glob("stages/*.json")))

    results = json.loads((seed / "results.json").read_text())
    dpo, mmpo = (results["policies"][arm] for arm in ("dpo", "mmpo"))
    assert [arm["extra_forwards"] for arm in (dpo, mmpo)] == [1, 2]
    assert math.isclose(dpo["step"]["gigaflop"], mmpo["step"]["gigaflop"])
    seen = [[line["rows"] for line in metrics(seed / arm)] for arm in ("dpo", "mmpo")]
    assert seen[0] == seen[1]
    assert set(results["scores"]) == {"longer", "annotators", "scalar_reward", "tokenwise_reward"}
    assert (output / "table.md").read_text() in done.stdout

    again = study(*asked, "dpo", "mmpo", "tokenwise_reward", "chosen_nll")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done already") == stages
    added = json.loads((seed / "results.json").read_text())["policies"]
    assert added["chosen_nll"]["extra_forwards"] == 0
    assert added["dpo"] == dpo

    refused = study(*(word for word in asked if word not in ("--family", "--arms")))
    assert refused.returncode == 2
    assert "holds no study" in refused.stderr

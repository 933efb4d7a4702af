"""The comparison of reward models, made small: not to learn anything, but to see that it runs once and adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_world import ROOT, command, environment

from mmrlhf_jax.training.recipe import read_recipe

OPTIONS = ("--boards", 24, "--held-out-boards", 4, "--sft-steps", 3, "--reward-steps", 2)
SCORERS = ("scalar", "none", "generated", "sampled", "human")


def reward_quickstart(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Its stages in its own process, which saves starting Python for each."""
    words = [sys.executable, str(ROOT / "tests" / "one_process.py"), *command("reward_quickstart", *arguments)[1:]]
    return subprocess.run(words, env=environment(1), capture_output=True, text=True, timeout=900)


def test_the_scalar_model_differs_from_the_critique_model_in_its_objective_and_prompt_only() -> None:
    ours, control = (
        read_recipe(ROOT / "configs" / "quickstart" / f"{name}.py") for name in ("critique_reward", "scalar_reward")
    )
    assert (ours.data, ours.optimizer, ours.compute, ours.seed) == (
        control.data,
        control.optimizer,
        control.compute,
        control.seed,
    )
    assert (ours.objective.centre, ours.objective.tie) == (control.objective.centre, control.objective.tie)
    assert ours.reward.head == control.reward.head


def test_a_seed_twice_is_bad_usage(tmp_path: Path) -> None:
    refused = reward_quickstart("--output", tmp_path, "--seeds", 1, 1)
    assert refused.returncode == 2
    assert "--seeds" in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_seed_is_measured_once_and_another_may_be_added(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = tmp_path / "out"
    first = reward_quickstart("--output", output, "--seeds", 3, *OPTIONS)
    assert first.returncode == 0, first.stdout + first.stderr
    alone = json.loads((output / "results.json").read_text())
    assert list(alone["seeds"]) == ["3"]
    assert all(spread["std"] == 0 for spread in alone["summary"].values())

    second = reward_quickstart("--output", output, "--seeds", 3, 4, *OPTIONS)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("done already") == len(list((output / "seed_3" / "stages").iterdir()))
    both = json.loads((output / "results.json").read_text())
    assert both["seeds"]["3"] == alone["seeds"]["3"]
    for name in (*SCORERS, "longer", "critique_statements", "critique_counts"):
        values = [both["seeds"][seed][name] for seed in ("3", "4")]
        assert all(0 <= value <= 1 for value in values)
        spread = both["summary"][name]
        assert (spread["min"], spread["max"]) == (min(values), max(values))
        assert spread["mean"] == pytest.approx(sum(values) / 2)
        assert spread["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    table = second.stdout[second.stdout.rindex("pairs of answers about held-out boards") :]
    assert f"{both['summary']['human']['mean']:.1%}" in table

"""The quickstart, made small: not to learn anything, but to see that every stage runs and is run once."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from small_world import ROOT, command, environment

from mmrlhf_jax.training.recipe import read_recipe

OPTIONS = ("--boards", 24, "--held-out-boards", 4, "--sft-steps", 3, "--preference-steps", 2)


def quickstart(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("quickstart", *arguments), env=environment(1), capture_output=True, text=True, timeout=900
    )


def test_the_control_differs_from_mm_dpo_in_its_objective_and_answers_only() -> None:
    ours, control = (read_recipe(ROOT / "configs" / "quickstart" / f"{name}.py") for name in ("mm_dpo", "sft_best"))
    assert ours.data.max_steps == control.data.max_steps
    assert ours.data.groups_per_step == control.data.groups_per_step
    assert (ours.optimizer, ours.compute, ours.seed) == (control.optimizer, control.compute, control.seed)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    refused = quickstart("--output", tmp_path)
    assert refused.returncode == 2
    assert "holds no quickstart" in refused.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_whole_pipeline_runs_once(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = tmp_path / "out"
    first = quickstart("--output", output, *OPTIONS)
    assert first.returncode == 0, first.stdout + first.stderr
    (parameters,) = re.findall(r"([\d,]+) parameters", first.stdout)
    assert int(parameters.replace(",", "")) <= 3_000_000
    table = first.stdout[first.stdout.index("questions about held-out boards") :]
    for title in ("SFT (before)", "SFT on the best", "MM-DPO"):
        (line,) = [line for line in table.splitlines() if line.startswith(title + " ")]
        shares = [float(share) / 100 for share in re.findall(r"([\d.]+)%", line)]
        assert len(shares) >= 4
        assert all(0 <= share <= 1 for share in shares)
    results = json.loads((output / "results.json").read_text())
    assert all(len(result["answers"]) == result["questions"] == 8 for result in results.values())
    assert (output / "mm_dpo_hf" / "model.safetensors").exists()

    began = time.perf_counter()
    second = quickstart("--output", output, *OPTIONS)
    assert second.returncode == 0
    assert time.perf_counter() - began < 30
    assert second.stdout.count("done already") == len(list((output / "stages").iterdir()))
    assert second.stdout.endswith(table)

    changed = quickstart("--output", output, *OPTIONS, "--seed", 1)
    assert changed.returncode == 2
    assert "made with other options" in changed.stderr

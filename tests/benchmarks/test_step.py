"""launch/benchmark.py step, at a size that takes seconds: its own numbers must hang together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--decoder-layers", 1, "--embed", 64, "--vocab", 512, "--tower-layers", 1, "--repeats", 2)


def benchmark(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    one_device = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return subprocess.run(
        [sys.executable, str(program), "step", *map(str, (*TINY, *arguments))],
        env={**os.environ, "XLA_FLAGS": " ".join(one_device)},
        capture_output=True,
        text=True,
        timeout=400,
    )


def check(row: dict, other: str) -> None:
    assert row["loss"]["group"] == pytest.approx(row["loss"][other], rel=1e-4)
    assert row["gradient_norm"]["group"] == pytest.approx(row["gradient_norm"][other], rel=1e-3)
    assert row["loss"]["group"] != pytest.approx(0.6931, abs=1e-3)  # policy and reference differ
    low, high = row["ratio_range"]
    assert low <= row["ratio"] <= high
    assert all(bytes_ > 2**27 for bytes_ in row["peak_bytes"].values())


def test_a_group_and_its_pairs_agree_and_are_timed(tmp_path):
    file = tmp_path / "figures.json"
    done = benchmark(ROOT / "launch" / "benchmark.py", "--responses", 3, "--scaling", "--output", file)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["K"], row["pairs"], row["pairs_timed"], row["prompt"]) == (3, 3, 3, 1300)
    assert row["ratio"] > 2
    check(row, "pairs")
    by_length, by_groups = json.loads(file.read_text())["scaling"]
    assert by_length["amounts"] == [256, 512, 1024, 2048]
    assert by_groups["amounts"] == [1, 2, 3, 4]
    assert by_groups["slope"] > 0
    assert "K=3, 3 pairs, picture 384 x 200, prompt 1300: group" in done.stdout


def test_a_prompt_that_its_picture_fills_is_refused():
    done = benchmark(ROOT / "launch" / "benchmark.py", "--prompt", 900)
    assert done.returncode == 2
    assert "--prompt 900: a picture of 384 x 200 is 1149 tokens" in done.stderr


def test_more_of_the_mix_than_there_is_is_refused():
    done = benchmark(ROOT / "launch" / "benchmark.py", "--mix", 12)
    assert done.returncode == 2
    assert "--mix is 0 to 11" in done.stderr


@pytest.mark.parity
@pytest.mark.slow
def test_trl_finds_the_same_loss_and_gradient_and_some_of_its_pairs_stand_for_all(tmp_path):
    pytest.importorskip("trl")
    file = tmp_path / "figures.json"
    mix = ("--mix", 1, "--mix-pairs", 1)
    program = ROOT / "tests" / "benchmark_beside_torch.py"
    done = benchmark(program, "--against", "trl", "--responses", 3, *mix, "--output", file)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    check(figures["rows"][0], "trl")
    rows = figures["mix_rows"]
    assert [row["pairs_timed"] for row in rows] == [1] * 4
    assert sum(row["pairs"] for row in rows) > 8
    shares = (0.2, 0.5, 0.2, 0.1)
    ours = sum(share * row["seconds"]["group"] for share, row in zip(shares, rows, strict=True))
    assert figures["mix"]["seconds"]["group"] == pytest.approx(ours)

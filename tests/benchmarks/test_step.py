"""launch/benchmark.py step, at a size that takes seconds: its own numbers must hang together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY
from torchvision_shim import mend_torchvision

from mmrlhf_jax.benchmarks import sides, step
from mmrlhf_jax.benchmarks.step import Step, StepCompute, _compute, time_step
from mmrlhf_jax.command import CommandError, UsageError
from mmrlhf_jax.training.recipe import ComputeConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--decoder-layers", 1, "--embed", 64, "--vocab", 512, "--tower-layers", 1)


def benchmark(program: Path, *arguments: object, repeats: int = 2) -> subprocess.CompletedProcess:
    one_device = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return subprocess.run(
        [sys.executable, str(program), "step", *map(str, (*SMALL, "--repeats", repeats, *arguments))],
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
    for form in ("group", other):
        wait = row["data_wait_seconds"][form]
        assert wait > 0
        assert row["data_wait_share"][form] == pytest.approx(wait / (wait + row["seconds"][form]))


def test_a_group_and_its_pairs_agree_and_are_timed(tmp_path):
    file = tmp_path / "figures.json"
    done = benchmark(ROOT / "launch" / "benchmark.py", "--responses", 3, "--ops", "--output", file)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["K"], row["pairs"], row["pairs_timed"], row["prompt"]) == (3, 3, 3, 1300)
    assert row["flops_ratio"] > 2
    check(row, "pairs")
    total, whole = row["parts"][-2:]
    assert (total["part"], whole["part"]) == ("sum of the parts", "the step itself")
    assert whole["seconds"] == row["seconds"]["group"]
    assert 0.2 < total["share"] < 5  # other work shares the machine
    assert "  log-probs             forward" in done.stdout
    assert "K=3, 3 pairs, picture 384 x 200, prompt 1300: group" in done.stdout


@pytest.mark.slow
def test_lines_are_fitted_through_growing_answers_and_growing_batches(tmp_path):
    file = tmp_path / "figures.json"
    done = benchmark(ROOT / "launch" / "benchmark.py", "--responses", 2, "--scaling", "--output", file, repeats=1)
    assert done.returncode == 0, done.stderr
    by_length, by_groups = json.loads(file.read_text())["scaling"]
    assert by_length["amounts"] == [256, 512, 1024, 2048]
    assert by_groups["amounts"] == [1, 2, 3, 4]
    assert by_groups["slope"] > 0


def test_a_prompt_that_its_picture_fills_is_refused():
    done = benchmark(ROOT / "launch" / "benchmark.py", "--prompt", 900)
    assert done.returncode == 2
    assert "--prompt 900: a picture of 384 x 200 is 1149 tokens" in done.stderr


def test_a_size_beside_a_shape_of_its_own_is_refused():
    done = benchmark(ROOT / "launch" / "benchmark.py", "--shape", "0.5b")
    assert done.returncode == 2
    assert "--decoder-layers, --embed, --vocab, --tower-layers change the pinned shape" in done.stderr


def test_devices_decide_what_is_not_given_and_flags_what_is():
    assert _compute(Step(), "cpu") == ComputeConfig(dtype="float32", remat="none")
    assert _compute(Step(shape="7b"), "gpu") == ComputeConfig(dtype="bfloat16", remat="full")
    asked = StepCompute(dtype="float32", remat="projections", attention="xla")
    given = ComputeConfig(dtype="float32", remat="projections", attention="xla")
    assert _compute(Step(shape="7b", compute=asked), "gpu") == given


def test_sides_on_different_devices_are_refused(monkeypatch, tmp_path):
    class Elsewhere:
        def __init__(self, form):
            self.form = form

        def device(self):
            return ("gpu", "a card") if self.form == "group" else ("cpu", "cpu")

        def close(self):
            pass

    monkeypatch.setattr(step, "Side", Elsewhere)
    with (
        pytest.raises(CommandError, match="jax computes on gpu, trl on cpu: two devices cannot be compared"),
        step._bench(Step(against="trl"), TINY, tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating", "ran out of the device's memory"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "ran out of the device's memory"),
        ("ValueError: a group does not fit", "failed"),
    ],
)
def test_a_side_without_memory_is_told_from_one_that_failed(told, said):
    assert sides._how_it_failed(told).startswith(said)


@pytest.mark.parametrize("wrong", [{"lora_rank": -1}, {"repeats": 0}, {"mix_pairs": -1}])
def test_a_command_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UsageError, match=r"--lora-rank -1|--repeats and --pairs-at-once are at least 1"):
        time_step(Step(**wrong))


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
    done = benchmark(program, "--against", "trl", "--responses", 3, *mix, "--output", file, repeats=1)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    check(figures["rows"][0], "trl")
    rows = figures["mix_rows"]
    assert [row["pairs_timed"] for row in rows] == [1] * 2
    assert sum(row["pairs"] for row in rows) > 4
    shares = (0.75, 0.25)
    ours = sum(share * row["seconds"]["group"] for share, row in zip(shares, rows, strict=True))
    assert figures["mix"]["seconds"]["group"] == pytest.approx(ours)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "room"),
    [
        (("--against", "trl", "--lora-rank", 2), 1e-5),
        (("--against", "trl-default", "--lora-rank", 2, "--compute.dtype", "bfloat16"), 0.05),
        (("--against", "trl-default", "--compute.dtype", "bfloat16"), 0.05),
    ],
)
def test_trl_agrees_under_lora_and_in_bf16(tmp_path, flags, room):
    pytest.importorskip("trl")
    mend_torchvision()  # peft imports transformers' image code
    pytest.importorskip("peft")
    file = tmp_path / "figures.json"
    program = ROOT / "tests" / "benchmark_beside_torch.py"
    done = benchmark(program, "--responses", 2, *flags, "--output", file, repeats=1)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    for name in ("loss", "gradient_norm"):
        ours, theirs = row[name].values()
        assert ours == pytest.approx(theirs, rel=room)
    assert row["loss"]["group"] != pytest.approx(0.6931, abs=1e-3)

"""launch/plan.py as a user starts it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmrlhf_jax.command import run_command

ROOT = Path(__file__).resolve().parents[2]
TINY, LARGE = str(ROOT / "configs" / "tiny.py"), str(ROOT / "configs" / "mm_dpo_onevision_7b.py")

RunPlan = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def main() -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location("launch_plan", ROOT / "launch" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch_plan"] = module  # where tyro looks the types of flags up
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def plan(main, monkeypatch, capsys) -> RunPlan:
    """Runs the program in this process, since starting one takes longer than its work; -> exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
        status = 0
        try:
            run_command(main)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run


def test_what_fits_says_so_and_ends_well(plan, tmp_path):
    status, text, error = plan(LARGE, "--device", "h100:8", "--shape", "7b", "--json", tmp_path / "plan.json")
    assert (status, error) == (0, "")
    assert "h100:8: 8 chips, mesh data 1, fsdp 8, tensor 1" in text
    assert "parameters that train, fp32" in text
    assert "fits h100:8: needs" in text
    assert "predicted, not measured" in text
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["fits"]
    assert figures["by"] == "estimate"
    kept, passing = (sum(figures["estimate"][kind].values()) for kind in ("kept", "passing"))
    known = figures["estimate"]["passing"]["gradients of a micro-batch"]
    assert figures["bytes_needed"] == pytest.approx(kept + known + 1.15 * (passing - known))


def test_what_does_not_fit_says_what_would_and_ends_with_1(plan):
    status, text, error = plan(LARGE, "--device", "h200:1", "--shape", "7b")
    assert status == 1
    assert error.startswith("error: does not fit h200:1: needs ")
    assert "--lora.rank 16" in text
    assert "h200:2" in text


def test_a_dataset_brings_its_own_buckets_and_a_directory_without_weights_is_enough(plan, small_world, tmp_path):
    assets = tmp_path / "model"
    assets.mkdir()
    for file in Path(small_world.model).iterdir():
        if file.suffix != ".safetensors":
            (assets / file.name).write_bytes(file.read_bytes())
    given = ("--model", assets, "--dataset", small_world.dataset)
    status, text, error = plan(TINY, *given, "--device", "rtx4090:2", "--json", tmp_path / "plan.json")
    assert (status, error) == (0, "")
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert 1 < len(figures["buckets"]) <= 4
    assert all(one["bucket"]["groups"] % 2 == 0 for one in figures["buckets"])
    assert text.count("  bucket ") == len(figures["buckets"])


def test_a_bucket_given_is_the_one_that_is_planned(plan):
    wanted = ("--shape", "0.5b", "--device", "h100:2", "--bucket", "4,2,1024,256", "--responses", "2")
    status, text, _ = plan(LARGE, *wanted)
    assert status == 0
    assert "bucket 4 x (2 tiles, 1024 + 256 tokens): 2 groups a device, 24 micro-batches a step" in text


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ([], 2, "say what to plan for"),
        (["--device", "h100:8"], 2, "names no model"),
        (["--device", "h100:8", "--shape", "7b", "--model", "m"], 2, "stands for a model that is not here"),
        (["--device", "h100:8", "--shape", "7b", "--bucket", "1,2,3"], 2, "GROUPS,TILES,PROMPT,RESPONSE"),
        (["--device", "h100:8", "--shape", "7b", "--bucket", "4,2,1024,256"], 1, "4 groups of a micro-batch do not"),
        (["--topology", "v5e:4x4", "--shape", "7b", "--all-buckets"], 2, "--dataset"),
        (["--device", "h100:8", "--model", "m", "--dataset", "d", "--all-buckets"], 2, "--device and --estimate"),
        (["--device", "h100:8", "--model", "m", "--dataset", "d", "--responses", "9"], 2, "--responses are those of a"),
        (["--device", "h100:8", "--shape", "7b", "--data.multiple", "0"], 2, "data.multiple is 0"),
        (["--device", "h100:8", "--shape", "7b", "--efficiency", "2"], 2, "--efficiency"),
        (["--device", "h100:8", "--shape", "7b", "--mesh.fsdp", "3"], 1, "does not multiply to the 8 devices"),
        (["--device", "h100:6", "--shape", "7b", "--mesh.fsdp", "1", "--mesh.tensor", "6"], 1, "does not divide over"),
        (["--device", "h100:8", "--slices", "2", "--shape", "7b"], 1, "set --mesh.data 2"),
        (["--device", "h100:8", "--model", "nowhere/here"], 1, "nowhere/here"),
    ],
)
def test_what_cannot_be_planned_is_one_message(plan, more, status, message):
    found, printed, error = plan(LARGE, *more)
    assert (found, printed) == (status, "")
    assert message in error


def test_without_libtpu_the_message_names_it_and_the_way_around(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    status, _, error = plan(LARGE, "--topology", "v5e:4x4", "--shape", "0.5b")
    assert status == 1
    assert 'pip install "libtpu==0.0.42.*"' in error
    assert "--estimate" in error
    status, text, _ = plan(LARGE, "--topology", "v5e:4x4", "--shape", "0.5b", "--estimate")
    assert status == 0
    assert "compiled in" not in text


@pytest.mark.slow
@pytest.mark.parity
def test_a_step_is_compiled_for_tpus_and_compared_with_the_estimate(small_world, tmp_path):
    """In a process of its own: libtpu serves one."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs the `parity` extra")
    done = subprocess.run(
        [
            *(sys.executable, "launch/plan.py", TINY, "--topology", "v5e:2x2", "--model", small_world.model),
            *("--bucket", "4,2,1280,256", "--json", str(tmp_path / "plan.json")),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "temporaries were estimated at" in done.stdout
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["by"] == "compiler"
    one = figures["compiled"][0]
    assert one["accumulate"]["temporaries"] > 0
    assert one["flops"] > 0.9 * figures["step"]["done_flops"] / figures["buckets"][0]["micro_batches"]

"""Programs of many stages: one job works on an output, whatever was killed halfway is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from another_job import held
from small_world import ROOT, command, environment

from mmrlhf_jax import stages
from mmrlhf_jax.command import INTERRUPTED, CommandError, UsageError
from mmrlhf_jax.lease import LeaseError, beside
from mmrlhf_jax.stages import Stages, claimed, worked_on
from mmrlhf_jax.study.at_once import Job, run_at_once

CLAIM = """
import sys
from pathlib import Path
from mmrlhf_jax.stages import claimed
with claimed(Path(sys.argv[1]), "study", {"boards": 3}):
    print("at work")
"""


def test_an_output_that_another_job_works_on_is_refused_and_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (
        held(tmp_path / ".out.lease"),
        pytest.raises(LeaseError, match=f"{output} is being written by another job: process 7 on elsewhere"),
        claimed(output, "quickstart", {}),
    ):
        pytest.fail("two at work")
    assert not output.exists()
    with claimed(output, "quickstart", {}):
        assert beside(output).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_program_works_for_the_one_that_started_it_and_for_nobody_else(tmp_path: Path) -> None:
    """A study starts itself once for every seed."""
    output = tmp_path / "out"
    words = [sys.executable, "-c", CLAIM, str(output)]
    with claimed(output, "study", {"boards": 3}):
        child = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
        assert (child.stdout, child.stderr) == ("at work\n", "")
        stranger = subprocess.run(
            [sys.executable, "-c", f"import subprocess; subprocess.run({words!r})"],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert f"LeaseError: {output} is being written by another job" in stranger.stderr
        assert beside(output).exists()
    with worked_on(output), pytest.raises(LeaseError, match="another job"), worked_on(output):
        pytest.fail("two at work")


def test_a_killed_start_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".quickstart.json.writing").write_text("{")
    with claimed(tmp_path, "quickstart", {"boards": 3}):
        pass
    with pytest.raises(UsageError, match="was made with other options"), claimed(tmp_path, "quickstart", {"boards": 4}):
        pass


def test_a_stage_is_done_when_its_record_and_its_product_are_there(tmp_path: Path) -> None:
    stages, product, times = Stages(tmp_path, ROOT / "launch"), tmp_path / "product", []

    def work() -> None:
        times.append(1)
        product.write_text("made")

    stages.call("make", product, work)
    stages.call("make", product, work)
    assert len(times) == 1
    (tmp_path / "stages" / ".make.json.writing").write_text("{")  # of a kill while it was written
    assert list(stages.taken()) == ["make"]
    product.unlink()
    stages.call("make", product, work)
    assert len(times) == 2


def test_a_product_that_has_gone_after_others_could_read_it_is_missed(tmp_path: Path) -> None:
    stages, first, second = Stages(tmp_path, ROOT / "launch"), tmp_path / "first", tmp_path / "second"
    stages.call("first", first, first.touch)
    stages.call("second", second, second.touch)
    os.utime(tmp_path / "stages" / "first.json", (1, 1))
    second.unlink()
    stages.call("second", second, second.touch)  # nothing came after it
    first.unlink()
    with pytest.raises(CommandError, match=f"{first}, which stage first made, has gone, and second may be made of it"):
        stages.call("first", first, first.touch)
    assert not first.exists()


def test_another_recipe_is_refused_and_other_words_about_it_are_not(tmp_path: Path) -> None:
    stages, product, recipe = Stages(tmp_path, ROOT / "launch"), tmp_path / "product", tmp_path / "dpo.py"
    base = ROOT / "configs" / "tiny.py"
    says = """
from dataclasses import replace
from mmrlhf_jax.training.recipe import read_recipe
recipe = replace(read_recipe({base!r}), seed={seed})
"""
    recipe.write_text('"""A recipe."""\n' + says.format(base=str(base), seed=3))
    stages.call("dpo", product, product.touch, [recipe])
    moved = tmp_path / "moved.py"
    moved.write_text(base.read_text())
    recipe.write_text('"""The recipe."""\n# as published\n' + says.format(base=str(moved), seed=3))
    stages.call("dpo", product, lambda: pytest.fail("again"), [recipe])
    moved.write_text(
        says.format(base=str(base), seed=4) + "recipe = replace(recipe, data=replace(recipe.data, epochs=2.0))"
    )
    with pytest.raises(CommandError, match=r"stage dpo was made by another dpo\.py than there is now: name another"):
        stages.call("dpo", product, lambda: pytest.fail("again"), [recipe])
    assert stages.taken()["dpo"].keys() == {"seconds", "cpu_seconds", "peak_gib"}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["quickstart", "reward_quickstart", "study"])
def test_every_such_program_refuses_what_another_works_on(program: str, tmp_path: Path) -> None:
    with held(tmp_path / ".out.lease"):
        words = command(program, "--output", tmp_path / "out")
        done = subprocess.run(words, env=environment(1), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert f"error: {tmp_path / 'out'} is being written by another job: process 7 on elsewhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


STARTS = """
import sys
from mmrlhf_jax.stages import start
start([sys.executable, *sys.argv[1:]]).wait()
"""
SAVES = """
import signal, sys, time
from pathlib import Path
from mmrlhf_jax.command import run_command

def main():
    signal.signal(signal.SIGTERM, lambda *_: (Path(sys.argv[1], "saved").touch(), sys.exit(75)))
    Path(sys.argv[1], "at work").touch()
    time.sleep(60)

run_command(main)
"""


def wait_until_there(file: Path) -> None:
    until = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < until, file
        time.sleep(0.02)


def test_a_program_saves_and_ends_when_the_one_that_started_it_was_killed(tmp_path: Path) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTS, "-c", SAVES, str(tmp_path)])
    wait_until_there(tmp_path / "at work")
    starter.kill()
    starter.wait()
    wait_until_there(tmp_path / "saved")


@pytest.mark.parametrize("at_once", [False, True])
def test_a_sigterm_while_a_program_is_started_ends_it(monkeypatch, tmp_path: Path, at_once: bool) -> None:
    """Between its start and its being known to whoever started it there is a moment."""
    started, start = [], stages.start
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stages, "_sigterm", stages._Sigterm())

    def start_and_be_asked(command, **options):
        started.append(start(command, **options))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    for place in ("mmrlhf_jax.stages.start", "mmrlhf_jax.study.at_once.start"):
        monkeypatch.setattr(place, start_and_be_asked)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    several = partial(run_at_once, [Job("sleeper", sleeper, tmp_path / "log")], 1, lambda: None)
    work = several if at_once else partial(stages._run, "sleeper", sleeper)
    try:
        stages.stop_on_sigterm()
        with pytest.raises(CommandError, match="interrupted") as told:
            work()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told.value.status == INTERRUPTED
    assert [process.poll() for process in started] == [-signal.SIGTERM]

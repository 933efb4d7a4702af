"""Law 6, rewards: SIGKILL of an annotation that generates critiques, at random moments, twenty times: no row is lost,
none is stored twice, and what is stored is what an undisturbed run stores, bit for bit."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from small_world import command, environment, make_small_world, run
from tiny_reward import write_reward_model

from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.datasets import open_dataset

pytestmark = pytest.mark.slow
KILLS = 20
GROUPS = 120


def arguments(dataset: str, judge: Path) -> tuple:
    return (
        "--dataset", dataset, "--model", judge, "--with", "reward", "--samples", 2, "--temperature", 1.0,
        "--max-new-tokens", 24, "--dtype", "float32", "--rows-per-part", 1, "--max-buckets", 2,
        "--decode.max-buckets", 2, "--decode.branches-per-device", 8,
    )  # fmt: skip


def parts(dataset: str) -> list[Path]:
    return sorted((Path(dataset) / "annotations").glob("reward-*/part-*.npz"))


def kill_once(dataset: str, judge: Path, *, parts_more: int, delay: float) -> None:
    """Starts the annotation and kills it `delay` seconds after so many more parts were written (0: after its start),
    or when it has written four."""
    before = len(parts(dataset))
    process = subprocess.Popen(
        command("annotate", *arguments(dataset, judge)), env=environment(1),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while len(parts(dataset)) < before + parts_more and process.poll() is None:
        time.sleep(0.002)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline and len(parts(dataset)) < before + 4:
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_twenty_random_kills_lose_and_double_nothing(tmp_path):
    world = make_small_world(tmp_path, GROUPS)
    judge = write_reward_model(tmp_path / "judge")
    undisturbed = str(tmp_path / "undisturbed")
    shutil.copytree(world.dataset, undisturbed)
    run("annotate", *arguments(undisturbed, judge))
    seed = int(os.environ.get("LAW_6_SEED", "4"))
    moments = random.Random(seed)
    for kill in range(KILLS):
        more = moments.randrange(4) if kill % 5 else 0
        kill_once(world.dataset, judge, parts_more=more, delay=moments.uniform(0, 0.3 if more else 6.0))
    killed = len(parts(world.dataset))
    assert 0 < killed < GROUPS
    run("annotate", *arguments(world.dataset, judge))
    stored, wanted = (
        store.read(open_dataset(path))  # raises where a row is stored twice
        for path in (world.dataset, undisturbed)
        for store in find(path, "reward")
    )
    print(f"seed {seed}: {KILLS} kills, {killed} of {GROUPS} rows stored before the last run, {len(stored)} after it")
    assert stored.keys() == wanted.keys() == set(range(GROUPS))
    assert len(parts(world.dataset)) == GROUPS
    for row, arrays in wanted.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(stored[row][name], values, err_msg=f"row {row} {name}")
    readable = [next(Path(path).glob("annotations/reward-*/rewards.jsonl")) for path in (world.dataset, undisturbed)]
    assert readable[0].read_bytes() == readable[1].read_bytes()


def _to_its_end(terminal: int) -> str:
    """What is still to come from a terminal; Linux reports the last writer's leaving as an error."""
    said = b""
    with contextlib.suppress(OSError):
        while more := os.read(terminal, 4096):
            said += more
    os.close(terminal)
    return said.decode()


def test_sigterm_keeps_what_is_done_and_asks_to_be_run_again(tmp_path):
    world = make_small_world(tmp_path, 30)
    judge = write_reward_model(tmp_path / "judge")
    one_part = [*arguments(world.dataset, judge), "--rows-per-part", 1000, "--decode.steps", 8]
    terminal, theirs = pty.openpty()  # a log is told every half minute only, a terminal at once
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        command("annotate", *one_part), env=environment(1), stdout=subprocess.PIPE, stderr=theirs, text=True,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said = ""
    while not re.search(r"[1-9]\d*/30 ", said):  # the bar: some groups are done
        said += os.read(terminal, 4096).decode()
    process.terminate()
    rest = _to_its_end(terminal)
    process.communicate(timeout=60)
    assert process.returncode == 75, said + rest
    assert "interrupted; what is done is kept" in rest
    (store,) = find(world.dataset, "reward")
    assert 0 < len(store.done()) < 30
    run("annotate", *one_part)
    assert store.done() == set(range(30))

"""Processes that load data end with the one that started them, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINER = """
import os, signal, sys, time
from types import SimpleNamespace
from mmrlhf_jax.data.pipeline import micro_batches

def load(number):
    return number, os.getpid()

if __name__ == "__main__":
    plan = SimpleNamespace(first_of_step=[0], micro_batches=tuple(range(1000)))
    for _, (number, worker) in micro_batches(plan, load, workers=1):
        print(worker, flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_a_killed_trainer_leaves_no_loader_behind(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text(TRAINER)
    with subprocess.Popen([sys.executable, tmp_path / "trainer.py"], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout
        loader = int(trainer.stdout.readline())
        assert loader != trainer.pid
        assert runs(loader)
        trainer.kill()
    until = time.monotonic() + 20
    while runs(loader) and time.monotonic() < until:
        time.sleep(0.1)
    assert not runs(loader)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

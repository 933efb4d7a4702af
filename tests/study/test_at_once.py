"""Programs side by side: no more than asked, each with its log, and none left behind."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from mmrlhf_jax.command import CommandError
from mmrlhf_jax.study.at_once import Job, run_at_once

MARKED = """
import pathlib, sys, time
own = pathlib.Path(sys.argv[1])
own.write_text(""); print(own.name)
print(len(list(own.parent.glob("running-*"))))
time.sleep(0.3)
own.unlink()
"""


def job(folder: Path, name: str, program: str) -> Job:
    return Job(name, [sys.executable, "-c", program, str(folder / f"running-{name}")], folder / "logs" / name)


def test_no_more_run_than_are_asked_for_and_each_keeps_what_it_prints(tmp_path: Path) -> None:
    looked = []
    jobs = [job(tmp_path, name, MARKED) for name in "abcd"]
    run_at_once(jobs, 2, lambda: looked.append(1), every=0.02)
    assert len(looked) > 2
    for one in jobs:
        name, together = one.log.read_text().split()
        assert name == f"running-{one.name}"
        assert int(together) <= 2
    assert not list(tmp_path.glob("running-*"))


@pytest.mark.parametrize(("code", "status"), [(3, 1), (75, 75)])
def test_one_that_fails_stops_the_others(tmp_path: Path, code: int, status: int) -> None:
    began = time.perf_counter()
    jobs = [
        job(tmp_path, "long", "import time; time.sleep(60)"),
        job(tmp_path, "bad", f"import sys; sys.exit({code})"),
        job(tmp_path, "never", MARKED),
    ]
    with pytest.raises(CommandError, match=rf"bad ended with exit code {code}, .*logs/bad") as raised:
        run_at_once(jobs, 2, lambda: None, every=0.02)
    assert raised.value.status == status
    assert time.perf_counter() - began < 30
    assert not jobs[2].log.exists()

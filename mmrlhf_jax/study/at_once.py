"""Several programs at once, each with a log of its own: small ones leave most of two cores idle one after another."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrlhf_jax.command import INTERRUPTED, CommandError
from mmrlhf_jax.stages import raise_if_asked, sigterm_held_back, start


@dataclass(frozen=True)
class Job:
    """A command under a name; what it prints is added to `log`."""

    name: str
    command: Sequence[str]
    log: Path


def run_at_once(jobs: Sequence[Job], most: int, watch: Callable[[], object], every: float = 1.0) -> None:
    """Runs all jobs, `most` at a time and in order; `watch` is called every so many seconds.

    The first that fails stops the others, with SIGTERM, and raises CommandError, whose exit code says whether it was
    interrupted; so does whatever stops this process.
    """
    waiting, running = list(jobs), dict[str, tuple[Job, subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            while waiting and len(running) < most:
                job = waiting.pop(0)
                with sigterm_held_back():
                    running[job.name] = (job, _started(job))
                raise_if_asked()
            for name, (job, process) in list(running.items()):
                status = process.poll()
                if status:
                    code = INTERRUPTED if status == INTERRUPTED else 1
                    raise CommandError(f"{name} ended with exit code {status}, see the end of {job.log}", code)
                if status == 0:
                    del running[name]
            watch()
            if running:
                time.sleep(every)
    finally:
        for _, process in running.values():
            if process.poll() is None:
                process.terminate()
        for _, process in running.values():
            process.wait()


def _started(job: Job) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return start(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

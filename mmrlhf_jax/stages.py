"""Running the programs under launch/ one after another: each is a stage that is run once, timed and resumed.

For programs that make something of many steps on one machine. A stage is done when its record and its product exist;
what a stage does when it was stopped halfway is the affair of the program it runs. Where a stage was made by another
recipe than is there now, or its product has gone after later stages could read it, nothing is guessed: it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from etils import epath

from mmrlhf_jax.command import INTERRUPTED, PARENT, CommandError, UsageError
from mmrlhf_jax.lease import beside, held_by_parent, lease
from mmrlhf_jax.storage import write_whole
from mmrlhf_jax.training.recipe import Recipe, flatten, read_recipe

TAKEN = ("seconds", "cpu_seconds", "peak_gib")


@dataclass(frozen=True)
class Stages:
    """The stages of one directory; each leaves what it took in OUTPUT/stages/ and is run once."""

    output: Path
    launch: Path
    """the directory of the programs"""

    def program(self, name: str, product: Path, program: str, *arguments: object) -> None:
        """Runs LAUNCH/`program`.py as a user would, unless it has been.

        Raises CommandError when the program fails, with its exit code where it was interrupted.
        """
        words = list(map(str, arguments))
        command = [sys.executable, str(self.launch / f"{program}.py"), *words]
        self.call(name, product, lambda: _run(name, command), [Path(word) for word in words if word.endswith(".py")])

    def call(self, name: str, product: Path, work: Callable[[], object], recipes: Sequence[Path] = ()) -> None:
        """Does `work`, which makes `product` as `recipes` say, unless it has been done.

        Raises CommandError where it was done by other recipes, or what it made has gone and others may be made of it.
        """
        record = epath.Path(self.output / "stages" / f"{name}.json")
        made_by = {path.name: what_it_says(read_recipe(path)) for path in recipes}
        if record.exists():
            self._check(name, record, product, made_by)
            if product.exists():
                print(f"[{name}] done already")
                return
        print(f"[{name}] {product}", flush=True)
        with _taken() as taken:
            work()
        record.parent.mkdir(exist_ok=True)
        write_whole(record, (json.dumps({**taken, **({"recipes": made_by} if made_by else {})}) + "\n").encode())

    def _check(self, name: str, record: epath.Path, product: Path, made_by: Mapping[str, str]) -> None:
        cure = f"name another --output, or remove {self.output} to make everything anew"
        if json.loads(record.read_text()).get("recipes", made_by) != made_by:
            raise CommandError(f"stage {name} was made by another {', '.join(made_by)} than there is now: {cure}")
        records = {stage: file.stat().st_mtime_ns for stage, file in self._records().items()}
        later = [stage for stage, made in records.items() if made > records[name]]
        if later and not product.exists():
            raise CommandError(
                f"{product}, which stage {name} made, has gone, and {', '.join(later[:8])} may be made of it: put it "
                f"back, {cure}"
            )

    def _records(self) -> dict[str, Path]:
        """By stage, in order."""
        files = (self.output / "stages").glob("*.json")
        return {file.stem: file for file in sorted(files, key=lambda file: file.stat().st_mtime)}

    def taken(self) -> dict[str, dict[str, float]]:
        """Seconds, CPU seconds and peak GiB of every stage, in order."""
        found = {stage: json.loads(file.read_text()) for stage, file in self._records().items()}
        return {stage: {name: one[name] for name in TAKEN} for stage, one in found.items()}

    def summary(self) -> list[str]:
        """What every stage took, its share of all, and what all of them did, a line each."""
        taken = self.taken()
        seconds, cpu = (sum(t[name] for t in taken.values()) for name in ("seconds", "cpu_seconds"))
        return [
            *(
                f"{name:26} {t['seconds']:7.1f} s {t['cpu_seconds']:7.1f} CPU s {t['cpu_seconds'] / cpu:6.1%}"
                for name, t in taken.items()
            ),
            f"{'all stages':26} {seconds:7.1f} s {cpu:7.1f} CPU s, peak memory "
            f"{max(t['peak_gib'] for t in taken.values()):.1f} GiB",
        ]


def what_it_says(recipe: Recipe) -> str:
    """sha256 of what a recipe comes to, whatever it is built on, and wherever its template lies."""
    flat = flatten(recipe)
    if template := recipe.reward.template:
        flat["reward.template"] = Path(template).read_text()
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


@contextmanager
def claimed(output: Path, program: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Makes OUTPUT the directory of `program` with these options, and holds its lease within, unless the process that
    started this one does.

    Raises UsageError where OUTPUT is something else's, LeaseError where another job works there.
    """
    with nullcontext() if held_by_parent(beside(output)) else worked_on(output):
        _claim(output, program, options)
        yield


@contextmanager
def worked_on(output: Path) -> Iterator[None]:
    """Holds the lease of a directory of stages. Raises LeaseError where another job does."""
    with lease(beside(output), str(output)):
        yield


def _claim(output: Path, program: str, options: Mapping[str, Any]) -> None:
    stated = json.dumps(dict(options), indent=2) + "\n"
    file = epath.Path(output / f"{program}.json")
    if file.exists() and file.read_text() != stated:
        raise UsageError(f"{output} was made with other options (see {file}): name another --output or remove it")
    killed = f".{file.name}.writing"  # all that is left of a program killed at its very start
    if output.exists() and not file.exists() and any(found.name != killed for found in output.iterdir()):
        raise UsageError(f"{output} exists and holds no {program}: name another --output")
    output.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_whole(file, stated.encode())


@dataclass
class _Sigterm:
    """Whether it came, and whether what it does is held back for a moment."""

    came: bool = False
    held: bool = False


_sigterm = _Sigterm()


def stop_on_sigterm() -> None:
    """SIGTERM ends the stage that runs, which saves what it has, and this program with exit code 75."""
    _sigterm.came = False
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, _: FrameType | None) -> None:
    first, _sigterm.came = not _sigterm.came, True
    if first and not _sigterm.held:  # a second one would only keep the first from ending what runs
        raise_if_asked()


def raise_if_asked() -> None:
    """Raises CommandError, with exit code 75, if SIGTERM came: it may have been held back."""
    if _sigterm.came:
        raise CommandError("interrupted; run the same command to go on", INTERRUPTED)


@contextmanager
def sigterm_held_back() -> Iterator[None]:
    """For starting a program: a signal that came between its start and its being known would leave it running."""
    _sigterm.held = True
    try:
        yield
    finally:
        _sigterm.held = False


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a program that ends when this one does (command.py)."""
    return subprocess.Popen(command, env={**os.environ, PARENT: str(os.getpid())}, **options)


def _run(name: str, command: list[str]) -> None:
    print("  python " + shlex.join(command[1:]), flush=True)
    process = None
    try:
        with sigterm_held_back():
            process = start(command)
        raise_if_asked()
        status = process.wait()
    except BaseException:  # stopped: so is the program, which saves what it has
        if process is not None:
            process.terminate()
            process.wait()
        raise
    if status:
        code = INTERRUPTED if status == INTERRUPTED else 1
        raise CommandError(f"stage {name} ended with exit code {status}, see above", code)


@contextmanager
def _taken() -> Iterator[dict[str, float]]:
    """Filled on leaving: wall and CPU seconds of what ran within, programs included."""
    taken: dict[str, float] = {}
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield taken
    taken |= dict(zip(TAKEN, (time.perf_counter() - wall, _cpu_seconds() - cpu, _peak_gib()), strict=True))


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_gib() -> float:
    """Largest resident memory any program has had so far."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / unit

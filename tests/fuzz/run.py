"""Feed readers spoiled files and say what came of it: `run.py READER|all --executions 20000 --seed N`.

Each reader runs in a process of its own, which a watchdog ends when one file keeps it too long; a process that dies is
started again behind the file that killed it. A reader fails by any exception that it does not declare, by more than 5 s
of CPU on one file, by opening a file outside its folder, or by more than 2 GB of memory. `--only N` runs one execution
alone, with its traceback: a seed and a number name a case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import mmap
import os
import resource
import secrets
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from covered import Lines, by_module, lines_in, share

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

CPU_SECONDS = 5.0
WALL_SECONDS = 60.0  # a process that says nothing for so long is ended: the machine may be busy with other things
MEMORY = 2 * 10**9
ADDRESS_SPACE = 12 * 2**30  # keeps a bomb from taking the machine down with it
SAVE_EVERY = 200
FAILURES_SHOWN = 12


@dataclass
class Tally:
    """What is known of a reader after so many executions."""

    done: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, int] = field(default_factory=dict)  # what -> the first execution with it
    slowest: tuple[float, int] = (0.0, 0)
    peak: int = 0
    lines: set[tuple[str, int]] = field(default_factory=set)

    def dump(self, file: Path) -> None:
        known = {**vars(self), "lines": sorted(self.lines)}
        aside = file.with_suffix(".writing")
        aside.write_text(json.dumps(known))
        aside.replace(file)

    @classmethod
    def load(cls, file: Path) -> Tally:
        if not file.exists():
            return cls()
        known = json.loads(file.read_text())
        known |= {"outcomes": Counter(known["outcomes"]), "slowest": tuple(known["slowest"])}
        return cls(**{**known, "lines": {(name, line) for name, line in known["lines"]}})

    def fail(self, what: str, number: int) -> None:
        self.failures.setdefault(what, number)


class Opened:
    """Files that are opened while a reader runs, outside its folder and outside what Python itself reads."""

    def __init__(self, folder: Path):
        own = {os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix), *map(os.path.realpath, sys.path)}
        system = (
            "/proc",  # this process, the machine: whose lease an output has
            "/usr/share/zoneinfo",
            "/usr/lib",
            "/etc/localtime",
            "/etc/mime.types",
            "/sys",
        )
        self._allowed = tuple(sorted({str(folder.resolve()), *own, *system} - {""}))
        self._outside = str(folder.resolve() / "outside")
        self.watching = False
        self.strange: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching or event != "open" or not isinstance(args[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        if path.startswith(self._outside) or not path.startswith(self._allowed):
            self.strange.append(path)


def work(reader: Any, seed: int, numbers: range, skipped: set[int], state_file: Path, beat: mmap.mmap) -> None:
    """The process of one reader: executions `numbers`, from where an earlier one stopped."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{reader.name}-"))
    # an audit hook sees what `open` is asked for; links out of the folder are resolved
    try:
        state = reader.start(folder)
        tally, opened = Tally.load(state_file), Opened(folder)
        lines = Lines(reader.modules, tally.lines)
        for number in numbers[tally.done :]:
            if number not in skipped:
                _execute(reader, state, Random(f"{seed} {reader.name} {number}"), number, tally, lines, opened, beat)
            tally.done += 1
            tally.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if tally.peak > MEMORY:
                tally.fail(f"{tally.peak / 1e9:.1f} GB of memory", number)
                tally.lines = lines.seen
                tally.dump(state_file)
                os._exit(3)  # the peak of a process never falls: the next executions get a new one
            if tally.done % SAVE_EVERY == 0 or number == numbers[-1]:
                tally.lines = lines.seen
                tally.dump(state_file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _execute(
    reader: Any, state: Any, rng: Random, number: int, tally: Tally, lines: Lines, opened: Opened, beat: mmap.mmap
) -> None:
    made = reader.make(rng, state)
    beat[:16] = struct.pack("<qd", number, time.monotonic())
    started = time.process_time()
    opened.watching = True
    if reader.modules and (number < 3_000 or number % 4 == 0):
        threading.settrace(lines.call)  # pictures are proven by threads
        sys.settrace(lines.call)
    found: list[str] = []
    try:
        found.extend(reader.run(state, made))
    except reader.refusals as error:
        found.append(f"refused: {_class(error)}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        tally.fail(f"{type(error).__name__}: {_class(error)} at {_where(error)}", number)
        found.append(f"CRASH {type(error).__name__}")
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        opened.watching = False
    took = time.process_time() - started
    tally.outcomes.update(set(found) or {"nothing in it"})
    tally.slowest = max(tally.slowest, (round(took, 3), number))
    if took > CPU_SECONDS:
        tally.fail(f"over {CPU_SECONDS:g} s", number)
    for path in set(opened.strange):
        tally.fail(f"opened {path}", number)
    opened.strange.clear()


def _class(error: BaseException) -> str:
    from texts import classed

    return classed(str(error)[:4000])


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "mmrlhf_jax" in frame.filename] or list(frames)
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def watch(reader: Any, seed: int, executions: int, folder: Path) -> Tally:
    """Runs a reader to its end, whatever becomes of its processes."""
    state_file, numbers, skipped, beat = folder / f"{reader.name}.json", range(executions), set(), mmap.mmap(-1, 16)
    deaths: dict[str, int] = {}
    while True:
        beat[:16] = struct.pack("<qd", -1, time.monotonic())
        pid = os.fork()
        if not pid:
            _be_child(reader, seed, numbers, skipped, state_file, beat)
        status, ended = _wait(pid, beat)
        number, _ = struct.unpack("<qd", beat[:16])
        tally = Tally.load(state_file)
        if not ended and status == 0:
            for what, first in deaths.items():
                tally.fail(what, first)
            return tally
        if not ended and os.waitstatus_to_exitcode(status) == 3:
            continue
        if not ended and os.WIFEXITED(status):
            raise SystemExit(f"{reader.name}: the fuzzer itself is broken, see above")
        what = f"hangs over {WALL_SECONDS:g} s" if ended else f"process died ({os.waitstatus_to_exitcode(status)})"
        deaths.setdefault(what, number)
        skipped.add(number)


def _be_child(reader: Any, seed: int, numbers: range, skipped: set[int], state_file: Path, beat: mmap.mmap) -> None:
    status = 1
    try:
        quiet()
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        work(reader, seed, numbers, skipped, state_file, beat)
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.__stdout__)
    finally:
        sys.stdout.flush()
        os._exit(status)


def quiet() -> None:
    """Libraries print what they think of damaged files, by the thousand."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _wait(pid: int, beat: mmap.mmap) -> tuple[int, bool]:
    """Exit status, and whether it had to be ended."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status, False
        if time.monotonic() - struct.unpack("<qd", beat[:16])[1] > WALL_SECONDS:
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1], True
        time.sleep(0.05)


def report(reader: Any, tally: Tally, seconds: float, full: bool) -> str:
    everything = lines_in(reader.modules)
    text = [
        f"{reader.name}: {tally.done} executions in {seconds:.0f} s, {len(tally.outcomes)} outcomes, slowest "
        f"{tally.slowest[0]:.2f} s (execution {tally.slowest[1]}), peak {tally.peak / 1e6:.0f} MB, "
        f"{share(everything, tally.lines)}"
    ]
    if full:
        text += [f"  {count:7} {what}" for what, count in tally.outcomes.most_common()]
        text += [f"  {row}" for row in by_module(everything, tally.lines)]
    text += [f"  FAILED  {what}: --only {number}" for what, number in list(tally.failures.items())[:FAILURES_SHOWN]]
    return "\n".join(text)


def fuzz(readers: list[Any], executions: int, seed: int, full: bool = True) -> int:
    """How many readers failed."""
    failed, seen = 0, set[tuple[str, int]]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for reader in readers:
            started = time.monotonic()
            tally = watch(reader, seed, executions, Path(folder))
            print(report(reader, tally, time.monotonic() - started, full), flush=True)
            failed += bool(tally.failures)
            seen |= tally.lines
    everything = lines_in({part for reader in readers for part in reader.modules})
    print("all readers together:", *by_module(everything, seen), sep="\n  ")
    print(f"seed {seed}: {failed} of {len(readers)} readers failed")
    return failed


def alone(reader: Any, seed: int, number: int) -> None:
    """One execution, in this process, with its traceback."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        state = reader.start(Path(folder))
        made = reader.make(Random(f"{seed} {reader.name} {number}"), state)
        print(f"{str(made)[:2000]}")
        for file in filter(os.path.isfile, map(str, [made.get("file", "")])):
            print(Path(file).read_bytes()[:4000])
        with contextlib.suppress(*reader.refusals):
            print(list(reader.run(state, made)))


def main() -> None:
    from readers import ALL

    known = {reader.name: reader for reader in ALL}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+", metavar="READER", help=f"all, or some of {', '.join(known)}")
    parser.add_argument("--executions", type=int, default=20_000, help="of each reader (default 20000)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--only", type=int, help="one execution, with its traceback")
    parser.add_argument("--brief", action="store_true", help="no list of outcomes")
    given = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # outcomes quote what stood in the files
    if unknown := [name for name in given.readers if name not in known and name != "all"]:
        parser.error(f"there is no reader {unknown[0]!r}; there are {', '.join(known)}")
    chosen = list(known.values()) if "all" in given.readers else [known[name] for name in given.readers]
    print(f"seed {given.seed}", flush=True)
    if given.only is not None:
        alone(chosen[0], given.seed, given.only)
        return
    sys.exit(1 if fuzz(chosen, given.executions, given.seed, not given.brief) else 0)


if __name__ == "__main__":
    main()

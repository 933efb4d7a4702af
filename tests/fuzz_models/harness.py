"""Runs one reader on many mutated cases and keeps the figures: outcomes, the slowest, memory, lines, forbidden acts."""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any
from unittest import mock

HANG_SECONDS, MEMORY_BYTES = 5.0, 2 * 2**30  # seconds of this process: what else the machine does is not counted
WAIT_SECONDS = 30.0  # on the clock, where a case waits and works nothing, as for the child that renders templates
REFUSALS = (ValueError, OSError)  # what command.py shows as one message
GUARDED, GUARD_SECONDS = 50, 600.0  # a thread each time, which takes as long as many a case
LINES = "FUZZ_MODELS_LINES"  # names the file to which template_child.py notes its lines
_CHILDREN = ("template_process.py", "template_child.py")
_SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # cases live for milliseconds; disks take as long


@dataclass(frozen=True)
class Reader:
    """`write(rng, directory)` makes a case there, `read(directory)` reads it as the programs do; a refusal is one of
    REFUSALS that names the case. `files`: {module file: functions whose lines are not counted}, for a reason that a
    comment tells. `traced`: every how many executions lines are counted, which takes up to twice as long."""

    name: str
    write: Callable[[Random, Path], None]
    read: Callable[[Path], Any]
    files: dict[str, tuple[str, ...]]
    names_case: bool = True
    traced: int = 10


@dataclass
class Figures:
    executions: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # on the clock, of a machine that may do other things too
    longest_work: float = 0.0  # seconds of the processor
    failures: list[str] = field(default_factory=list)
    lines: set[tuple[str, int]] = field(default_factory=set)
    missed: list[str] = field(default_factory=list)
    coverage: float = 0.0
    rss: int = 0


class _Watch:
    """What the process does while a case is read; audit hooks can never be removed, so there is one."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.broken: list[str] = []
        home = [sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), str(Path(__file__).resolve().parents[2])]
        if compiled := os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # of jax, where a tiny program took long to compile
            home.append(compiled)
        self.allowed = tuple(os.path.realpath(path) + os.sep for path in home)
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            self.opened(os.fsdecode(arguments[0]))
        elif event in ("os.system", "socket.connect", "socket.getaddrinfo", "pickle.find_class") or (
            event == "subprocess.Popen" and not any(name in repr(arguments[1]) for name in _CHILDREN)
        ):
            self.broken.append(f"{event} {arguments!r}"[:200])

    def opened(self, path: str) -> None:
        assert self.root is not None
        lies, temporary = os.path.realpath(path), os.path.realpath(tempfile.gettempdir()) + os.sep
        of_reader = lies.startswith((temporary + "tmp", temporary + "mmrlhf-assets-"))
        if not lies.startswith((self.root + os.sep, *self.allowed)) and not of_reader and lies != "/dev/null":
            self.broken.append(f"opened {path}")


_watch: _Watch | None = None


@contextmanager
def _watched(directory: Path) -> Any:
    global _watch
    _watch = _watch or _Watch()
    _watch.broken = []
    _watch.root = os.path.realpath(directory)
    try:
        yield _watch
    finally:
        _watch.root = None


def fuzz(reader: Reader, executions: int, seed: int) -> Figures:
    """The same cases for the same seed, on any machine."""
    with mock.patch.object(tempfile, "tempdir", _SCRATCH or tempfile.gettempdir()):
        return _fuzz(reader, executions, seed)


def _fuzz(reader: Reader, executions: int, seed: int) -> Figures:
    figures, before = Figures(), _peak()
    top = Path(tempfile.mkdtemp(prefix="fuzz-models-"))
    (top / "outside").mkdir()
    (top / "outside" / "secret").write_text('{"model_type": "secret"}')
    with suppress(KeyboardInterrupt):  # what was done until then is shown
        for number in range(executions):
            case = top / "case"
            shutil.rmtree(case, ignore_errors=True)
            case.mkdir()
            reader.write(Random(f"{reader.name} {seed} {number}"), case)
            if number % GUARDED == 0:  # hung inside a library in C, which no signal handler interrupts
                faulthandler.dump_traceback_later(GUARD_SECONDS, exit=True)
            _execute(reader, case, number, figures)
            figures.executions += 1
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(top)
    if notes := os.environ.get(LINES):
        noted = Path(notes).read_text().splitlines() if os.path.exists(notes) else []
        figures.lines |= {(file, int(line)) for file, _, line in (note.partition("\t") for note in noted)}
    figures.rss = _peak()
    if figures.rss - before > MEMORY_BYTES:  # before: what else this process has done, other tests
        figures.failures.append(f"{figures.rss - before:,} bytes of memory more")
    wanted = _lines_of(reader)
    figures.coverage = len(wanted & figures.lines) / len(wanted) if wanted else 1.0
    figures.missed = [f"{Path(file).name}:{line}" for file, line in sorted(wanted - figures.lines)]
    return figures


def _peak() -> int:
    """Bytes this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _execute(reader: Reader, case: Path, number: int, figures: Figures) -> None:
    main = threading.current_thread() is threading.main_thread()
    began, worked = time.monotonic(), time.process_time()
    if main:
        signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
    try:
        with _watched(case) as watch, _lines(reader, figures.lines, number % reader.traced == 0):
            reader.read(case)
        outcome = "read"
    except REFUSALS as error:
        outcome = f"{type(error).__name__}: {_shape(str(error), case)}"
        if reader.names_case and str(case) not in str(error):
            figures.failures.append(f"case {number}: the refusal names no file: {error!r}"[:400])
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"CRASH {type(error).__name__}: {str(error)[:200]}"
        figures.failures.append(f"case {number}: {outcome}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}")
    finally:
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
    worked = time.process_time() - worked
    if worked > HANG_SECONDS:
        figures.failures.append(f"case {number}: {worked:.1f} s of the processor, {outcome}")
    figures.failures += [f"case {number}: {act}" for act in watch.broken]
    figures.slowest = max(figures.slowest, time.monotonic() - began)
    figures.longest_work = max(figures.longest_work, worked)
    figures.outcomes[outcome] += 1


def _too_long(*_: Any) -> None:
    raise AssertionError("it hangs")


def _shape(message: str, case: Path) -> str:
    """A message without what of it is the case's."""
    text = message.replace(str(case), "").split("\n")[0]
    text = re.sub(r"/\S*/(tmp|mmrlhf-assets-)\w+", "", text)
    text = re.sub(r"['\"].*?\.\.\. \(\d+ characters\)", "'..'", text)
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'..'", text)
    text = re.sub(r"[\[{(].*[\]})]", "[..]", text)
    return re.sub(r"-?\d[\d,.e+]*", "N", text)[:90]


@contextmanager
def _lines(reader: Reader, seen: set[tuple[str, int]], on: bool) -> Any:
    files = set(reader.files)

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def called(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename in files else None

    sys.settrace(called if on else None)
    try:
        yield
    finally:
        sys.settrace(None)


def _lines_of(reader: Reader) -> set[tuple[str, int]]:
    """Every line with code in the functions of the reader's modules; what runs at import is not counted."""
    out: set[tuple[str, int]] = set()
    for file, without in reader.files.items():
        whole = compile(Path(file).read_text(), file, "exec")
        for code in _functions(whole, without):
            lines = {line for _, _, line in code.co_lines() if line is not None and line != code.co_firstlineno}
            out |= {(file, line) for line in lines}
    return out


def _functions(code: CodeType, without: tuple[str, ...]) -> list[CodeType]:
    out = []
    for inner in code.co_consts:
        at_import = code.co_name == "<module>" and isinstance(inner, CodeType) and inner.co_name == "<genexpr>"
        if isinstance(inner, CodeType) and inner.co_name not in without and not at_import:
            is_function = bool(inner.co_flags & 0x2)  # CO_NEWLOCALS: class bodies have it not
            out += ([inner] if is_function else []) + _functions(inner, without)
    return out

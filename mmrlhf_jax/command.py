"""How a program of launch/ ends: exit codes, one clear message, no traceback.

0 done, 1 the work failed, 2 bad usage, 75 interrupted (run the same command again to resume).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

# transformers advises whoever imports it to install torch; no program here needs it
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


INTERRUPTED = 75
PARENT = "MMRLHF_PARENT"  # environment variable: the number of the process that started this one, and waits for it


class CommandError(Exception):
    """The work failed; the message says what is wrong, where, and what to do."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class UsageError(CommandError):
    """The command line contradicts itself."""

    def __init__(self, message: str):
        super().__init__(message, status=2)


def run_command(main: Callable[[], None]) -> None:
    """Run a program and leave the process with its exit code.

    Errors of input (`CommandError`, `ValueError`, `OSError`) become one message on stderr. Anything else is a defect of
    ours and keeps its traceback; MMRLHF_TRACEBACK=1 shows it for all. A program that another one started and waits for
    is asked to stop, as by SIGTERM, when that one is gone: nobody would, and it holds devices and a lease.
    """
    if (parent := os.environ.pop(PARENT, "")).isdigit():
        threading.Thread(target=_end_with, args=(int(parent),), name="parent", daemon=True).start()
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (CommandError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # who read our output (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
            sys.exit(1)
        if os.environ.get("MMRLHF_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {printable(str(error) or type(error).__name__)}", file=sys.stderr)
        sys.exit(error.status if isinstance(error, CommandError) else 1)


def read_arguments(what: Any, **options: Any) -> Any:
    """`tyro.cli`. Raises UsageError for a value that its class refuses: where a class's flags have no prefix, tyro lets
    the error pass as it is."""
    import tyro

    try:
        return tyro.cli(what, **options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    with suppress(OSError, ValueError):  # its terminal may have gone with it
        print("the program that started this one has gone", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _nobody_reads() -> bool:
    """Whether our output, or what we say beside it, is a pipe whose other end is closed."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # there is none
            poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def progress_line(items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """tqdm's, with its options; a log, which keeps every line, gets one at most every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(items, mininterval=interval, maxinterval=max(10.0, interval), **options)


def printable(text: str) -> str:
    """A message with its line breaks, each line fit for a terminal; lists of problems keep their indentation."""
    lines = text.strip().split("\n")
    return "\n".join(" " * (len(line) - len(line.lstrip(" "))) + one_line(line) for line in lines)


def one_line(text: str) -> str:
    """Text from data, fit for a terminal: spaces for line breaks, no control or direction-changing characters."""
    return "".join(c for c in " ".join(text.split()) if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))

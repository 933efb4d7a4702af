"""Whether the other processes of a job are still at work. One that dies or hangs leaves the others waiting in a
collective, for ever and in silence.

Every process tells the job's coordinator, every few seconds, that it lives and what it is doing, and reads what the
others told. Who sees another silent, failed or in everybody's way ends with a message that names it, the step and what
it was doing. What may take any time (compiling, evaluating, saving) is never held against anybody. jax itself watches
connections only: it notices a dead process but not a stuck one, and neither names.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

from mmrlhf_jax.command import INTERRUPTED, CommandError

BEAT = 4.0  # seconds between signs of life
SILENT = 36.0  # seconds without one after which a process is taken for dead
JAX_SILENT = 100  # the same for jax's own watch, whose message names nobody: by half of it, it must come second
STALL = 300.0  # seconds that a step may take, however short they are otherwise
TIMES = 20.0  # and that many times the longest of the last steps
ENDING = 10.0  # seconds for a process to find out for itself what ended another, and say so
KEY = "mmrlhf/peers/"


@dataclass(frozen=True)
class Place:
    """What a process is doing, at which step; `limit`: seconds after which nobody can be doing it still, None = any."""

    step: int = 0
    what: str = "starting"
    limit: float | None = None


@dataclass(frozen=True)
class Sign:
    """What a process told: `count` rises with every sign of life."""

    count: int
    host: str
    state: str  # running, done, failed
    place: Place
    message: str = ""


@dataclass
class _Here:
    """What this process does, written by its loop and read by its watch."""

    place: Place = field(default_factory=Place)
    state: str = "running"
    message: str = ""
    laps: deque[float] = field(default_factory=lambda: deque(maxlen=16))  # seconds


_here = _Here()


def doing(what: str, step: int | None = None, *, bounded: bool = False) -> None:
    """States what this process does from here on. `bounded`: it is part of a step, of which it is known by now how
    long they take."""
    limit = max(STALL, TIMES * max(_here.laps)) if bounded and _here.laps else None
    _here.place = Place(_here.place.step if step is None else step, what, limit)


def step_took(seconds: float) -> None:
    """For the limit of the steps to come."""
    _here.laps.append(seconds)


def client() -> Any:
    """jax's connection to the coordinator of a job of several processes. jax has no public way to it."""
    from jax._src import distributed

    return distributed.global_state.client


@contextmanager
def watched_processes() -> Iterator[None]:
    """Within it this process and the others watch each other; does nothing in a job of one process.

    An error that leaves it is told to the others, which end with it.
    """
    if jax.process_count() == 1:
        yield
        return
    Watch(jax.process_index()).start()
    try:
        yield
    except BaseException as error:
        _leave(error)
        raise
    _here.state = "done"


def _leave(error: BaseException) -> None:
    """Tells the others, unless all were asked to stop and do; and does not wait for them as jax would."""
    status = error.status if isinstance(error, CommandError) else 1
    if status == INTERRUPTED:
        _here.state = "done"
        return
    if _from_runtime(error):
        time.sleep(SILENT + 2 * BEAT)  # a broken collective: if another process died, the watch tells which, and ends
    _here.message = str(error)[:500] or type(error).__name__
    _here.state = "failed"
    # runs before jax's, which waits for all processes
    atexit.register(_exit_soon, status, 2 * BEAT + (ENDING if jax.process_index() == 0 else 0.0))


def _from_runtime(error: BaseException) -> bool:
    """Whether jax's runtime says it, which puts a status (`UNKNOWN: Gloo AllGather failed ...`) before its errors,
    whatever their class."""
    return isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z]+(_[A-Z]+)*: ", str(error)) is not None


def _exit_soon(status: int, seconds: float) -> None:
    """The others hear of it first. The coordinator is the last to go: jax aborts who loses it, in words of its own."""
    time.sleep(seconds)
    _exit(status)


def _exit(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


class Watch:
    """Tells and listens in one thread, judges in another: the first waits where the coordinator does not answer."""

    def __init__(self, me: int):
        self.me = me
        self.signs: dict[int, Sign] = {}
        self.heard: dict[int, float] = {}
        self.moved: dict[int, float] = {}
        self.answered = time.monotonic()

    def start(self) -> None:
        for work in (self._tell_and_listen, self._judge):
            threading.Thread(target=work, name="peers", daemon=True).start()

    def _tell_and_listen(self) -> None:
        connection, host = client(), socket.gethostname()
        for count in range(sys.maxsize):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no answer: `answered` stays behind
                sign = Sign(count, host, _here.state, _here.place, _here.message)
                connection.key_value_set(f"{KEY}{self.me}", to_json(sign), allow_overwrite=True)
                told = {int(key.rpartition("/")[2]): value for key, value in connection.key_value_dir_get(KEY)}
                self.note({process: from_json(value) for process, value in told.items()}, time.monotonic())
            time.sleep(BEAT)

    def note(self, signs: Mapping[int, Sign], now: float) -> None:
        """What the coordinator knows at `now`."""
        self.answered = now
        for process, sign in signs.items():
            before = self.signs.get(process)
            if before is None or before.count != sign.count:
                self.heard[process] = now
            if before is None or (before.place, before.state) != (sign.place, sign.state):
                self.moved[process] = now
        self.signs = dict(signs)

    def _judge(self) -> None:
        while True:
            time.sleep(1.0)
            if (verdict := self.verdict(time.monotonic())) is not None:
                print(f"error: {verdict}; run the same command to go on", file=sys.stderr, flush=True)
                _exit(1)

    def verdict(self, now: float) -> str | None:
        """Why this process cannot go on, if so."""
        if now - self.answered > SILENT:
            return (
                f"process 0, through which all talk, has not answered for {now - self.answered:.0f} s: it died or "
                "hangs, or the network does"
            )
        for process, sign in sorted(self.signs.items()):
            if process == self.me:
                continue
            if sign.state == "failed" and now - self.moved[process] > ENDING:
                return f"process {process} on {sign.host} ended with an error: {sign.message}"
            if sign.state == "running" and now - self.heard[process] > SILENT:
                return (
                    f"process {process} on {sign.host} has not been heard of for {now - self.heard[process]:.0f} s, "
                    f"last at step {sign.place.step}, {sign.place.what}: it died or hangs, look at its output"
                )
        return self._stalled(now)

    def _stalled(self, now: float) -> str | None:
        running = {process: sign for process, sign in self.signs.items() if sign.state == "running"}
        limits = [sign.place.limit for sign in running.values()]
        if not running or any(limit is None for limit in limits):
            return None
        still = now - max(self.moved[process] for process in running)
        longest = max(limit for limit in limits if limit is not None)
        if still <= longest:
            return None
        where = "; ".join(f"process {p} on {s.host}: step {s.place.step}, {s.place.what}" for p, s in running.items())
        return f"no process has come on for {still:.0f} s, and no step takes {longest:.0f} s ({where})"


def to_json(sign: Sign) -> str:
    place = sign.place
    return json.dumps([sign.count, sign.host, sign.state, place.step, place.what, place.limit, sign.message])


def from_json(text: str) -> Sign:
    count, host, state, step, what, limit, message = json.loads(text)
    return Sign(count, host, state, Place(step, what, limit), message)

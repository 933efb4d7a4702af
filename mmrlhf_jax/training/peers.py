"""Whether the processes of a job are still at work. One that dies or hangs leaves the others waiting in a collective,
for ever and in silence; one on its own hangs in silence too.

Every process tells the job's coordinator, every few seconds, that it lives and what it is doing, and reads what the
others told. Who sees another silent, failed or in everybody's way ends with a message that names it, the step and what
it was doing. How long a step may take is known by how long the last ones took and how much they computed; compiling,
evaluating and saving, of which nothing is known, have a wide bound of their own, and getting to the first step has
none. jax itself watches connections only: it notices a dead process but not a stuck one, and neither names.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import itertools
import json
import math
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import jax

from mmrlhf_jax.command import INTERRUPTED, CommandError

BEAT = 4.0  # seconds between signs of life
SILENT = 30.0  # seconds without one after which a process is taken for dead
JAX_SILENT = 100  # the same for jax's own watch, whose message names nobody: by half of it, it must come second
TIMES = 10.0  # a step may take that many times what the slowest of the last steps would have taken for its work
ENDING = 10.0  # seconds for a process to find out for itself what ended another, and say so
HEARD = BEAT + 2.0  # seconds until all have heard what one told, and judged it
PATIENCE_MS = 24 * 3600 * 1000  # for what others do: whether they live is watched here
AGAIN = "run the same command to go on"
KEY = "mmrlhf/peers/"
STEP = "in the step"  # what it does there, such as a collective, may be waiting for others
BEHIND = "behind its last batch"  # storing what is done, or loading what comes next
PARTING = "waiting for the others to end"
STORING = "storing what is done"


@dataclass(frozen=True)
class Place:
    """What a process is doing, at which step (the last that it began); `limit`: seconds after which nobody can be doing
    it still, None = any."""

    step: int = 0
    what: str = "starting"
    limit: float | None = None


@dataclass(frozen=True)
class Sign:
    """What a process told: `count` rises with every sign of life."""

    count: int
    host: str
    state: str  # running, done, failed; stuck, ending: found that one is, or why else none can go on, see message
    place: Place
    message: str = ""


@dataclass
class _Here:
    """What this process does, written by its loop and read by its watch."""

    place: Place = field(default_factory=Place)
    state: str = "running"
    message: str = ""
    laps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=16))  # seconds, work
    work: deque[float] = field(default_factory=lambda: deque(maxlen=2))
    """of this step and of the one before it, whose end is waited for within this one"""
    step_limit: float = math.inf  # seconds
    other_limit: float = math.inf
    together: bool = False  # whether there are others who listen
    news: threading.Event = field(default_factory=threading.Event)  # for them


_here = _Here()
_ends = itertools.count()  # every process comes to the end of the same jobs


@dataclass(frozen=True)
class StuckConfig:
    """When a job that does not come on is ended, with a message that names process, host and step. At least 12; inf:
    never"""

    step: float = 30.0
    """seconds without a sign of progress in a step (of training, or of a model that scores or answers: a batch), data
    included; or, where that is longer, ten times what the slowest of the last 16 steps would have taken for as much
    work"""
    other: float = 3600.0
    """the same for what says nothing of how long it takes: compiling, a batch of an evaluation, saving, and what lies
    between two datasets or models"""

    def __post_init__(self) -> None:
        shortest = 3 * BEAT
        if not (self.step >= shortest and self.other >= shortest):
            raise ValueError(
                f"stuck.step {self.step:g} and stuck.other {self.other:g} are seconds, at least {shortest:g}, as "
                f"processes tell only every {BEAT:g} s what they do; inf = never"
            )


def set_limits(limits: StuckConfig) -> None:
    """From here on this process is stuck beyond them; without limits none is. All processes of a job set the same."""
    _here.step_limit, _here.other_limit = limits.step, limits.other


def doing(what: str, step: int | None = None, *, bounded: bool = False) -> None:
    """States what this process does from here on: a sign of its coming on. `bounded`: it is part of a step, of which it
    is known by now how long they take."""
    limit = max(_here.step_limit, TIMES * _longest()) if bounded and _here.laps else _here.other_limit
    step = _here.place.step if step is None else step
    _here.place = Place(step, what, limit if math.isfinite(limit) else None)


def _longest() -> float:
    """Seconds of the slowest of the last steps, had it computed as much as this one: a step of long videos among short
    questions is no hang."""
    now = max(_here.work, default=0.0)
    return max(seconds * max(1.0, now / work if work else 1.0) for seconds, work in _here.laps)


def step_begins(step: int, work: float) -> None:
    """`work`: how much it computes, in any unit that does not change."""
    if step != _here.place.step or not _here.work:
        _here.work.append(work)
    doing(STEP, step, bounded=True)


@contextmanager
def meanwhile(what: str) -> Iterator[None]:
    """Within it this process does `what`, then again what it did before."""
    before = _here.place
    doing(what)
    yield
    _here.place = before


def next_step(work: float) -> None:
    """`step_begins` of the step after the last one, whatever stage of a job that was in."""
    step_begins(_here.place.step + 1, work)


def new_pace() -> None:
    """What the last steps took says nothing of the next ones, which compute something else."""
    _here.laps.clear()
    _here.work.clear()


def step_took(seconds: float, work: float) -> None:
    """For the limit of the steps to come."""
    _here.laps.append((seconds, work))


def client() -> Any:
    """jax's connection to the coordinator of a job of several processes. jax has no public way to it."""
    from jax._src import distributed

    return distributed.global_state.client


@contextmanager
def watched_processes() -> Iterator[None]:
    """Within it this process and the others watch each other; one on its own watches itself.

    An error that leaves it is told to the others, which end with it.
    """
    _begin()
    watch = Watch(jax.process_index())
    if jax.process_count() == 1:
        watch.start(None)
        try:
            yield
        finally:
            watch.ended.set()
            _here.news.set()
        return
    _here.together = True
    watch.start(client())
    try:
        yield
    except BaseException as error:
        _leave(error)
        raise
    _part()


def _part() -> None:
    """Returns when all have come to their end: jax aborts those whose work goes on for minutes after the others'."""
    doing(PARTING)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # who has gone is the watch's affair
        client().wait_at_barrier(f"mmrlhf/peers/end/{next(_ends)}", PATIENCE_MS)
    _here.state = "done"


def _begin() -> None:
    """Forgets what an earlier job in this process did."""
    global _here
    _here = _Here()


def _leave(error: BaseException) -> None:
    """Tells the others, unless all were asked to stop and do; and does not wait for them as jax would."""
    if isinstance(error, CommandError) and error.status == INTERRUPTED:
        _part()
        return
    _here.place = Place(_here.place.step, "ending after an error")  # no longer in a step, and in nobody's way
    status = error.status if isinstance(error, CommandError) else 1
    if isinstance(error, KeyboardInterrupt):
        status = INTERRUPTED
    if _from_runtime(error):
        time.sleep(SILENT + 2 * BEAT)  # a broken collective: if another process died, the watch tells which, and ends
    _tell("failed", str(error)[:500] or type(error).__name__)
    # runs before jax's, which waits for all processes
    atexit.register(_exit_soon, status, 2 * BEAT + (ENDING if jax.process_index() == 0 else 0.0))


def _from_runtime(error: BaseException) -> bool:
    """Whether jax's runtime says it, which puts a status (`UNKNOWN: Gloo AllGather failed ...`) before its errors,
    whatever their class; a device without memory is no other process's affair."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z]+(_[A-Z]+)*: ", str(error)) is not None


def _exit_soon(status: int, seconds: float) -> None:
    """The others hear of it first. The coordinator is the last to go: jax aborts who loses it, in words of its own."""
    time.sleep(seconds)
    _exit(status)


def end_together(message: str) -> NoReturn:
    """Ends this process from any thread, and with it the others, which say `message` too: why none may go on.

    While they hear of it nothing in this process runs Python any more: no line, part or checkpoint is finished.
    """
    _tell("ending", message)
    _say(f"error: {message}")
    if _here.together:
        for _ in range(2):  # the watch may be telling what it knew before
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                sign = Sign(sys.maxsize, socket.gethostname(), "ending", _here.place, message)
                client().key_value_set(f"{KEY}{jax.process_index()}", to_json(sign), allow_overwrite=True)
            time.sleep(0.05)
        libc = ctypes.PyDLL(None)  # whose calls keep the interpreter's lock
        left = math.ceil(2 * HEARD)  # as long as in _end
        while left:
            left = libc.sleep(left)  # what a signal left of it
    _exit(1)


def _end(message: str, state: str, *, tell: bool) -> NoReturn:
    """Ends this process for what its watch found or was told. `tell`: some may not have heard of it."""
    if tell:
        _tell(state, message)
    _say(f"error: {message}")
    if tell and _here.together:
        # their collectives break when this process goes; the coordinator goes last, see _exit_soon
        time.sleep(HEARD if jax.process_index() else 2 * HEARD)
    _exit(1)


def _tell(state: str, message: str) -> None:
    _here.message = message  # first: the watch may tell between the two
    _here.state = state
    _here.news.set()


def tell_failure(message: str) -> None:
    """Tells the others, which end, of an error that this process will raise, but perhaps waits for them before."""
    if _here.together:
        _tell("failed", message[:500])


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # it may be its disk that is full
        print(line, file=sys.stderr, flush=True)


def _exit(status: int) -> NoReturn:
    """From any thread: the main one does not listen."""
    for worker in multiprocessing.active_children():  # those that load data would outlive it
        worker.kill()
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
        self.resumed = -math.inf
        self.ended = threading.Event()

    def start(self, connection: Any | None) -> None:
        """`connection`: to the coordinator; None where there are no others."""
        for work, arguments in ((self._tell_and_listen, (connection,)), (self._judge, ())):
            threading.Thread(target=work, args=arguments, name="peers", daemon=True).start()

    def _tell_and_listen(self, connection: Any | None) -> None:
        host = socket.gethostname()
        for count in range(sys.maxsize):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no answer: `answered` stays behind
                sign = Sign(count, host, _here.state, _here.place, _here.message)
                told = {self.me: sign} if connection is None else self._exchange(connection, sign)
                self.note(told, time.monotonic())
            _here.news.wait(BEAT)
            _here.news.clear()
            if self.ended.is_set():
                return

    def _exchange(self, connection: Any, sign: Sign) -> dict[int, Sign]:
        connection.key_value_set(f"{KEY}{self.me}", to_json(sign), allow_overwrite=True)
        told = connection.key_value_dir_get(KEY)
        return {int(key.rpartition("/")[2]): from_json(value) for key, value in told}

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
        before = time.monotonic()
        while not self.ended.wait(1.0):
            now = time.monotonic()
            if now - before > 2 * BEAT:
                self.resumed = now  # this process itself was stopped: nothing that is older tells of others
            before = now
            told, verdict = self.told(now), self.verdict(now)
            if told is None and verdict is None:
                continue
            if (told is None or told.state == "stuck") and self.me in self.suspects():
                faulthandler.dump_traceback()  # where each of its threads is
            if told is not None:
                _end(told.message, told.state, tell=self.me == 0)
            _end(f"{verdict}; {AGAIN}", "stuck", tell=True)

    def told(self, now: float) -> Sign | None:
        """What another says of why no process can go on; all hear the same."""
        for process, sign in sorted(self.signs.items()):
            if process == self.me:
                continue
            if sign.state in ("stuck", "ending"):
                return sign
            if sign.state == "failed" and now - self.moved[process] > ENDING:
                message = f"process {process} on {sign.host} ended with an error: {sign.message}"
                return replace(sign, message=message if AGAIN in message else f"{message}; {AGAIN}")
        return None

    def _since(self, moment: float, now: float) -> float:
        return now - max(moment, self.resumed)

    def verdict(self, now: float) -> str | None:
        """Why this process cannot go on, if it finds so by itself."""
        if (silent := self._since(self.answered, now)) > SILENT:
            return (
                f"process 0, through which all talk, has not answered for {silent:.0f} s: it died or "
                "hangs, or the network does"
            )
        for process, sign in sorted(self.signs.items()):
            if process == self.me:
                continue
            if sign.state == "running" and (silent := self._since(self.heard[process], now)) > SILENT:
                return (
                    f"process {process} on {sign.host} has not been heard of for {silent:.0f} s, "
                    f"last at step {sign.place.step}, {sign.place.what}: it died or hangs, look at its output"
                )
        return self._stalled(now)

    def _running(self) -> dict[int, Sign]:
        return {process: sign for process, sign in sorted(self.signs.items()) if sign.state == "running"}

    def suspects(self) -> list[int]:
        """Whom the others wait for: those furthest behind, and of these such as do something of their own."""
        running = self._running()
        last = min((sign.place.step for sign in running.values()), default=0)
        behind = [process for process, sign in running.items() if sign.place.step == last]
        return [process for process in behind if running[process].place.what not in (STEP, PARTING)] or behind

    def _stalled(self, now: float) -> str | None:
        running = self._running()
        limits = [sign.place.limit for sign in running.values()]
        if not running or any(limit is None for limit in limits):
            return None
        if any(self._since(self.heard[process], now) > 3 * BEAT for process in running):
            return None  # one of them is silent: about to be heard again, or found dead
        still = self._since(max(self.moved[process] for process in running), now)
        longest = max(limit for limit in limits if limit is not None)
        if still <= longest:
            return None
        stuck = self.suspects()
        others = _where(running, [process for process in running if process not in stuck])
        waiting = f" while others wait ({others})" if others else ""
        flag = "--stuck.other" if longest == _here.other_limit else "--stuck.step"
        return (
            f"{_where(running, stuck)} for {still:.0f} s{waiting}. It is stuck, and its output says in which line; if "
            f"that may take more than {longest:.0f} s, raise {flag}"
        )


def _where(signs: Mapping[int, Sign], processes: list[int]) -> str:
    chosen = {process: signs[process] for process in processes}
    return "; ".join(f"process {p} on {s.host}, step {s.place.step}: {s.place.what}" for p, s in chosen.items())


def to_json(sign: Sign) -> str:
    place = sign.place
    return json.dumps([sign.count, sign.host, sign.state, place.step, place.what, place.limit, sign.message])


def from_json(text: str) -> Sign:
    count, host, state, step, what, limit, message = json.loads(text)
    return Sign(count, host, state, Place(step, what, limit), message)

"""A lease: one job at a time writes an output. Two would damage each other's files.

A small JSON file names the job's host and process and since when it runs; a thread renews its heartbeat every few
seconds. A second job aimed at the output is refused with what the file says. A lease whose process is gone, or whose
heartbeat is old, is stale: whoever finds it takes it over and says so. On a disk the file is read and written under a
lock; in a bucket (gs://) it is created only where there is none. Where two jobs come through all that at the same
moment, as on a network disk without locks, the one whose lease was overwritten finds out at its next heartbeat and
ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.command import CommandError
from mmrlhf_jax.writing import explained_writing

BEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # seconds without one after which a lease is anybody's
SETTLE = 2.0  # seconds after taking over a bucket's lease until it is certain that nobody else did
SIZE = 512  # bytes of a lease, always: who reads while it is renewed sees the old one or the new
LARGEST = 4096  # bytes of a lease that is one


class LeaseError(CommandError):
    """Another job writes this output."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. Times are seconds since the epoch; process numbers mean something within one `space` only."""

    token: str
    host: str
    pid: int
    space: str
    born: int
    started: float
    heartbeat: float


def beside(output: storage.PathLike) -> epath.Path:
    """The lease of an output that does not exist until it is whole: a hidden file next to it."""
    path = storage.to_path(output)
    return path.with_name(f".{path.name}.lease")


@contextmanager
def lease(
    file: epath.Path, what: str, say: Callable[[str], None] = print, end: Callable[[str], NoReturn] | None = None
) -> Iterator[None]:
    """Holds the lease in `file` on the output `what`; released however the block ends, but for SIGKILL, whose stale
    lease the next job takes over.

    Raises LeaseError where another job holds it; a failure to write `what` within is explained (writing.py). A job that
    loses its lease, since it was stopped for long or `what` was removed or taken away, ends at once with exit code 1,
    or as `end` does, which is called from a thread and does not return.
    """
    with explained_writing(what):
        made = _make_directory(file)
        mine = _acquire(file, what, say)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(file, what, mine, ended, end or _end), name="lease", daemon=True)
    heart.start()
    try:
        with explained_writing(what):
            yield
    finally:
        ended.set()
        heart.join()
        _release(file, mine)
        if made:
            with contextlib.suppress(OSError):  # there is something in it, as there should be
                os.rmdir(file.parent)


def held_by_parent(file: epath.Path) -> bool:
    """Whether the process that started this one holds the lease: what works for its holder needs none of its own."""
    holder = _read(file)
    return holder is not None and _is_here(holder) and holder.pid == os.getppid() and _born(holder.pid) == holder.born


def _make_directory(file: epath.Path) -> bool:
    """Whether the directory of `file` had to be made."""
    if storage.is_remote(file) or file.parent.exists():
        return False
    file.parent.mkdir(parents=True)
    return True


def _acquire(file: epath.Path, what: str, say: Callable[[str], None]) -> Holder:
    mine = _myself()
    remote = storage.is_remote(file)
    silent = _watch_elsewhere(file, what, say)
    before = _create_remote(file, mine, silent, what) if remote else _claim_local(file, mine, silent, what)
    if before is not None:
        if remote:
            time.sleep(SETTLE)
        if _read(file) not in (None, mine):
            raise LeaseError(f"{what}: another job took over its stale lease at the same moment; run one of them only")
        say(f"{what}: taking over the lease of {_describe(before)}, which {_why_stale(before, silent)}")
    return mine


def _watch_elsewhere(file: epath.Path, what: str, say: Callable[[str], None]) -> Holder | None:
    """The lease of another host or container once it has been silent for long enough; None where there is none.

    Its process cannot be looked at from here and its clock may be wrong, but a job that lives renews its lease. A job
    that was killed, and starts again on another machine, waits here. Raises LeaseError when the lease is renewed.
    """
    first, began = _read(file), time.monotonic()
    if first is None or _is_here(first):
        return None
    say(f"{what}: waiting to see whether {_describe(first)} still writes it")
    while (now := _read(file)) == first:
        seen = time.monotonic() - began
        if seen > STALE or (seen > 1.5 * BEAT and _age(first.heartbeat) > STALE):
            return first
        time.sleep(BEAT / 10)
    if now is not None:
        raise _refusal(now, file, what)
    return None


def _claim_local(file: epath.Path, mine: Holder, silent: Holder | None, what: str) -> Holder | None:
    """Writes the lease unless somebody holds it; returns whose stale one it was."""
    with _locked(file) as descriptor:
        before = _parse(os.pread(descriptor, LARGEST, 0))
        if before is not None and _why_stale(before, silent) is None:
            raise _refusal(before, file, what)
        _overwrite(descriptor, mine)
        return before


def _create_remote(file: epath.Path, mine: Holder, silent: Holder | None, what: str) -> Holder | None:
    before = _read(file)
    if before is not None:
        if _why_stale(before, silent) is None:
            raise _refusal(before, file, what)
        storage.remove(file)
    if not storage.create_whole(file, _text(mine)):
        winner = _read(file)
        if winner is not None and winner.token == mine.token:  # the answer was lost, and the store asked once more
            return before
        raise LeaseError(f"{what}: {_describe(winner) if winner else 'another job'} took its lease at the same moment")
    return before


def _refusal(holder: Holder, file: epath.Path, what: str) -> LeaseError:
    return LeaseError(
        f"{what} is being written by another job: {_describe(holder)}, which runs for {_span(_age(holder.started))} "
        f"and was heard of {_age(holder.heartbeat):.0f} s ago ({file}). Wait for it, end it, or write somewhere else"
    )


def _is_here(holder: Holder) -> bool:
    """Whether its process can be looked at."""
    return (holder.host, holder.space) == (socket.gethostname(), _space())


def _why_stale(holder: Holder, silent: Holder | None) -> str | None:
    """None for a lease that is held; `silent` is one from elsewhere that was watched for long enough."""
    late = f"was not heard of for {_span(_age(holder.heartbeat))}"
    if not _is_here(holder):
        return late if holder == silent else None
    if _born(holder.pid) != holder.born:
        return "is gone"
    hangs = holder.pid != os.getpid() and _age(holder.heartbeat) > STALE
    return late if hangs else None


def _beat(file: epath.Path, what: str, mine: Holder, ended: threading.Event, end: Callable[[str], NoReturn]) -> None:
    """Renews the heartbeat until `ended`; ends the process when the lease is no longer its own."""
    wait = BEAT
    while not ended.wait(wait):
        try:
            lost, wait = _renew(file, mine), BEAT
        except OSError:  # a store that does not answer just now; who writes the output says so if that lasts
            wait = BEAT / 10  # another job may have taken it over by the time it does
            continue
        if lost:
            end(f"{what}: {lost}. Nothing more is written there; earlier checkpoints and parts are as they were")


def _renew(file: epath.Path, mine: Holder) -> str | None:
    """What happened to the lease, if it is not there or not ours."""
    now = Holder(**{**asdict(mine), "heartbeat": time.time()})
    try:
        if storage.is_remote(file):
            holder = _read(file)
            if holder is not None and holder.token == mine.token:
                storage.write_whole(file, _text(now))
        else:
            with _locked(file, create=False) as descriptor:
                holder = _parse(os.pread(descriptor, LARGEST, 0))
                if holder is not None and holder.token == mine.token:
                    _overwrite(descriptor, now)
    except FileNotFoundError:
        return f"its lease {file.name} has gone: was the output removed, moved or unmounted? Put it back and run again"
    if holder is None or holder.token != mine.token:
        other = "somebody" if holder is None else _describe(holder)
        return f"its lease was taken over by {other}, since this job was not heard of for over {STALE:.0f} s"
    return None


def _release(file: epath.Path, mine: Holder) -> None:
    """Removes the lease if it is still ours. An output that has vanished has none, and is told of elsewhere."""
    with contextlib.suppress(OSError):
        holder = _read(file)
        if holder is not None and holder.token == mine.token:
            storage.remove(file)


def _end(message: str) -> NoReturn:
    """Ends the process from any thread: the main one may be writing, or wait in a collective."""
    with contextlib.suppress(OSError, ValueError):  # it may be its disk that is full
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def _locked(file: epath.Path, *, create: bool = True) -> Iterator[int]:
    """A descriptor of a local lease that no other process of this host has in hand."""
    while True:
        descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        try:
            with contextlib.suppress(OSError):  # some network disks have no locks: the heartbeat finds out
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, file):
                continue  # it was released between opening and locking
            yield descriptor
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, file: epath.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _overwrite(descriptor: int, holder: Holder) -> None:
    text = _text(holder)
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))


def _read(file: epath.Path) -> Holder | None:
    """None where there is no lease, or none that says anything (of a job killed while it made the file)."""
    try:
        return _parse(storage.read_bytes(file, LARGEST))
    except FileNotFoundError:
        return None


def _text(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder), indent=2).ljust(SIZE - 1) + "\n").encode()


def _parse(text: bytes) -> Holder | None:
    try:
        found = json.loads(text)
        return Holder(**{name: kind(found[name]) for name, kind in _FIELDS.items()})
    except (ValueError, KeyError, TypeError):
        return None


_FIELDS: dict[str, type] = {
    "token": str, "host": str, "pid": int, "space": str, "born": int, "started": float, "heartbeat": float,
}  # fmt: skip


def _myself() -> Holder:
    now, pid = time.time(), os.getpid()
    return Holder(uuid.uuid4().hex, socket.gethostname(), pid, _space(), _born(pid), now, now)


def _space() -> str:
    """Where process numbers mean the same: one boot of a machine, and there one container. Elsewhere than on Linux
    hosts are told apart by name only."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _born(pid: int) -> int:
    """The start of a process in the kernel's ticks, which tells it from a later one with its number; -1 where there is
    none, or only its remains. Where the kernel does not say: 0 for any that is there."""
    try:
        # behind the name in parentheses, which may hold anything: state, and 19 fields on the start
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if state in "ZX" else int(fields[18])
    except OSError:
        if Path("/proc/self/stat").exists():
            return -1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        pass
    return 0


def _describe(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host}"


def _age(moment: float) -> float:
    return max(0.0, time.time() - moment)  # another host's clock may be ahead


def _span(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

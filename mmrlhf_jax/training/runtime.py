"""What a process sets up before its first array: compiled programs kept on disk, matrix products as precise as
asked."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mmrlhf_jax.command import CommandError, UsageError
from mmrlhf_jax.nn.compiler import GPU_MEMORY_SHARE
from mmrlhf_jax.nn.sharding import batch_sharding, batch_share, replicated
from mmrlhf_jax.training.peers import meanwhile


def set_up_jax(dtype: str) -> None:
    """Call once, before any computation. JAX_COMPILATION_CACHE_DIR moves the cache of compiled programs."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_SHARE)  # read when jax first looks for devices
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "mmrlhf_jax" / "compiled"))
    if dtype == "float32":
        # TPUs multiply fp32 in bf16 and GPUs in tf32 unless told otherwise; who asks for fp32 means it
        jax.config.update("jax_default_matmul_precision", "highest")


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Numpy arrays of this process onto the mesh: the leading axis, of which `batch_share` is here, split over the
    batch axes; scalars everywhere."""
    split, whole, share = batch_sharding(mesh), replicated(mesh), batch_share(mesh)

    def place(x: Any) -> jax.Array:
        local = np.asarray(x)
        if not local.ndim:
            return jax.make_array_from_callback((), whole, lambda _: local)
        blocks = np.split(local, len(share.parts))
        rows = len(blocks[0])

        def block(index: Any) -> np.ndarray:  # a slice for each axis
            part = (index[0].start or 0) // rows if rows else 0
            return blocks[share.parts.index(part)]

        return jax.make_array_from_callback((share.of * rows, *local.shape[1:]), split, block)

    return jax.tree.map(place, batch)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets instead of killing the process; a second one kills."""
    stop = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)] or signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: jax's own handler, which cannot be put back


@dataclass
class Profiler:
    """Traces the steps START to STOP, counted from 1, both included, into `directory`, once a process."""

    directory: epath.Path
    steps: range
    _traced: tempfile.TemporaryDirectory | None = None

    def before(self, step: int) -> None:
        """Call before the first device work of a step."""
        if step in self.steps and self._traced is None:
            self._traced = tempfile.TemporaryDirectory()  # a profiler writes local files, a run may be on a bucket
            jax.profiler.start_trace(self._traced.name)

    def after(self, step: int, result: Any) -> None:
        """Call when a step has been given to the devices; `result` is what it computes."""
        if self._traced is not None and step >= self.steps.stop - 1:
            jax.block_until_ready(result)
            self.close()
            self.steps = range(0)

    def close(self) -> None:
        if self._traced is not None:
            with meanwhile("writing a profile"):
                self._write()

    def _write(self) -> None:
        assert self._traced is not None
        jax.profiler.stop_trace()
        for file in Path(self._traced.name).rglob("*"):
            if file.is_file():
                there = self.directory / str(file.relative_to(self._traced.name))
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(file.read_bytes())
        self._traced.cleanup()
        self._traced = None


def parse_profile(text: str) -> range:
    """`START:STOP` as the steps it names; empty for an empty text. Raises UsageError for anything else."""
    if not text:
        return range(0)
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and 1 <= int(start) <= int(stop)):
        raise UsageError(f"--profile {text}: write START:STOP, two step numbers from 1 on")
    return range(int(start), int(stop) + 1)


@contextmanager
def explain_memory(say_what: Callable[[], str]) -> Iterator[None]:
    """Turns a device that ran out of memory into one message; `say_what` knows what ran and what would need less."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        first = str(error).splitlines()[0]
        raise CommandError(f"{say_what()}\n  ({first[:300]})") from error

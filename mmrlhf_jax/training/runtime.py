"""What a process sets up before its first array: compiled programs kept on disk, matrix products as precise as
asked."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmrlhf_jax.nn.sharding import batch_sharding, replicated


def set_up_jax(dtype: str) -> None:
    """Call once, before any computation. JAX_COMPILATION_CACHE_DIR moves the cache of compiled programs."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "mmrlhf_jax" / "compiled"))
    if dtype == "float32":
        # TPUs multiply fp32 in bf16 and GPUs in tf32 unless told otherwise; who asks for fp32 means it
        jax.config.update("jax_default_matmul_precision", "highest")


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Numpy arrays of this process onto the mesh: leading axis split over the batch axes, scalars everywhere."""
    split, whole = batch_sharding(mesh), replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(split if np.ndim(x) else whole, np.asarray(x)), batch
    )


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets instead of killing the process; a second one kills."""
    stop = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

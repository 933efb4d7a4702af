"""What figures were measured on, how fast it multiplies matrices and how fast its memory is."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, versions. Starts no jax backend."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "jax": jax.__version__,
    }


def cores() -> int:
    """Cores this process may use, which a container or a scheduler may have cut."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy() -> str | None:
    """A warning where other work waits for the cores, which slows two sides by different factors; None elsewhere."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    if load <= 0.5 * cores() + 0.5:
        return None
    return f"NOTE: {load:.1f} processes wait for {cores()} cores: neither times nor ratios are to be trusted"


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # where Linux says it; elsewhere Python knows
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measured_peak(dtype: str, size: int | None = None, repeats: int = 4) -> float:
    """FLOP/s of products of two square matrices on jax's first device: the best of `repeats`, each of several products
    in a row so that starting them does not count. `size` None: large enough for the device. Published peaks are for
    chips; this is what this device does, clocks, cores and precision as they are."""
    at_once = 2
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in range(2))
    multiply = jax.jit(jnp.matmul)
    multiply(a, b).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready([multiply(a, b) for _ in range(at_once)])
        best = min(best, time.perf_counter() - began)
    return at_once * 2 * size**3 / best


def measured_bandwidth(size: int = 2**28, repeats: int = 4) -> float:
    """Bytes a second read and written, together, by adding 1 to a long array on jax's first device: the best of
    `repeats`, each of several in a row. `size`: bytes of the array, far beyond any cache."""
    at_once = 8
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: fresh pages would cost a CPU more than the traffic
    x = add(jnp.zeros(size // 4, jnp.float32)).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(at_once):
            x = add(x)
        x.block_until_ready()
        best = min(best, time.perf_counter() - began)
    return at_once * 2 * size / best

"""What figures were measured on."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax


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


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # where Linux says it; elsewhere Python knows
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

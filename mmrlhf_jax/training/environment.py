"""What a run ran on: versions and devices, one line of RUN/environment.jsonl each time it starts or goes on."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from mmrlhf_jax.training.distributed import is_speaker
from mmrlhf_jax.training.run import RunDirectory, read_lines, write_text

# those whose version may change a number; a package that is not installed was not used
PACKAGES = (
    "mmrlhf-jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy",
    "pillow",
)  # fmt: skip


def note_environment(run: RunDirectory, step: int, mesh: Mesh) -> None:
    """Adds the line of a start after `step` steps. It depends on nothing, and nothing depends on it."""
    if is_speaker():
        records = [*read_lines(run.environment), {"step": step, **environment(mesh)}]
        write_text(run.environment, "".join(json.dumps(record) + "\n" for record in records))


def environment(mesh: Mesh) -> dict[str, Any]:
    """Versions and devices, without a name of machine, user or place."""
    devices = list(mesh.devices.flat)
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": _versions(),
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

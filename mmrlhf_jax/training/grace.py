"""Whether a checkpoint can be whole in the seconds that a machine leaves between SIGTERM and SIGKILL."""

from __future__ import annotations

from typing import Any

import jax

from mmrlhf_jax.training.manifest import Written
from mmrlhf_jax.training.recipe import CheckpointConfig

ASSUMED = 1e9  # bytes/s a process writes where nothing has been measured yet: a good network disk


def bytes_of(*trees: Any) -> int:
    """Bytes of all arrays, over all devices, each counted once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))


def too_slow(size: int, measured: Written | None, config: CheckpointConfig, processes: int) -> str | None:
    """The warning, if one is due, that a checkpoint of `size` bytes takes longer than `checkpoint.grace`; by how an
    earlier one was written, else by ASSUMED."""
    rate = ASSUMED * processes if measured is None else measured.bytes / max(measured.seconds, 1e-3)
    seconds = size / rate if measured is None else measured.seconds
    if seconds <= config.grace:
        return None
    known = "assumed here" if measured is None else "measured here"
    return (
        f"note: a checkpoint holds {size / 1e9:.1f} GB. To be whole {config.grace:.0f} s after SIGTERM "
        f"(checkpoint.grace) it takes {size / config.grace / 1e9:.2f} GB/s; {rate / 1e9:.2f} GB/s {known}, that is "
        f"{seconds:.0f} s. Where the machine waits no longer, an interrupted run goes back up to {config.every} steps "
        "(checkpoint.every)"
    )

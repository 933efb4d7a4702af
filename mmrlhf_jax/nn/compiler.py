"""What XLA is told beyond its defaults, platform by platform, each with its reason. Options are given to the programs
they are for and not to the process; one that XLA_FLAGS names is left to the user."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

Program = Literal["step", "decode"]

GPU_MEMORY_SHARE = "0.95"
"""XLA_PYTHON_CLIENT_MEM_FRACTION, unless it is set: jax takes .75 of a GPU by default, and a run has nobody to leave
the rest to; the CUDA context and cuDNN take theirs from what remains"""


@dataclass(frozen=True)
class Option:
    platform: str
    program: Program
    name: str
    value: bool
    reason: str


OPTIONS = (
    Option(
        "gpu", "step", "xla_gpu_enable_latency_hiding_scheduler", True,
        "fsdp's gathers and scatters start early enough to run beside products; NVIDIA's images of jax set it too "
        "(docs.nvidia.com/jax-toolbox/environment-variables). Not measured here",
    ),
    Option(
        "tpu", "decode", "xla_tpu_enable_async_collective_fusion", False,
        "otherwise libtpu 0.0.42 compiles for ever: weights are gathered (`fsdp`) in the layers' loop inside the "
        "tokens' loop",
    ),
)  # fmt: skip


def compiler_options(platform: str, program: Program) -> dict[str, bool] | None:
    """For `jax.jit`; None where XLA's defaults stand."""
    named = os.environ.get("XLA_FLAGS", "")
    chosen = {
        option.name: option.value
        for option in OPTIONS
        if (option.platform, option.program) == (platform, program) and option.name not in named
    }
    return chosen or None

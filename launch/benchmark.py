"""Timings, side by side in one run.

    python launch/benchmark.py step        one group step against separate pairs: our own, or with --against trl TRL's;
                                           with --ops by part, beside what the machine allows
    python launch/benchmark.py generate    critiques on a shared prompt cache against transformers.generate
    python launch/benchmark.py attention   each attention backend that can serve here, beside XLA and the device's peak
    python launch/benchmark.py data        pictures a second from dataset to micro-batch, by worker processes

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import tyro

from mmrlhf_jax.benchmarks.attention import Attention, time_attention
from mmrlhf_jax.benchmarks.data import Data, time_data
from mmrlhf_jax.benchmarks.generate import Generate, time_generate
from mmrlhf_jax.benchmarks.step import Step, time_step
from mmrlhf_jax.command import run_command

TIME: dict[type, Callable[[Any], None]] = {
    Step: time_step,
    Generate: time_generate,
    Attention: time_attention,
    Data: time_data,
}


def main() -> None:
    signal.signal(signal.SIGTERM, _stop)
    command = tyro.cli(
        Annotated[Step, tyro.conf.subcommand("step")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Attention, tyro.conf.subcommand("attention")]
        | Annotated[Data, tyro.conf.subcommand("data")],
        prog="benchmark.py",
        description=__doc__,
    )
    TIME[type(command)](command)


def _stop(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)  # an exception: the processes that are timed are ended on the way out


if __name__ == "__main__":
    run_command(main)

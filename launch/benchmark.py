"""Side-by-side timings in one run.

    python launch/benchmark.py step        one group step against the same preferences as separate pairs
    python launch/benchmark.py generate    critiques on a shared prompt cache against transformers.generate

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from mmrlhf_jax.benchmarks.generate import Generate, time_generate
from mmrlhf_jax.benchmarks.step import Step, time_step
from mmrlhf_jax.command import run_command


def main() -> None:
    command = tyro.cli(
        Annotated[Step, tyro.conf.subcommand("step")] | Annotated[Generate, tyro.conf.subcommand("generate")],
        prog="benchmark.py",
        description=__doc__,
    )
    time_step(command) if isinstance(command, Step) else time_generate(command)


if __name__ == "__main__":
    run_command(main)

"""Fuzzes the readers of MODEL and RUN directories with mutated valid files.

    python tests/fuzz_models/run.py READER|all --executions 20000 --seed N

Prints for each reader its executions, the distinct outcomes with counts, the slowest, peak memory and line coverage.
Exit 1 where anything but a declared refusal came out, for a case over 5 s of work or 30 s on the clock, 2 GB, a file
opened outside the case's directory, a connection, a process or a pickle. Ended early (Ctrl-C, SIGTERM), it prints what
it has.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from fuzz_models.harness import LINES, Figures, fuzz  # noqa: E402
from fuzz_models.readers import READERS  # noqa: E402

ADDRESSES = 10 * 2**30  # bytes: what fills the memory shall end this process, not others


def show(name: str, figures: Figures, seed: int) -> None:
    print(
        f"{name}: {figures.executions:,} executions (seed {seed}), {len(figures.outcomes)} distinct outcomes, slowest "
        f"{figures.slowest:.2f} s ({figures.longest_work:.2f} s of work), peak {figures.rss / 2**20:.0f} MiB, "
        f"lines {figures.coverage:.1%}"
    )
    for outcome, count in figures.outcomes.most_common(60):
        print(f"  {count:7,}  {outcome}")
    print(f"  lines never run: {', '.join(figures.missed[:40]) or 'none'}")
    for failure in figures.failures[:20]:
        print(f"  FAILURE {failure}")
    print(f"  {len(figures.failures)} failures", flush=True)


def main() -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # messages quote what the mutations wrote
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--executions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.reader != "all":
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES if hard < 0 else min(ADDRESSES, hard), hard))
        with tempfile.TemporaryDirectory() as aside:
            os.environ[LINES] = f"{aside}/lines"
            figures = fuzz(READERS[arguments.reader], arguments.executions, arguments.seed)
        show(arguments.reader, figures, arguments.seed)
        return int(bool(figures.failures))
    options = [f"--executions={arguments.executions}", f"--seed={arguments.seed}"]
    codes = [subprocess.run([sys.executable, __file__, name, *options]).returncode for name in READERS]  # memory apart
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())

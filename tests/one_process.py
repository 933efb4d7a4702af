"""Runs a program of launch/ that starts others, with those in its own process: starting Python and compiling once takes
a third of the time.

    python tests/one_process.py launch/quickstart.py --output DIR ...
"""

from __future__ import annotations

import runpy
import sys

from mmrlhf_jax import stages
from mmrlhf_jax.command import CommandError


def _run(name: str, command: list[str]) -> None:
    print("  python " + " ".join(command[1:]), flush=True)
    own, sys.argv = sys.argv, command[1:]
    try:
        runpy.run_path(command[1], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise CommandError(f"stage {name} ended with exit code {ended.code}, see above") from ended
    finally:
        sys.argv = own


if __name__ == "__main__":
    stages._run = _run
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

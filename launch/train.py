"""Train a recipe: python launch/train.py configs/RECIPE.py --output RUN [--field.subfield VALUE ...]

The same command again resumes. configs/RECIPE.py --help lists every field with its value in that recipe, and
--list-objectives alone every objective with its options, formula and source. On several hosts start the same command on
each (launch/tpu_pod.sh, launch/slurm.sbatch, launch/gke.sh do).
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import tyro

from mmrlhf_jax.command import read_arguments, run_command
from mmrlhf_jax.training.recipe import Recipe, read_recipe


def main() -> None:
    if sys.argv[1:] == ["--list-objectives"]:
        from mmrlhf_jax.objectives.listing import listing

        print(listing())
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print((__doc__ or "").strip())
        sys.exit(0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2)
    file, arguments = sys.argv[1], sys.argv[2:]
    default = read_recipe(file)

    def command(
        output: str,
        profile: str = default.log.profile,
        recipe: Annotated[tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="")] = default,
    ) -> tuple[str, Recipe]:
        """Train a recipe; the same command again resumes.

        Args:
            output: the RUN directory, local or gs://; everything of the run is kept there
            profile: START:STOP, the steps whose trace is written into RUN/profile; short for --log.profile
            recipe: what to run
        """
        log = recipe.log if profile == default.log.profile else dataclasses.replace(recipe.log, profile=profile)
        return output, dataclasses.replace(recipe, log=log)

    output, recipe = read_arguments(command, prog=f"train.py {file}", args=arguments)
    from mmrlhf_jax.training.distributed import join_processes
    from mmrlhf_jax.training.peers import watched_processes
    from mmrlhf_jax.training.runtime import set_up_jax
    from mmrlhf_jax.training.train import train

    join_processes()
    set_up_jax(recipe.compute.dtype)  # before the watch, which asks jax for the number of this process
    with watched_processes():
        train(recipe, output)


if __name__ == "__main__":
    run_command(main)

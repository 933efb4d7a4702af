"""Whether a recipe fits chips that are not here, and how long its step should take.

    python launch/plan.py configs/RECIPE.py --topology v5p:2x2x2 --model MODEL --dataset DATASET
    python launch/plan.py configs/RECIPE.py --device h100:8 --shape 7b [--field.subfield VALUE ...]

No weights are read and nothing runs. For TPUs the step is compiled ahead of time (libtpu, minutes for a large model;
--estimate leaves that out); for GPUs memory is estimated. configs/RECIPE.py --help lists every flag.
Exit codes: 0 it fits, 1 it does not fit or the plan failed, 2 bad usage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from mmrlhf_jax.command import CommandError, UsageError, read_arguments, run_command
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.planning.plan import TYPICAL, Choices, make_plan
from mmrlhf_jax.planning.report import as_json, lines, verdict
from mmrlhf_jax.planning.step_time import EFFICIENCY
from mmrlhf_jax.planning.topology import Target, read_target
from mmrlhf_jax.training.recipe import Recipe, read_recipe


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print((__doc__ or "").strip())
        sys.exit(0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2)
    file, arguments = sys.argv[1], sys.argv[2:]
    default = read_recipe(file)

    def command(
        topology: str = "",
        device: str = "",
        slices: int = 1,
        shape: Literal["", "0.5b", "7b", "72b"] = "",
        bucket: str = "",
        responses: int | None = None,
        all_buckets: bool = False,
        estimate: bool = False,
        efficiency: float = EFFICIENCY,
        output: Annotated[str, tyro.conf.arg(name="json")] = "",
        recipe: Annotated[tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="")] = default,
    ) -> tuple[Recipe, Target, Choices, str]:
        """Whether a recipe fits chips that are not here, and how long its step should take.

        Args:
            topology: TPUs: a slice as Google Cloud names it, such as v5e:4x4, v5p:2x2x2, v6e:2x4
            device: GPUs: so many of a kind, such as h100:8
            slices: so many of these, joined by the network; data must be a multiple of it (--mesh.data)
            shape: a LLaVA-OneVision of a published size, in place of a model
            bucket: GROUPS,TILES,PROMPT,RESPONSE of a micro-batch over all chips, in place of a dataset; 0 groups: as
                many as data.slots-per-device lets a chip take. Default: a ranked picture of the MM-RLHF mix,
                0,5,3072,768
            responses: responses of a group, where there is no dataset; 4 by default
            all_buckets: compile every bucket of the dataset, not only the one that needs most
            estimate: compile nothing
            efficiency: share of a chip's peak that matrix products are taken to reach
            output: a file for the figures
            recipe: what would run
        """
        jax.config.update("jax_platforms", "cpu")  # a plan takes no accelerator from whoever uses it
        target = read_target(topology, device, slices)
        if bucket and recipe.dataset:
            raise UsageError("--bucket stands for a dataset that is not here: leave one of them out")
        if recipe.dataset and responses is not None:
            raise UsageError("--responses are those of a dataset: leave one of them out")
        if all_buckets and (estimate or device):
            raise UsageError("--all-buckets compiles for TPUs: --device and --estimate compile nothing")
        responses = 4 if responses is None else responses
        if not 0 < efficiency <= 1 or responses < 1:
            raise UsageError("--efficiency lies in (0, 1], --responses is positive")
        choices = Choices(
            shape, read_bucket(bucket) if bucket else TYPICAL, responses, all_buckets, estimate, efficiency
        )
        return recipe, target, choices, output

    recipe, target, choices, output = read_arguments(command, prog=f"plan.py {file}", args=arguments)
    plan = make_plan(recipe, target, choices, say_progress)
    print("\n".join(lines(plan)))
    if output:
        Path(output).write_text(json.dumps(as_json(plan), indent=2) + "\n")
    if not plan.fits:
        raise CommandError(verdict(plan))


def say_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_bucket(text: str) -> Bucket:
    """GROUPS,TILES,PROMPT,RESPONSE. Raises UsageError for anything else."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdigit() for part in parts) or not int(parts[2]) or not int(parts[3]):
        raise UsageError(f"--bucket {text}: write GROUPS,TILES,PROMPT,RESPONSE, as in 16,5,3072,768")
    groups, tiles, prompt, response = map(int, parts)
    return Bucket(groups, tiles, prompt, response)


if __name__ == "__main__":
    run_command(main)

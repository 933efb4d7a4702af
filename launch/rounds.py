"""Online rounds: a policy answers, its answers are scored and ranked, it trains on them, and again.

    python launch/rounds.py --policy SFT --reward RM --recipe configs/rounds/mm_dpo.py --prompts prompts.jsonl \\
        --media MEDIA --held-out held_out.jsonl --output runs/rounds --rounds 3

Each round asks prompts of its own (a file as launch/generate.py reads it), samples K answers to each, scores them,
prefers some to others, and trains the last round's policy on them with any recipe. Every step is a program a user
calls, printed before it runs: generate, prepare, annotate, train.

    --score    reward     the score of the one --reward
               direction  attributes of an answer along --direction NAME=WEIGHT ... (DPA): each --reward NAME=MODEL is
                          one, --attributes PROGRAM.py adds any, and a --world the true supported, claims and wrong
               claims     the share of its claims that are supported, fewer than --few-claims discounted (FActScore)
    --select   best_vs_worst, all_pairs, max_gap    pairs, for a recipe with a preference objective: RLHF Workflow,
                                                    factuality tuning; SELM with its objective and --reference moving
               best       the best of K, for a recipe with Supervised: rejection sampling; with a direction DPA's
               steer      every answer under a prompt that says the levels of its attributes, for Supervised too; later
                          rounds ask for the best ones (SteerLM)
    --reference  fixed: --policy, in all rounds; moving: the last round's policy

A PROGRAM.py is run as `python PROGRAM.py --candidates FILE --output FILE`: of each line of the first, which has
`prompt`, `image` or `video` and `responses`, it writes a line {"attributes": [{NAME: number, ...}, ...]}, an object
for each response. Wrong claims are counted on the boards of the quickstart alone: --world runs/quickstart/world is
prompts, media, held-out prompts and truth at once.

The table at the end is OUTPUT/table.md; OUTPUT/results.json has it all, OUTPUT/round_N/policy is a RUN. The same
command again resumes; finished stages are not run again. Exit codes: 0 done, 1 failed, 2 bad usage, 75 interrupted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from mmrlhf_jax.command import read_arguments, run_command
from mmrlhf_jax.rounds.loop import Loop
from mmrlhf_jax.rounds.options import Options, check
from mmrlhf_jax.stages import Stages, claimed, stop_on_sigterm, what_it_says
from mmrlhf_jax.training.recipe import read_recipe

LAUNCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Arguments(Options):
    __doc__ = __doc__


def main() -> None:
    stop_on_sigterm()
    arguments = read_arguments(Arguments, prog="rounds.py")
    recipe = read_recipe(arguments.recipe)
    check(arguments, recipe)
    output = Path(arguments.output)
    free = ("output", "decode", "layout", *(("rounds",) if arguments.prompts_per_round else ()))
    options = {k: v for k, v in dataclasses.asdict(arguments).items() if k not in free}
    options["recipe_says"] = what_it_says(recipe)  # generate and annotate compute as it has it, too
    with claimed(output, "rounds", options):
        Loop(arguments, recipe, Stages(output, LAUNCH)).run()


if __name__ == "__main__":
    run_command(main)

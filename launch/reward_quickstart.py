"""Does it help a reward model to criticise before it scores? On the quickstart's boards of handwritten digits, over
several seeds, where every answer's quality is known.

    python launch/reward_quickstart.py --output runs/reward_quickstart --seeds 1 2 3

Needs `pip install 'mmrlhf-jax[quickstart]'`; downloads nothing. For each seed a world, a model and its SFT run as in
launch/quickstart.py; from that run a critique reward model and, for as many steps on the same groups, a scalar one;
then `annotate --with reward` scores the answers about boards of digits neither has seen: behind critiques the model
writes, behind those of somebody who sees the board, and without. Seed 0 is where steps and weights were chosen. Every
program is printed before it runs, every result as it comes; at the end a table with the spread over seeds, and
results.json. It runs on the CPU unless JAX_PLATFORMS says otherwise. The same command again resumes, with more seeds
too; finished stages are not run again. Exit codes: 0 done, 1 failed, 2 bad usage, 75 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from mmrlhf_jax.command import UsageError, run_command
from mmrlhf_jax.data.digit_boards.world import (
    MAPPING,
    SPLITS,
    WorldConfig,
    plain_world,
    read_questions,
    write_world,
)
from mmrlhf_jax.quickstart import (
    critique_measures,
    model_of_world,
    pair_accuracy,
    stored_rewards,
)
from mmrlhf_jax.stages import Stages, claimed, stop_on_sigterm

LAUNCH = Path(__file__).resolve().parent
RECIPES = LAUNCH.parent / "configs" / "quickstart"
SAMPLES = 8


@dataclass(frozen=True)
class Scorer:
    """A reward model as launch/annotate.py is asked to use it."""

    title: str
    run: str
    critiques: str
    samples: int = 1


SCORERS = {
    "scalar": Scorer("scalar reward model", "scalar_reward", "none"),
    "none": Scorer("critique model, without critique", "critique_reward", "none"),
    "generated": Scorer("critique model, its own critique", "critique_reward", "generated"),
    "sampled": Scorer(f"critique model, mean of {SAMPLES} of its own", "critique_reward", "generated", SAMPLES),
    "human": Scorer("critique model, the true critique", "critique_reward", "human"),
}
PAIRS = {"longer": "the longer answer", **{name: scorer.title for name, scorer in SCORERS.items()}}
CRITIQUES = {"critique_statements": "statements", "critique_counts": "counts of wrong claims"}
MULTIPLE = 16  # prompts are short: padding to 128 would be most of the work
MOST_TOKENS = 24  # of a critique; the longest right one has 17


@dataclass(frozen=True)
class Arguments:
    """A critique reward model beside a scalar one, on boards of handwritten digits."""

    output: str = "runs/reward_quickstart"
    """directory of everything that is made, a directory a seed; the same command again resumes"""
    seeds: tuple[int, ...] = (1, 2, 3)  # seed 0 is where the recipes' steps and weights were chosen
    """of the world, the model's weights and the order of the data: everything is done anew for each"""
    boards: int = WorldConfig.train_boards
    """boards to train on, two questions each"""
    held_out_boards: int = WorldConfig.held_out_boards
    """boards of other digits to evaluate on, two questions each"""
    sft_steps: int | None = None
    """steps of supervised fine-tuning; the recipe's by default"""
    reward_steps: int | None = None
    """steps of each reward model; the recipes' by default"""

    def __post_init__(self) -> None:
        for name in ("boards", "held_out_boards", "sft_steps", "reward_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UsageError("--seeds needs at least one seed, none negative and each once")


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    stop_on_sigterm()
    arguments = tyro.cli(Arguments, prog="reward_quickstart.py", description=__doc__)
    output = Path(arguments.output)
    options = {k: v for k, v in dataclasses.asdict(arguments).items() if k not in ("output", "seeds")}
    with claimed(output, "reward_quickstart", options):
        _run(output, arguments, options)


def _run(output: Path, arguments: Arguments, options: Mapping[str, Any]) -> None:
    """Every seed, and what came out."""
    found: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds:
        found[seed] = _one_seed(output / f"seed_{seed}", seed, arguments)
    summary = {name: _spread([result[name] for result in found.values()]) for name in {**PAIRS, **CRITIQUES}}
    stated = {"options": options, "seeds": found, "summary": summary}
    (output / "results.json").write_text(json.dumps(stated, indent=1) + "\n")
    print("\n".join(_table(found, summary)))


def _one_seed(output: Path, seed: int, arguments: Arguments) -> dict[str, float]:
    """Everything for one seed, in `output`; what was measured."""
    print(f"seed {seed}")
    output.mkdir(exist_ok=True)
    stages, world, data = Stages(output, LAUNCH), output / "world", output / "data"
    config = plain_world(arguments.boards, arguments.held_out_boards, seed)
    stages.call("world", world, lambda: write_world(world, config))
    stages.call(
        "model",
        output / "model",
        lambda: model_of_world(output / "model", world, RECIPES / "critique_template.txt", config.side, seed),
    )
    for split in SPLITS:
        stages.program(
            f"prepare_{split}", data / split, "prepare", "--source", "mapped",
            "--input", world / f"{split}.jsonl", "--media", world / "media", "--map", *MAPPING,
            "--model", output / "model", "--output", data / split,
        )  # fmt: skip
    _train(stages, "sft", output / "model", arguments.sft_steps, seed)
    for run in ("critique_reward", "scalar_reward"):
        _train(stages, run, output / "sft", arguments.reward_steps, seed)
    measured = _baselines(output)
    for scorer in SCORERS:
        _annotate(stages, scorer)
        file = output / "measured" / f"{scorer}.json"
        stages.call(f"measure_{scorer}", file, partial(_measure, output, scorer, file))
        measured |= json.loads(file.read_text())
        print(f"  {SCORERS[scorer].title}: {_in_words(scorer, measured)}", flush=True)
    print("\n".join(stages.summary()))
    return measured


def _train(stages: Stages, run: str, model: Path, steps: int | None, seed: int) -> None:
    directory = stages.output / run
    flags = ["--model", model, "--dataset", stages.output / "data" / "train", "--output", directory, "--seed", seed]
    flags += [] if steps is None else ["--data.max-steps", steps]
    stages.program(run, directory / "complete.json", "train", RECIPES / f"{run}.py", *flags)


def _annotate(stages: Stages, name: str) -> None:
    scorer, data = SCORERS[name], stages.output / "data" / "held_out"
    flags = ["--max-new-tokens", MOST_TOKENS, "--decode.multiple", MULTIPLE, "--decode.max-buckets", 1]
    flags += ["--samples", scorer.samples, "--temperature", 1] if scorer.samples > 1 else []
    stages.program(
        f"annotate_{name}", data / "annotations", "annotate", "--dataset", data, "--model", stages.output / scorer.run,
        "--with", "reward", "--critiques", scorer.critiques, "--dtype", "float32", "--multiple", MULTIPLE,
        "--max-buckets", 1, *(flags if scorer.critiques == "generated" else ()),
    )  # fmt: skip


def _baselines(output: Path) -> dict[str, float]:
    """What needs no model: the longer answer, in characters, is the better one."""
    from mmrlhf_jax.data.datasets import open_dataset

    groups = list(open_dataset(output / "data" / "held_out").groups())
    lengths = [[len(response.text) for response in group.responses] for group in groups]
    found = {"pairs": sum(len(group.pairs) for group in groups), "longer": pair_accuracy(groups, lengths)}
    print(f"  longer answer: {found['longer']:.1%} of {found['pairs']} pairs", flush=True)
    return found


def _measure(output: Path, scorer: str, file: Path) -> None:
    """The pair accuracy of a scorer on the held-out boards and, of its own critiques, how much of them is true."""
    from mmrlhf_jax.data.dataset import PreparedDataset

    dataset = PreparedDataset(str(output / "data" / "held_out"))
    asked = SCORERS[scorer]
    groups = list(dataset.groups())
    rewards = stored_rewards(dataset, output / asked.run, asked.critiques, asked.samples)
    found = {scorer: pair_accuracy(groups, [reward.score for reward in rewards])}
    if scorer == "generated":
        truth = {row["id"]: row for row in read_questions(output / "world", "held_out")}
        found |= critique_measures(groups, rewards, truth)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found) + "\n")


def _in_words(scorer: str, measured: Mapping[str, float]) -> str:
    pairs = f"{measured[scorer]:.1%} of pairs"
    if scorer != "generated":
        return pairs
    return f"{pairs}, {measured['critique_statements']:.1%} of their statements true"


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (of a sample; 0 for one value), least and greatest."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation, "min": min(values), "max": max(values)}


def _table(found: Mapping[int, Mapping[str, float]], summary: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The lines a user came for."""

    def lines(titles: Mapping[str, str]) -> list[str]:
        return [
            f"{title:36} {summary[name]['mean']:7.1%} {summary[name]['std']:7.1%} {summary[name]['min']:7.1%} .."
            f"{summary[name]['max']:7.1%}   " + " ".join(f"{result[name]:7.1%}" for result in found.values())
            for name, title in titles.items()
        ]

    seeds = " ".join(f"{f'seed {seed}':>7}" for seed in found)
    return [
        "",
        f"{' + '.join(str(result['pairs']) for result in found.values())} pairs of answers about held-out boards:",
        "how often the better answer has the higher score (equal scores are wrong)",
        "",
        f"{'':36} {'mean':>7} {'std':>7} {'min':>7} ..{'max':>7}   {seeds}",
        f"{'at random':36} {0.5:7.1%}",
        *lines(PAIRS),
        "",
        "what of the critiques it writes is true of the board",
        "",
        *lines(CRITIQUES),
    ]


if __name__ == "__main__":
    run_command(main)

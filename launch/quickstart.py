"""The whole of MM-RLHF on a laptop CPU: a small model learns to read boards of real handwritten digits from answers of
mixed quality, a reward model learns to criticise answers, and MM-DPO on its margins teaches the first not to claim what
is not there.

    python launch/quickstart.py --output runs/quickstart

Needs `pip install 'mmrlhf-jax[quickstart]'`; downloads nothing. Every stage is a program a user calls, printed before
it runs: prepare; train (SFT); train (the critique reward model, from the annotators' reasons); annotate (critiques and
scores of every answer, and reference log-probs); train (MM-DPO on the reward model's margins and, beside it for as many
steps, DPO and SFT on the best answers); generate; export. At the end a table says of each policy how often it claims
what is wrong, by task, whether it refuses what cannot be told and only that, how much it says, and how well it prefers
the better of two answers: on boards of digits it never saw, counted against what is true; report.html shows it.
The annotators' ranks are wrong now and then, as people's are. It runs on the CPU unless JAX_PLATFORMS says otherwise.
The same command again resumes; finished stages are not run again. Exit codes: 0 done, 1 failed, 2 bad usage, 75
interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mmrlhf_jax.command import UsageError, run_command
from mmrlhf_jax.data.digit_boards.questions import TASKS
from mmrlhf_jax.data.digit_boards.world import MAPPING, SPLITS, WorldConfig, read_questions, write_world
from mmrlhf_jax.quickstart import (
    MULTIPLE,
    annotate_logps,
    annotator_accuracy,
    critique_measures,
    known_pairs,
    measured_answers,
    model_of_world,
    pair_accuracy,
    read_answers,
    response_logps,
    stored_rewards,
    write_marked,
)
from mmrlhf_jax.stages import Stages, claimed, stop_on_sigterm

LAUNCH = Path(__file__).resolve().parent
RECIPES = LAUNCH.parent / "configs" / "quickstart"
POLICIES = {"sft": "SFT (before)", "sft_best": "SFT on the best", "dpo": "DPO", "mm_dpo": "MM-DPO"}
ALIGNED = ("sft_best", "dpo", "mm_dpo")
MOST_TOKENS = 24  # of an answer or a critique; the longest right ones have 14 and 17


@dataclass(frozen=True)
class Arguments:
    """A small model learns to read boards of handwritten digits, and MM-DPO on the margins of a critique reward model
    teaches it not to claim what is not there."""

    output: str = "runs/quickstart"
    """directory of everything that is made; the same command again resumes"""
    boards: int = 1000
    """boards to train on, three questions each, and a quarter as many clips with two"""
    held_out_boards: int = 120
    """boards of other digits to evaluate on, and clips, likewise"""
    sft_steps: int | None = None
    """steps of supervised fine-tuning; the recipe's by default"""
    reward_steps: int | None = None
    """steps of the critique reward model; the recipe's by default"""
    preference_steps: int | None = None
    """steps of MM-DPO and of what runs beside it; the recipes' by default"""
    seed: int = 0
    """of the world, the model's weights and the order of the data"""

    def __post_init__(self) -> None:
        for name in ("boards", "held_out_boards", "sft_steps", "reward_steps", "preference_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative")


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    stop_on_sigterm()
    arguments = tyro.cli(Arguments, prog="quickstart.py", description=__doc__)
    output = Path(arguments.output)
    with claimed(output, "quickstart", {k: v for k, v in dataclasses.asdict(arguments).items() if k != "output"}):
        _run(Stages(output, LAUNCH), arguments)


def _run(stages: Stages, arguments: Arguments) -> None:
    """Every stage, and what came out."""
    output = stages.output
    _data(stages, arguments)
    seed = arguments.seed
    _train(stages, "sft", "sft_tasks", output / "model", arguments.sft_steps, seed)
    _train(stages, "critique_reward", "critique_reward_tasks", output / "sft", arguments.reward_steps, seed)
    for split in SPLITS:
        _annotate_rewards(stages, split)
    annotate_logps(stages, "train", "sft")
    for policy in ALIGNED:
        _train(stages, policy, policy, output / "sft", arguments.preference_steps, seed)
    for policy in POLICIES:
        annotate_logps(stages, "held_out", policy)
        _generate(stages, policy)
    stages.call("evaluate", output / "results.json", lambda: _evaluate(output))
    exported = output / "mm_dpo_hf"
    stages.program("export", exported, "export", output / "mm_dpo", "--output", exported, "--dtype", "float32")
    _report(stages)
    print("\n".join([*_table(json.loads((output / "results.json").read_text())), "", *stages.summary()]))
    print(f"the MM-DPO policy, ready for transformers: {exported}")
    print(f"curves, calibration, answers side by side: open {output / 'report.html'} in a browser")


def _data(stages: Stages, arguments: Arguments) -> None:
    """World, new model, and both splits as datasets."""
    output, world = stages.output, stages.output / "world"
    config = WorldConfig(arguments.boards, arguments.held_out_boards, seed=arguments.seed)
    stages.call("world", world, lambda: write_world(world, config))
    stages.call(
        "model",
        output / "model",
        lambda: model_of_world(
            output / "model", world, RECIPES / "critique_template.txt", config.side, arguments.seed, heads=4
        ),
    )
    for split in SPLITS:
        stages.program(
            f"prepare_{split}", output / "data" / split, "prepare", "--source", "mapped",
            "--input", world / f"{split}.jsonl", "--media", world / "media", "--map", *MAPPING,
            "--model", output / "model", "--output", output / "data" / split,
        )  # fmt: skip


def _train(stages: Stages, run: str, recipe: str, model: Path, steps: int | None, seed: int) -> None:
    directory = stages.output / run
    flags = ["--model", model, "--dataset", stages.output / "data" / "train", "--output", directory, "--seed", seed]
    flags += [] if steps is None else ["--data.max-steps", steps]
    stages.program(run, directory / "complete.json", "train", RECIPES / f"{recipe}.py", *flags)


def _annotate_rewards(stages: Stages, split: str) -> None:
    """A critique of every answer and the score behind it: on train the margins of MM-DPO, on held_out to measure."""
    data = stages.output / "data" / split
    stages.program(
        f"rewards_{split}", data / "annotations", "annotate", "--dataset", data,
        "--model", stages.output / "critique_reward", "--with", "reward", "--dtype", "float32",
        "--max-new-tokens", MOST_TOKENS, "--multiple", MULTIPLE, "--max-buckets", 1,
        "--decode.multiple", MULTIPLE, "--decode.max-buckets", 1,
    )  # fmt: skip


def _generate(stages: Stages, policy: str) -> None:
    """Greedy answers to the held-out questions."""
    answers = _answers(stages.output, policy)
    stages.program(
        f"answers_{policy}", answers, "generate", "--model", stages.output / policy,
        "--dataset", stages.output / "data" / "held_out", "--output", answers, "--dtype", "float32",
        "--max-new-tokens", MOST_TOKENS, "--decode.multiple", MULTIPLE, "--decode.max-buckets", 1,
    )  # fmt: skip


def _answers(output: Path, policy: str) -> Path:
    return output / "answers" / f"{policy}.jsonl"


def _marked(output: Path, policy: str) -> Path:
    """The same with the spans of wrong claims."""
    return output / "answers" / "marked" / f"{policy}.jsonl"


def _evaluate(output: Path) -> None:
    """Every policy and the reward model on the held-out boards, into results.json; answers with wrong claims marked."""
    from mmrlhf_jax.data.dataset import PreparedDataset

    dataset = PreparedDataset(str(output / "data" / "held_out"))
    groups = list(dataset.groups())
    truth = {row["id"]: row for row in read_questions(output / "world", "held_out")}
    logps = {policy: response_logps(dataset, output / policy) for policy in POLICIES}
    found: dict[str, Any] = {}
    for policy, own in logps.items():
        answers = read_answers(_answers(output, policy))
        write_marked(_marked(output, policy), answers, truth)
        gained = [ours - theirs for ours, theirs in zip(own, logps["sft"], strict=True)]
        found[policy] = {
            **dataclasses.asdict(measured_answers(answers, truth)),
            "preference_accuracy": pair_accuracy(groups, own),
            "reward_accuracy": None if policy == "sft" else pair_accuracy(groups, gained),
        }
    rewards = stored_rewards(dataset, output / "critique_reward", "generated", samples=1)
    judged = {
        "pairs": sum(len(known_pairs(group)) for group in groups),
        "annotator_accuracy": annotator_accuracy(groups),
        "reward_model_accuracy": pair_accuracy(groups, [reward.score for reward in rewards]),
        **critique_measures(groups, rewards, truth),
    }
    (output / "results.json").write_text(json.dumps({"policies": found, "reward_model": judged}, indent=1) + "\n")


def _report(stages: Stages) -> None:
    """A page to look at: all runs, the reward model's calibration, answers with their wrong claims marked."""
    output = stages.output
    stages.program(
        "report", output / "report.html", "report", *(output / run for run in ("sft", "critique_reward", *ALIGNED)),
        "--answers", *(f"{title}={_marked(output, policy)}" for policy, title in POLICIES.items()),
        "--dataset", output / "data" / "held_out", "--output", output / "report.html",
    )  # fmt: skip


def _table(results: Mapping[str, Any]) -> list[str]:
    """The lines a user came for."""
    policies, judged = results["policies"], results["reward_model"]
    tasks = ["all", *(task for task in TASKS if task in policies["sft"]["hallucination"])]
    short = {"unanswerable": "untold"}
    lines = ["", f"{policies['sft']['answers']} questions about held-out boards and clips", ""]
    lines += [f"{'':16} {'wrong claims':{8 * len(tasks)}} {'refused':>16} {'claims':>7} {'pairs ranked right':>20}"]
    heads = [f"{short.get(task, task):>7}" for task in tasks]
    lines += [f"{'':16} {' '.join(heads)}  {'untold':>8} {'others':>7} {'each':>7} {'log-prob':>10} {'reward':>9}"]
    for policy, title in POLICIES.items():
        result = policies[policy]
        shares = " ".join(f"{result['hallucination'][task]:7.1%}" for task in tasks)
        lines.append(
            f"{title:16} {shares}  {_percent(result['refusal']):>8} {_percent(result['over_refusal']):>7} "
            f"{result['length']:7.2f} {result['preference_accuracy']:10.1%} {_percent(result['reward_accuracy']):>9}"
        )
    return [
        *lines,
        "",
        "wrong claims: share of the claims of greedy answers, counted against what is true (hallucination rate)",
        "untold: questions that no picture answers, where to refuse is right; others: where it is wrong",
        "log-prob: the better answer has the higher log-prob, summed over its tokens, not length-normalised",
        "reward: the same of the log-prob less that under SFT, which is DPO's implicit reward",
        "",
        f"{judged['pairs']} pairs: the reward model ranks {judged['reward_model_accuracy']:.1%} right, the annotators "
        f"{judged['annotator_accuracy']:.1%}; {judged['critique_statements']:.1%} of what its critiques state is true",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    run_command(main)

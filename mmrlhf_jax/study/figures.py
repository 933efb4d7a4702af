"""What is counted of one seed's runs, in the directory that launch/study.py keeps for it. Starts a jax backend where a
run's log-probs or scores are read, as only its parameters name them."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.digit_boards.world import read_questions
from mmrlhf_jax.groups import Group
from mmrlhf_jax.quickstart import (
    Rows,
    annotator_accuracy,
    critique_measures,
    measured_answers,
    pair_accuracy,
    read_answers,
    response_logps,
    stored_rewards,
)

BEFORE = "sft"  # the run that every arm starts from


@dataclass(frozen=True)
class HeldOut:
    """The held-out groups of a seed, and what is true of them."""

    dataset: PreparedDataset
    groups: list[Group]
    truth: Rows


@functools.cache
def held_out_of(seed: Path) -> HeldOut:
    dataset = PreparedDataset(str(seed / "data" / "held_out"))
    truth = {row["id"]: row for row in read_questions(seed / "world", "held_out")}
    return HeldOut(dataset, list(dataset.groups()), truth)


def policy_figures(seed: Path, policy: str, answers: Path) -> dict[str, Any]:
    """On the held-out boards: what it says, and which of two answers it prefers; and what it took to train."""
    held_out, own = held_out_of(seed), _logps(seed, policy)
    before = _logps(seed, BEFORE)
    gained = [[a - b for a, b in zip(*each, strict=True)] for each in zip(own, before, strict=True)]
    return {
        **dataclasses.asdict(measured_answers(read_answers(answers), held_out.truth)),
        "preference_accuracy": pair_accuracy(held_out.groups, own),
        "reward_accuracy": None if policy == BEFORE else pair_accuracy(held_out.groups, gained),
        "step": step_figures(seed / policy),
    }


@functools.cache
def _logps(seed: Path, policy: str) -> list[list[float]]:
    return [logps.tolist() for logps in response_logps(held_out_of(seed).dataset, seed / policy)]


def step_figures(run: Path) -> dict[str, float]:
    """What a mean step of a run saw and took: items (groups or pairs), pairs, 1e9 operations; seconds without those of
    compiling, nor of the first step, which waits for data; where it has them, margin and beta of a pair."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    figures = {
        "items": mean(step["groups_per_second"] * step["seconds"] for step in steps),
        "pairs": mean(step["pairs_per_second"] * step["seconds"] for step in steps),
        "gigaflop": mean(1e3 * step["model_tflops_per_second"] * step["seconds"] for step in steps),
        "seconds": mean(step["seconds"] - step["seconds/compile"] for step in steps[1:] or steps),
    }
    logged = {"margin": "margin/mean", "beta": "beta/mean"}
    return figures | {name: mean(step[key] for step in steps) for name, key in logged.items() if key in steps[0]}


def score_figures(seed: Path, reward_model: str, critiques: str) -> dict[str, Any]:
    """How often a reward model behind such critiques scores the better of two held-out answers higher and, of critiques
    of its own, what is true; and what it took to train."""
    held_out = held_out_of(seed)
    rewards = stored_rewards(held_out.dataset, seed / reward_model, critiques, samples=1)
    accuracy = pair_accuracy(held_out.groups, [reward.score for reward in rewards])
    found = {"accuracy": accuracy, "step": step_figures(seed / reward_model)}
    return found | (critique_measures(held_out.groups, rewards, held_out.truth) if critiques == "generated" else {})


def scores_without_model(seed: Path) -> dict[str, dict[str, float]]:
    """The same of who needs no model: the longer answer, in characters, and the annotators, who are wrong at times."""
    groups = held_out_of(seed).groups
    lengths = [[len(response.text) for response in group.responses] for group in groups]
    return {
        "longer": {"accuracy": pair_accuracy(groups, lengths)},
        "annotators": {"accuracy": annotator_accuracy(groups)},
    }

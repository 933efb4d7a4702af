"""What is measured of each round, and the table a run of rounds ends in."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrlhf_jax.quickstart import measured_answers
from mmrlhf_jax.rounds.attributes import WRONG
from mmrlhf_jax.rounds.candidates import Row
from mmrlhf_jax.study.table import MISSING, markdown

LAST = 0.1  # share of a run's steps, the last ones, that its figures are means over
LOGGED = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
PHASES = {  # of a round, and the stages each is made of
    "answers": ("prompts", "answers"),
    "scores": ("candidates", "compare", "attributes", "scored"),
    "data": ("ranked", "data", "reference"),
    "train": ("policy",),
}

Figures = dict[str, Any]


def held_out_figures(answers: Sequence[Row], scored: Sequence[Row], truth: Mapping[str, Row] | None) -> Figures:
    """Of greedy answers: mean score of those that have one, mean tokens, share cut off; on boards what is wrong."""
    said = [line["responses"][0] for line in answers]
    scores = [line["answers"][0]["score"] for line in scored]
    found: Figures = {
        "answers": len(said),
        "score": statistics.fmean(scores) if scores else None,
        "tokens": statistics.fmean(answer["tokens"] for answer in said),
        "cut": statistics.fmean(not answer["ended"] for answer in said),
    }
    if truth is not None:
        measured = dataclasses.asdict(measured_answers(answers, truth))
        found |= {name: measured[name] for name in ("hallucination", "refusal", "over_refusal", "length")}
    return found


def judge_accuracy(scored: Sequence[Row]) -> float | None:
    """Of sampled answers to boards: the share of pairs with different numbers of wrong claims whose better one has the
    higher score; equal is wrong. None where no truth is known, or no pair differs."""
    right = [
        one["score"] > other["score"]
        for line in scored
        for one in line["answers"]
        for other in line["answers"]
        if WRONG in one["attributes"] and one["attributes"][WRONG] < other["attributes"][WRONG]
    ]
    return statistics.fmean(right) if right else None


def run_figures(run: Path) -> Figures:
    """Of the last steps of a run: mean loss and, of a preference run, implicit reward margin and accuracy."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = steps[-max(1, round(LAST * len(steps))) :]
    logged = {name: key for name, key in LOGGED.items() if key in last[0]}
    return {"steps": len(steps)} | {name: statistics.fmean(s[key] for s in last) for name, key in logged.items()}


def table(rounds: Sequence[Figures], seconds: Mapping[str, float]) -> list[str]:
    """Markdown, a row a round; round 0 is the policy before. `seconds` of stages, which are named as `stage_name`
    has it."""
    return [
        *markdown(HEAD, [_row(number, figures) for number, figures in enumerate(rounds)]),
        "",
        "wrong claims: share of the claims of greedy held-out answers, counted against what is true; score, tokens: of",
        "the same answers. used, tied, near: prompts trained on; whose answers all score the same; that differ by less",
        "than --min-gap. repeated: sampled answers that repeat another. judge: of two sampled answers with different",
        "numbers of wrong claims, how often the better one has the higher score. margin, accuracy: implicit rewards of",
        "the round's last steps, chosen less rejected and how often above it, against the round's reference",
        "",
        *_seconds(len(rounds), seconds),
    ]


HEAD = (
    "round", "wrong claims", "score", "tokens", "cut", "used", "tied", "near", "pairs", "repeated", "judge", "margin",
    "accuracy",
)  # fmt: skip


def stage_name(number: int, stage: str) -> str:
    return f"round_{number}_{stage}"


def _row(number: int, figures: Figures) -> list[str]:
    held_out, counted, run = figures.get("held_out", {}), figures.get("counted", {}), figures.get("run", {})
    wrong = held_out.get("hallucination", {}).get("all")
    counts = [str(counted.get(name, MISSING)) for name in ("used", "tied", "near", "pairs")]
    repeated = counted["repeated"] / counted["answers"] if counted else None
    return [
        str(number) if number else "0 (before)",
        _share(wrong),
        _number(held_out.get("score"), 3),
        _number(held_out.get("tokens"), 1),
        _share(held_out.get("cut")),
        *counts,
        _share(repeated),
        _share(figures.get("judge")),
        _number(run.get("margin"), 2),
        _share(run.get("accuracy")),
    ]


def _seconds(rounds: int, seconds: Mapping[str, float]) -> list[str]:
    rows = []
    for number in range(rounds):
        prefix = stage_name(number, "")
        own = {name.removeprefix(prefix): value for name, value in seconds.items() if name.startswith(prefix)}
        phases = [sum(own.get(stage, 0.0) for stage in stages) for stages in PHASES.values()]
        phases[1] += sum(value for name, value in own.items() if name.startswith("score_"))
        measured = sum(value for name, value in own.items() if name.startswith("held_out"))
        rows.append([str(number), *(f"{each:.0f}" for each in (*phases, measured, sum(own.values())))])
    return markdown(("seconds of round", *PHASES, "measure", "all"), rows)


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"

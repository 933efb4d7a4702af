"""The tables a study ends in."""

from __future__ import annotations

from collections.abc import Mapping

from mmrlhf_jax.data.digit_boards.questions import TASKS
from mmrlhf_jax.study.summary import Summary
from mmrlhf_jax.study.table import Column, table

SHORT = {"unanswerable": "untold"}
CLAIMS = tuple(Column(f"hallucination/{task}", SHORT.get(task, task)) for task in ("all", *TASKS))
OTHERS = (
    Column("refusal", "untold refused"),
    Column("over_refusal", "others refused"),
    Column("length", "claims", share=False, digits=2),
    Column("preference_accuracy", "log-prob"),
    Column("reward_accuracy", "reward"),
)
SCORES = (
    Column("accuracy", "pairs"),
    Column("critique_statements", "true statements"),
    Column("critique_counts", "true counts"),
)
STEP = (
    Column("step/items", "items", share=False, digits=0),
    Column("step/pairs", "pairs", share=False, digits=0),
    Column("step/gigaflop", "GFLOP", share=False),
    Column("step/seconds", "seconds", share=False, digits=3),
    Column("step/margin", "margin", share=False, digits=2),
    Column("step/beta", "beta", share=False, digits=4),
)
FAMILY_RESULTS = (Column("hallucination/all", "wrong claims"), *OTHERS[:4])
FAMILY_STEP = (
    Column("step/gigaflop", "GFLOP", share=False),
    Column("step/seconds", "seconds", share=False, digits=3),
    Column("extra_forwards", "forwards", share=False, digits=0),
)
FAMILY = (*FAMILY_RESULTS, *FAMILY_STEP)

Titles = Mapping[str, str]


def lines_of(summary: Summary, arms: Titles, grid: Titles, scores: Titles, baselines: Titles) -> list[str]:
    """Markdown. `arms` begin with the policy before any; `grid`: MM-DPO at other w and k, on some of the seeds;
    `baselines`: the arms that others are held against, where they ran."""
    policies = summary.means["policies"]
    before = policies[next(iter(arms))]
    lines = [
        f"Seeds {_listed(summary.seeds)}; {before['answers'].mean:.0f} questions about held-out boards and clips each.",
        "Mean over seeds ± half of its 95 % interval (Student's t). Shares in %, differences in points. A * stands",
        "where the interval of a difference leaves out 0: of twenty differences that are none, one has it by chance.",
    ]
    lines += _section("Wrong claims of greedy answers (hallucination rate), by task; untold: no picture answers it")
    lines += table(policies, arms, CLAIMS)
    lines += _section(
        "Untold questions and others refused; claims an answer; pairs of held-out answers whose better one has the "
        "higher log-prob, and log-prob less that under SFT"
    )
    lines += table(policies, arms, OTHERS)
    for baseline, title in baselines.items():
        if len(arms) > 2:
            lines += _differences(summary, baseline, arms, f"Less {title}, paired by seed")
    if grid:
        tried = max(policies[name]["answers"].n for name in grid)
        title = f"Other w and k, {tried} of {len(summary.seeds)} seeds: less MM-DPO at its own, paired by seed"
        lines += _differences(summary, "mm_dpo", grid, title)
    lines += _section("Pairs of held-out answers whose better one is scored higher; what of critiques is true")
    lines += table(summary.means["scores"], scores, SCORES)
    if "scalar" in summary.differences:
        lines += _section("Less the scalar reward model, paired by seed")
        lines += table(summary.differences["scalar"], scores, SCORES[:1], signed=True)
    lines += _section("A mean step: groups (or pairs of two sequences), their pairs, operations, seconds, margin, beta")
    return [*lines, *table(policies, {**arms, **grid}, STEP)]


def family_lines(summary: Summary, policies: Titles, scores: Titles) -> list[str]:
    """Markdown of the study's second part, sorted. `policies` begin with the one before any; `scores`: reward models,
    and who needs none."""
    means = summary.means
    before, *others = policies
    others.sort(key=lambda name: means["policies"][name]["hallucination/all"].mean)
    policies = {name: policies[name] for name in (before, *others)}
    scores = {name: scores[name] for name in sorted(scores, key=lambda name: -means["scores"][name]["accuracy"].mean)}
    answers = means["policies"][before]["answers"].mean
    lines = [
        f"Seeds {_listed(summary.seeds)}; {answers:.0f} questions about held-out boards and clips each.",
        "Mean over seeds ± half of its 95 % interval (Student's t). Shares in %, differences in points. A * stands",
        "where the interval of a difference leaves out 0: of twenty differences that are none, one has it by chance.",
        "",
        "All from one SFT run a seed, for as many steps of as many groups in one order; a step's operations are shown.",
        "forwards: of every answer of all training groups, once before training, by the reference and by the reward",
        "model whose margins are read, whose own training is not counted. One costs, a group, a third of what a step",
        "does: over one epoch a third of the training, over fewer steps more. Options are the defaults",
        "of --list-objectives but for those named, which are the papers'; gamma, the weight of the preferred answers'",
        "NLL, is named wherever it is not 0. Rate, batch and steps are those chosen for DPO with gamma 0.25 on another",
        "seed: none was tuned for itself. †: reads how many claims are right, which no other is told.",
    ]
    lines += _section(
        "Wrong claims of greedy answers; untold questions and others refused; claims an answer; pairs of held-out "
        "answers whose better one has the higher log-prob; a mean step"
    )
    lines += table(means["policies"], policies, FAMILY)
    if "dpo" in summary.differences:
        lines += _section("Less DPO, paired by seed")
        lines += table(summary.differences["dpo"], policies, FAMILY_RESULTS, signed=True)
    lines += _section("Reward models: pairs of held-out answers whose better one is scored higher; a mean step")
    lines += table(means["scores"], scores, (*SCORES, *FAMILY_STEP))
    if "scalar_reward" in summary.differences:
        lines += _section("Less scalar_reward, paired by seed")
        lines += table(summary.differences["scalar_reward"], scores, SCORES[:1], signed=True)
    return lines


def _differences(summary: Summary, baseline: str, titles: Titles, title: str) -> list[str]:
    found = summary.differences[baseline]
    tables = [table(found, titles, columns, signed=True) for columns in (CLAIMS, OTHERS)]
    return [*_section(title), *tables[0], "", *tables[1]]


def _section(title: str) -> list[str]:
    return ["", f"**{title}**", ""]


def _listed(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))

"""Which pairs of ranked groups stay: those whose scores are far enough apart, or the best and the worst alone.

A pair closer than the gap is no pair, and no tie either: that two scores are close says little about which is better,
and less about their being equal. Equal scores stay ties where all other pairs stay (`Report.ties` counts them).

Gaps as used: at least 1 between counts of wrong claims (RLAIF-V, https://arxiv.org/abs/2405.17220), at least 2 between
sums of three ratings from 0 to 4 (https://arxiv.org/abs/2402.10884), any difference (VLFeedback, Silkie). The best and
the worst of K samples are a pair in RLHF Workflow (https://arxiv.org/abs/2405.07863), ties being dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from mmrlhf_jax.data.sources.rows import Rejected
from mmrlhf_jax.groups import Group, Pair

Pairs = Literal["all", "best_worst"]

_ROUNDING = 1e-9  # 13/3 - 10/3 is below 1: scores are means, a gap is what the user writes


def choose_pairs(
    groups: Sequence[Group], gap: float | None, pairs: Pairs
) -> tuple[list[Group], list[Rejected], list[str]]:
    """Groups with the pairs that stay, rows rejected because a pair has no margin, and lines for the report.

    A group whose pairs all go stays as one without pairs.
    """
    kept, rejected, lines = list(groups), list[Rejected](), list[str]()
    if gap is not None:
        kept, rejected = _with_margins(groups)
        apart = [far_apart(group, gap) for group in kept]
        gone = _count(kept) - _count(apart)
        emptied = sum(bool(was.pairs) and not now.pairs for was, now in zip(kept, apart, strict=True))
        lines.append(f"--gap {gap:g}: {gone} pairs that are closer are none; {emptied} groups lost all of theirs")
        kept = apart
    if pairs == "best_worst":
        chosen = [best_and_worst(group) for group in kept]
        gone, between = _count(kept) - _count(chosen), _responses(kept) - _responses(chosen)
        lines.append(f"--pairs best_worst: {gone} other pairs and {between} other responses are left out")
        kept = chosen
    return kept, rejected, lines


def far_apart(group: Group, gap: float) -> Group:
    """The group with those of its pairs whose margin is at least `gap`, and over 0; with its ties if all of them are.

    Raises:
        ValueError: a pair has no margin.
    """
    pairs = tuple(pair for pair in group.pairs if is_apart(group.margin(pair), gap))
    return dataclasses.replace(group, pairs=pairs, ties=group.ties if len(pairs) == len(group.pairs) else ())


def is_apart(margin: float | None, gap: float) -> bool:
    """Whether so large a difference makes a pair. Raises ValueError where it is unknown."""
    if margin is None:
        raise ValueError("a pair without a margin is neither closer nor further apart than a gap")
    return margin > 0 and margin >= gap - _ROUNDING * max(1.0, abs(gap))


def best_and_worst(group: Group) -> Group:
    """The group's two responses that are furthest apart in rank (then in margin, then the first such), and their pair;
    a group without pairs as it is."""
    if not group.pairs:
        return group

    def distance(pair: Pair) -> tuple[int, float]:
        margin = group.margin(pair)
        steps = group.responses[pair.rejected].rank - group.responses[pair.chosen].rank
        return steps, -math.inf if margin is None else margin

    pair = max(group.pairs, key=distance)  # the first of several
    responses = (
        dataclasses.replace(group.responses[pair.chosen], rank=0),
        dataclasses.replace(group.responses[pair.rejected], rank=1),
    )
    return dataclasses.replace(group, responses=responses, pairs=(Pair(0, 1, pair.margin),), ties=())


def _with_margins(groups: Sequence[Group]) -> tuple[list[Group], list[Rejected]]:
    kept, rejected = [], []
    for group in groups:
        if any(group.margin(pair) is None for pair in group.pairs):
            reason = "--gap: a response of a pair has no score, and the pair no margin"
            rejected += [Rejected(origin, reason) for origin in group.origins]
        else:
            kept.append(group)
    return kept, rejected


def _count(groups: Sequence[Group]) -> int:
    return sum(len(group.pairs) for group in groups)


def _responses(groups: Sequence[Group]) -> int:
    return sum(len(group.responses) for group in groups)

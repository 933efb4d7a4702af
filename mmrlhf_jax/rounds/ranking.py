"""From the scores of one prompt's answers to what is preferred among them.

Every rule prefers answer i to j only where score i - score j is above 0 and at least `min_gap`: of equal scores neither
is better, and a reward model's smallest differences are noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mmrlhf_jax.data.pair_choice import is_apart

Rule = Literal["best_vs_worst", "all_pairs", "max_gap"]


@dataclass(frozen=True, order=True)
class Preference:
    """Answer `chosen` is preferred to `rejected`, both indices, by `gap` of the score."""

    chosen: int
    rejected: int
    gap: float


def best_vs_worst(scores: Sequence[float], min_gap: float = 0.0) -> tuple[Preference, ...]:
    """The highest score against the lowest, the first of equals each; nothing where all tie.

    Source: RLHF Workflow, https://arxiv.org/abs/2405.07863, and SELM, https://arxiv.org/abs/2405.19332.
    """
    indices = range(len(scores))
    best, worst = max(indices, key=lambda i: scores[i]), min(indices, key=lambda i: scores[i])
    return _preferences([(best, worst)], scores, min_gap)


def all_pairs(scores: Sequence[float], min_gap: float = 0.0) -> tuple[Preference, ...]:
    """Every two answers of different score: the whole group, which costs one forward whatever its pairs.

    With a `min_gap` a partial order: a may beat c where neither a beats b nor b beats c.

    Source: https://arxiv.org/abs/2311.08401, whose pairs are all of different truthfulness.
    """
    indices = range(len(scores))
    return _preferences([(i, j) for i in indices for j in indices], scores, min_gap)


def max_gap(scores: Sequence[float], min_gap: float = 0.0) -> tuple[Preference, ...]:
    """Good against bad: scores in descending order are cut where neighbours are furthest apart (the upper cut of
    equals), and each answer above the cut is preferred to each below; nothing where that distance is below `min_gap`.

    Within the two sides, where a judge tells least apart, nothing is claimed. The rule is ours.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    gaps = [scores[a] - scores[b] for a, b in itertools.pairwise(order)]
    if not gaps or not is_apart(max(gaps), min_gap):
        return ()
    cut = gaps.index(max(gaps)) + 1
    return _preferences([(i, j) for i in order[:cut] for j in order[cut:]], scores, min_gap)


RULES: dict[Rule, Callable[[Sequence[float], float], tuple[Preference, ...]]] = {
    "best_vs_worst": best_vs_worst,
    "all_pairs": all_pairs,
    "max_gap": max_gap,
}


def best(scores: Sequence[float]) -> int:
    """The index of the highest score, the first of equals: what rejection sampling keeps of K answers.

    Source: https://arxiv.org/abs/2307.09288, section 3.2.3; with a score along a direction it is DPA's
    (https://arxiv.org/abs/2402.18571).
    """
    return max(range(len(scores)), key=lambda i: scores[i])


def _preferences(pairs: Sequence[tuple[int, int]], scores: Sequence[float], min_gap: float) -> tuple[Preference, ...]:
    """Those of (chosen, rejected) whose gap is one, in order of index."""
    found = (Preference(i, j, scores[i] - scores[j]) for i, j in pairs)
    return tuple(sorted(each for each in found if is_apart(each.gap, min_gap)))

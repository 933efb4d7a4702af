"""From pairwise preferences between K responses back to the ranks the annotator gave.

Released preference files hold every pair of a ranking as its own row. Ranks come back as the depth of a response in
the preference graph; whether they say exactly what the rows said is reported, never assumed.
"""

from __future__ import annotations

import dataclasses
import graphlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mmrlhf_jax.groups import Group, Origin, Pair, Response


@dataclass(frozen=True, slots=True)
class Preference:
    """Response `chosen` is better than response `rejected`, or as good (`tie`), says the row `origin`."""

    chosen: int
    rejected: int
    origin: Origin
    tie: bool = False


@dataclass(frozen=True, slots=True)
class Ranking:
    """`rank[i]` of response i, 0 = best, without gaps.

    `complete`: the preferences are exactly all pairs of different rank. Where they are not, equal ranks do not mean
    a tie and the listed pairs stay the only preferences.
    """

    rank: tuple[int, ...]
    complete: bool


class RankingCycle(ValueError):
    """Preferences that contradict each other; `origins` are the rows on the cycle."""

    def __init__(self, origins: Sequence[Origin]):
        self.origins = tuple(sorted(set(origins), key=lambda origin: (origin.file, origin.line)))
        super().__init__("preferences contradict each other: " + ", ".join(map(str, self.origins)))


def pairs_of(rank: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """All (better, worse) pairs of different rank, in order of index."""
    count = range(len(rank))
    return tuple((i, j) for i in count for j in count if rank[i] < rank[j])


def ties_of(rank: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """All pairs (i, j), i < j, of equal rank, in order of index."""
    return tuple((i, j) for i, j in itertools.combinations(range(len(rank)), 2) if rank[i] == rank[j])


def tied(group: Group) -> frozenset[tuple[int, int]]:
    """The (i, j), i < j, of a group's responses that are equally good: those that somebody said are, and those of equal
    rank where the pairs listed are all of different rank, and there is one; else nobody may have compared them."""
    rank = [response.rank for response in group.responses]
    listed = {(pair.chosen, pair.rejected) for pair in group.pairs}
    implied = ties_of(rank) if listed and listed == set(pairs_of(rank)) else ()
    return frozenset((*group.ties, *implied))


def weak_order(count: int, preferences: Sequence[Preference]) -> Ranking:
    """Ranks of `count` responses: the longest path of preferences that leads down to each.

    Raises:
        RankingCycle: no ranking agrees with all preferences.
        IndexError: a preference names a response that is not there.
    """
    for preference in preferences:
        if not (0 <= preference.chosen < count and 0 <= preference.rejected < count):
            raise IndexError(f"{preference.origin} names a response outside 0..{count - 1}")
    tied = _tie_classes(count, preferences)
    strict = [p for p in preferences if not p.tie]
    above: dict[int, set[int]] = {tied[i]: set() for i in range(count)}
    for preference in strict:
        above[tied[preference.rejected]].add(tied[preference.chosen])
    depth: dict[int, int] = {}
    try:
        for node in graphlib.TopologicalSorter(above).static_order():
            depth[node] = max((depth[better] + 1 for better in above[node]), default=0)
    except graphlib.CycleError as error:
        raise RankingCycle(_origins_on(error.args[1], tied, preferences)) from None
    rank = tuple(depth[tied[i]] for i in range(count))
    listed = {(p.chosen, p.rejected) for p in strict}
    return Ranking(rank, complete=listed == set(pairs_of(rank)))


def _tie_classes(count: int, preferences: Sequence[Preference]) -> list[int]:
    """Each response's tie class, named by one of its members."""
    name = list(range(count))
    for preference in preferences:
        if preference.tie:
            kept, gone = name[preference.chosen], name[preference.rejected]
            name = [kept if n == gone else n for n in name]
    return name


def _origins_on(cycle: Sequence[int], tied: list[int], preferences: Sequence[Preference]) -> list[Origin]:
    """Rows between neighbours on the cycle, and the ties within a class on it."""
    steps = set(itertools.pairwise(cycle)) | {(node, node) for node in cycle}
    return [p.origin for p in preferences if (tied[p.chosen], tied[p.rejected]) in steps]


def by_score(responses: Sequence[Response]) -> tuple[list[Response], tuple[Pair, ...]]:
    """Responses best first and ranked by their scores, and the pairs of different rank. Equal scores share a rank and
    keep their order.

    Raises:
        ValueError: a response has no score.
    """
    scores = [response.score for response in responses if response.score is not None]
    if len(scores) < len(responses):
        raise ValueError(f"{len(responses) - len(scores)} of {len(responses)} responses have no score")
    levels = sorted(set(scores), reverse=True)
    order = sorted(range(len(responses)), key=lambda i: -scores[i])
    ranked = [dataclasses.replace(responses[i], rank=levels.index(scores[i])) for i in order]
    return ranked, tuple(Pair(i, j) for i, j in pairs_of([response.rank for response in ranked]))

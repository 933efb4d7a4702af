from __future__ import annotations

import itertools

import numpy as np
import pytest

from mmrlhf_jax.data.ranking import Preference, RankingCycle, pairs_of, weak_order
from mmrlhf_jax.groups import Origin


def preferences(*pairs: tuple[int, int], ties: tuple[tuple[int, int], ...] = ()) -> list[Preference]:
    strict = [Preference(a, b, Origin("f", line)) for line, (a, b) in enumerate(pairs, 1)]
    return strict + [Preference(a, b, Origin("f", 100 + i), tie=True) for i, (a, b) in enumerate(ties)]


def test_every_ranking_of_up_to_four_comes_back_from_its_pairs() -> None:
    rng = np.random.default_rng(0)
    for count in range(1, 5):
        for raw in itertools.product(range(count), repeat=count):
            levels = sorted(set(raw))
            rank = tuple(levels.index(r) for r in raw)
            pairs = list(pairs_of(rank))
            rng.shuffle(pairs)
            found = weak_order(count, preferences(*pairs))
            assert found.rank == rank
            assert found.complete


def test_a_preference_that_was_not_given_is_not_invented() -> None:
    found = weak_order(4, preferences((0, 1), (2, 3), (1, 3)))
    assert found.rank == (0, 1, 0, 2)
    assert not found.complete  # 2 > 1 would follow from the ranks, and nobody said so


def test_a_chain_without_its_ends_compared_is_incomplete() -> None:
    assert not weak_order(3, preferences((0, 1), (1, 2))).complete


def test_ties_join_responses_without_a_pair() -> None:
    assert weak_order(3, preferences((0, 2), (1, 2), ties=((0, 1),))).rank == (0, 0, 1)
    assert weak_order(3, preferences((0, 2), (1, 2), ties=((0, 1),))).complete
    half = weak_order(3, preferences((0, 2), ties=((0, 1),)))
    assert half.rank == (0, 0, 1)
    assert not half.complete


def test_a_cycle_names_its_rows_and_no_others() -> None:
    with pytest.raises(RankingCycle, match=r"contradict each other: f:2, f:3, f:4$"):
        weak_order(4, preferences((3, 0), (0, 1), (1, 2), (2, 0)))
    with pytest.raises(RankingCycle, match=r"f:1, f:2$"):
        weak_order(2, preferences((0, 1), (1, 0)))


def test_a_tie_can_close_a_cycle() -> None:
    with pytest.raises(RankingCycle, match=r"f:1, f:100$"):
        weak_order(2, preferences((0, 1), ties=((0, 1),)))
    with pytest.raises(RankingCycle, match=r"f:1, f:2, f:100$"):
        weak_order(3, preferences((0, 1), (1, 2), ties=((2, 0),)))


def test_a_preference_about_nobody_is_refused() -> None:
    with pytest.raises(IndexError, match=r"f:1 names a response outside 0\.\.1"):
        weak_order(2, preferences((0, 2)))

"""Which answers are preferred to which, on cases worked by hand."""

import math

import pytest

from mmrlhf_jax.rounds.ranking import Preference, all_pairs, best, best_vs_worst, max_gap
from mmrlhf_jax.rounds.scoring import along, claim_score, levels, steered, unit, wanted_levels

SCORES = (0.5, 2.0, -1.0, 2.0)  # two share the best score


def pairs(preferences):
    return [(each.chosen, each.rejected) for each in preferences]


def test_best_vs_worst_takes_the_first_of_equals():
    assert best_vs_worst(SCORES) == (Preference(1, 2, 3.0),)


def test_all_pairs_are_those_of_different_score():
    assert all_pairs(SCORES) == (
        Preference(0, 2, 1.5), Preference(1, 0, 1.5), Preference(1, 2, 3.0), Preference(3, 0, 1.5),
        Preference(3, 2, 3.0),
    )  # fmt: skip


def test_max_gap_cuts_where_neighbours_are_furthest_apart():
    # sorted: 9, 8, 3, 2.5, 2: the gap of 5 parts {9, 8} from the rest
    assert pairs(max_gap((2.5, 9.0, 2.0, 8.0, 3.0))) == [(1, 0), (1, 2), (1, 4), (3, 0), (3, 2), (3, 4)]
    assert pairs(max_gap((0.0, 2.0, 1.0))) == [(1, 0), (1, 2)]  # gaps are equal: the upper one


@pytest.mark.parametrize("rank", [best_vs_worst, all_pairs, max_gap])
def test_no_rule_prefers_among_equals_or_of_a_single_answer(rank):
    assert rank((1.0, 1.0, 1.0)) == ()
    assert rank((1.0,)) == ()


@pytest.mark.parametrize("rank", [best_vs_worst, all_pairs, max_gap])
def test_a_gap_of_exactly_the_least_one_is_enough(rank):
    assert pairs(rank((0.0, 1.0), 1.0)) == [(1, 0)]
    assert rank((0.0, 1.0), 1.0001) == ()
    assert 0.3 - 0.2 < 0.1  # in floats; the user means the decimals
    assert pairs(rank((0.2, 0.3), 0.1)) == [(1, 0)]


def test_all_pairs_with_a_least_gap_are_a_partial_order():
    # 0 beats 2 by 1.2; neither beats, nor is beaten by, 1
    assert pairs(all_pairs((1.2, 0.6, 0.0), 1.0)) == [(0, 2)]


def test_the_best_is_the_first_of_equals():
    assert best(SCORES) == 1


def test_direction_is_dpas():
    # golden: theta = -15 degrees, (helpfulness, verbosity) = (80, 90) and (75, 40)
    direction = unit({"helpful": 2 * math.cos(math.radians(-15)), "verbose": 2 * math.sin(math.radians(-15))})
    assert along({"helpful": 80, "verbose": 90, "other": 7}, direction) == pytest.approx(53.980, abs=1e-3)
    assert along({"helpful": 75, "verbose": 40}, direction) == pytest.approx(62.092, abs=1e-3)


def test_a_direction_has_a_length():
    for bad in ({"a": 0.0}, {"a": math.inf}, {"a": math.nan}):
        with pytest.raises(ValueError, match="finite weight other than 0"):
            unit(bad)


def test_claim_score_is_factscores():
    assert claim_score(5, 5) == pytest.approx(0.36787944)  # golden: exp(1 - 10 / 5)
    assert claim_score(5, 10) == pytest.approx(0.5)  # exp(0)
    assert claim_score(6, 12) == 0.5
    assert claim_score(1, 2, few=0) == 0.5
    assert claim_score(0, 0) == 0


def test_levels_span_what_there_is():
    assert levels([2.0, 4.0, 3.0, 2.4]) == [0, 4, 2, 1]
    assert levels([3.0, 3.0]) == [4, 4]


def test_what_is_asked_for_follows_the_signs():
    wanted = wanted_levels({"supported": 0.8, "wrong": -0.6})
    assert steered("What is in row 1?", wanted) == "What is in row 1? supported 4 wrong 0"

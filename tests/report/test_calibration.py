from __future__ import annotations

import math

import numpy as np
import pytest

from mmrlhf_jax.groups import Group, Pair, Response
from mmrlhf_jax.report.calibration import calibrate, differences_of, wilson


class Scored:
    """A scoring of one group."""

    def __init__(self, *scores: float):
        self.rewards = {0: type("Reward", (), {"score": scores})}


def group(*ranks: int, pairs=((0, 1),)) -> Group:
    responses = tuple(Response(str(i), rank) for i, rank in enumerate(ranks))
    return Group("q", (), (), responses, tuple(Pair(*pair) for pair in pairs), ())


def test_four_pairs_by_hand():
    """log 3 apart: 75 %, three of them right; equal scores: 50 % and half right."""
    third = math.log(3)
    found = calibrate(np.array([third, third, third, -third, 0]))
    equal, sure = found.bins
    assert (equal.low, equal.count, equal.predicted, equal.agreed) == (0.5, 1, 0.5, 0.5)
    assert sure.low == pytest.approx(0.75)
    assert (sure.count, sure.agreed) == (4, 0.75)
    assert sure.predicted == pytest.approx(0.75)
    assert (found.pairs, found.equal) == (5, 1)
    assert found.accuracy == pytest.approx((3 + 0.5) / 5)
    assert found.error == pytest.approx(0)
    assert found.brier == pytest.approx((3 * 0.25**2 + 0.75**2 + 0.5**2) / 5)


def test_being_sure_and_wrong_is_an_error_of_nearly_one():
    found = calibrate(np.array([-20.0, -20.0]))
    assert found.bins[0].high == 1.0
    assert found.error == pytest.approx(1, abs=1e-6)
    assert found.accuracy == 0


def test_every_pair_is_in_one_bin():
    rng = np.random.default_rng(0)
    differences = np.concatenate([rng.normal(0, 3, 5000), [0, 1000, -1000]])
    found = calibrate(differences)
    assert sum(each.count for each in found.bins) == len(differences)
    assert all(each.low - 1e-12 <= each.predicted <= each.high + 1e-12 for each in found.bins)


def test_a_model_that_tells_the_truth_lies_on_the_diagonal():
    rng = np.random.default_rng(1)
    size = np.abs(rng.normal(0, 2, 200_000))
    right = rng.random(len(size)) < 1 / (1 + np.exp(-size))
    assert calibrate(np.where(right, size, -size)).error < 0.005


def test_wilsons_interval_of_8_in_10():
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson(1.0, 5)
    assert high == pytest.approx(1)
    assert low == pytest.approx(0.5655, abs=1e-4)


def test_a_tie_is_no_pair_and_is_counted():
    differences, tied = differences_of(Scored(3.0, 1.0, 9.0), [group(0, 1, 1, pairs=((0, 1), (0, 2)))])
    assert differences.tolist() == [2.0, -6.0]
    assert tied == 1


def test_equal_ranks_in_a_partial_order_are_no_tie():
    differences, tied = differences_of(Scored(3.0, 1.0, 9.0), [group(0, 1, 1, pairs=((0, 1),))])
    assert differences.tolist() == [2.0]
    assert tied == 0

from __future__ import annotations

import numpy as np

from mmrlhf_jax.report.curves import curve, segments
from mmrlhf_jax.report.runs import Series


def series(values, first: int = 1) -> Series:
    return Series(np.arange(first, first + len(values)), np.array(values, float))


def test_a_short_run_is_drawn_as_it_is():
    found = curve(series([3, 2, 1]))
    assert found.step.tolist() == [1, 2, 3]
    assert found.value.tolist() == [3, 2, 1]
    assert (found.per_point, found.lost) == (1, 0)


def test_a_long_run_is_cut_into_equal_bins_of_mean_least_and_greatest():
    found = curve(series([1, 3, 5, 9, 100, 200, 7]), points=4)
    assert found.per_point == 2
    assert found.step.tolist() == [1.5, 3.5, 5.5, 7]  # the last bin has one step
    assert found.value.tolist() == [2, 7, 150, 7]
    assert found.low.tolist() == [1, 5, 100, 7]
    assert found.high.tolist() == [3, 9, 200, 7]


def test_a_spike_of_one_step_in_100_000_stays_within_the_band():
    values = np.ones(100_000)
    values[54_321] = 50
    found = curve(series(values))
    assert len(found.step) <= 150
    assert np.nanmax(found.high) == 50


def test_a_value_that_is_not_finite_is_a_gap_and_is_counted():
    found = curve(series([1, np.nan, 3, np.inf, 5]))
    assert [part.tolist() for part in segments(found)] == [[0], [2], [4]]
    assert (found.lost, found.first_lost) == (2, 2)


def test_a_bin_leaves_out_what_is_not_finite_and_is_a_gap_only_where_nothing_is():
    found = curve(series([1, np.nan, np.nan, -np.inf, 5, 7]), points=3)
    assert found.value[[0, 2]].tolist() == [1, 6]
    assert not found.finite[1]
    assert found.lost == 3


def test_missing_steps_are_a_gap_too():
    found = curve(Series(np.array([0, 1, 10, 11]), np.array([1.0, 1, 2, 2])), points=3)
    assert found.per_point == 4
    assert found.finite.tolist() == [True, False, True]


def test_there_is_no_curve_of_nothing():
    assert curve(series([np.nan, np.inf])) is None
    assert curve(series([])) is None

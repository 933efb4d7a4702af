"""Student's t, by hand and by how often it is right."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmrlhf_jax.study.intervals import interval, paired_difference


def test_the_half_width_is_t_times_the_deviation_over_the_root_of_n() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)  # t at 4 degrees of freedom
    assert found.n == 5


def test_two_values_have_the_wide_interval_of_one_degree_of_freedom() -> None:
    assert interval([0.0, 2.0]).half == pytest.approx(12.7062, rel=1e-5)


def test_one_value_says_nothing_of_how_it_varies() -> None:
    found = interval([0.4])
    assert (found.mean, found.half, found.n) == (0.4, None, 1)
    assert not found.excludes_zero


def test_no_value_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_95_of_100_intervals_of_five_values_hold_the_mean() -> None:
    samples = np.random.default_rng(0).normal(1.0, 3.0, (4000, 5))
    held = [abs(found.mean - 1) <= found.half for found in map(interval, samples.tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)


def test_a_difference_is_paired_by_seed() -> None:
    theirs = {1: 0.10, 2: 0.50, 3: 0.90}  # seeds differ a lot
    ours = {3: 0.88, 1: 0.09, 2: 0.47}
    found = paired_difference(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(-0.02)
    assert found.half == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert not found.excludes_zero
    shifted = paired_difference({seed: value - 0.01 for seed, value in theirs.items()}, theirs)
    assert shifted is not None
    assert shifted.half == pytest.approx(0, abs=1e-12)
    assert shifted.excludes_zero


def test_a_difference_is_over_the_seeds_that_both_have() -> None:
    found = paired_difference({1: 0.3, 2: 0.4}, {2: 0.1, 3: 0.9})
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(0.3), 1)
    assert paired_difference({1: 0.3}, {2: 0.1}) is None

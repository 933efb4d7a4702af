from __future__ import annotations

import pytest

from mmrlhf_jax.report.charts import spread
from mmrlhf_jax.report.scales import Scale, duration, extent, figure, log_ticks, round_step, tick_label, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 60, [0, 20, 40, 60]),
        (1, 500, [200, 400]),
        (-0.5, 0.5, [-0.5, 0, 0.5]),
        (0.1, 0.15, [0.1, 0.12, 0.14]),
        (7, 7, [7]),
    ],
)
def test_ticks_are_round_and_within(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("wanted", "step"), [(0.25, 0.5), (0.2, 0.2), (3, 5), (7, 10), (0.0011, 0.002), (1, 1)])
def test_a_step_is_one_two_or_five(wanted, step):
    assert round_step(wanted) == pytest.approx(step)


def test_a_logarithmic_axis_has_powers_of_ten_or_what_lies_between_few_of_them():
    assert log_ticks(1e-3, 1e3) == pytest.approx([1e-3, 1e-1, 1e1, 1e3])
    assert log_ticks(0.9, 12) == pytest.approx([1, 2, 5, 10])
    assert log_ticks(2.1, 4.2) == pytest.approx([3, 4])


@pytest.mark.parametrize(
    ("value", "step", "said"),
    [
        (0, 1, "0"),
        (0.05, 0.05, "0.05"),
        (0.1, 0.05, "0.10"),
        (2500, 500, "2.5k"),
        (15000, 5000, "15k"),
        (2e6, 1e6, "2M"),
        (-20, 10, "−20"),
        (5e-7, 1e-7, "5e−7"),
        (12, 2, "12"),
    ],
)
def test_ticks_say_what_people_write(value, step, said):
    assert tick_label(value, step) == said


def test_shares_are_percentages():
    assert tick_label(0.5, 0.5, percent=True) == "50%"
    assert figure(0.9345, percent=True) == "93.5%"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "–"),
        (float("inf"), "∞"),
        (-float("inf"), "−∞"),
        (0, "0"),
        (3, "3"),
        (0.55849, "0.5585"),
        (-15.05, "−15.05"),
        (12911.4, "12,911"),
        (1.64e-7, "1.64e−7"),
    ],
)
def test_figures_have_four_digits(value, said):
    assert figure(value) == said


def test_durations():
    assert [duration(s) for s in (3.21, 250, 7500)] == ["3.2 s", "4 min 10 s", "2 h 05 min"]


def test_scales_map_their_ends_and_middles():
    assert [Scale(0, 10, 100, 0)(x) for x in (0, 5, 10)] == [100, 50, 0]
    assert Scale(1, 100, 0, 2, log=True)(10) == pytest.approx(1)
    assert Scale(3, 3, 0, 8)(3) == 4


def test_extents_end_at_round_values_and_are_never_empty():
    assert extent(0.12, 0.97) == pytest.approx((0, 1))
    low, high = extent(5, 5)
    assert low < 5 < high
    low, high = extent(0, 0)
    assert low < 0 < high


def test_labels_are_moved_apart_as_little_as_it_takes():
    assert spread([10, 50], 12, 0, 100) == [10, 50]
    assert spread([10, 11, 12], 12, 0, 100) == [10, 22, 34]
    assert spread([95, 96], 12, 0, 100) == [88, 100]
    assert spread([50, 20, 21], 10, 0, 100) == [50, 20, 30]

"""A logged number over steps, thinned to what a chart can show without hiding what happened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.report.runs import Series
from mmrlhf_jax.report.scales import HUGE, drawable

POINTS = 150  # of a curve; more could not be told apart in a chart this wide


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of a curve, in order. `step` f64 [n]; `value` f64 [n], NaN where the curve has a gap; `low` and `high` are
    the least and greatest value behind each point. `per_point` steps stand behind one; `lost` is how many logged values
    no axis can hold (NaN, infinite, beyond 1e100), the first of them at step `first_lost`."""

    step: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_point: int
    lost: int
    first_lost: int | None

    @property
    def finite(self) -> np.ndarray:
        """bool [n]: where there is a point to draw."""
        return np.isfinite(self.value)


def curve(series: Series, points: int = POINTS) -> Curve | None:
    """`series` as at most `points` points; None where it has no value to draw.

    More steps than that are cut into bins of equal width: the mean of a bin's finite values, its least and greatest
    beside. A bin without one is a gap.
    """
    step, value = series.step, series.value
    finite = drawable(value)
    value = np.where(np.abs(value) < 1 / HUGE, 0, value)
    if not finite.any():
        return None
    lost = int((~finite).sum())
    first_lost = int(step[~finite][0]) if lost else None
    if len(step) <= points:
        shown = np.where(finite, value, np.nan)
        return Curve(step.astype(float), shown, shown, shown, 1, lost, first_lost)
    width = -(-int(step[-1] - step[0] + 1) // points)
    place = (step - step[0]) // width
    count = int(place[-1]) + 1
    inside = place[finite]
    number = np.bincount(inside, minlength=count)
    there = number > 0
    mean = np.full(count, np.nan)
    mean[there] = np.bincount(inside, value[finite], count)[there] / number[there]
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, inside, value[finite])
    np.maximum.at(high, inside, value[finite])
    low[~there] = high[~there] = np.nan
    middle = np.minimum(step[0] + width * np.arange(count) + (width - 1) / 2, step[-1])
    return Curve(middle, mean, low, high, width, lost, first_lost)


def segments(shown: Curve) -> list[np.ndarray]:
    """The indices of the points between gaps, run by run."""
    there = np.flatnonzero(shown.finite)
    return [part for part in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1) if len(part)]

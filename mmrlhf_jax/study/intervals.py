"""What a few seeds say of a mean, and of a difference between two ways to train: intervals from Student's t.

A seed makes its own world, model and order of the data, so two arms that share it share its luck: their difference,
seed by seed, varies less than either, and its interval is the one to read.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """`mean` +- `half`, from `n` values; a single one says nothing of how it varies, and `half` is None."""

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and t s / sqrt(n): s the deviation of a sample, t the (1 + level) / 2 quantile of Student's t at n - 1
    degrees of freedom. Raises ValueError where there is no value."""
    if not values:
        raise ValueError("there is no mean of no values")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Interval(mean, None, 1)
    quantile = float(stdtrit(n - 1, (1 + level) / 2))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(n), n)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float], level: float = LEVEL) -> Interval | None:
    """Of `ours` less `theirs`, seed by seed, over the seeds that both have; None where they share none."""
    differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    return interval(differences, level) if differences else None

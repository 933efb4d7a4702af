"""Numbers on axes and in tables: where ticks stand, what they say, and from values to places on the page."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MINUS = "\u2212"
MISSING = "–"
HUGE = 1e100  # what no axis is drawn for; its inverse counts as 0


@dataclass(frozen=True, slots=True)
class Scale:
    """Values [low, high] onto places [start, stop]; `log`: by their logarithm, both positive."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + share * (self.stop - self.start)


def drawable(values: np.ndarray) -> np.ndarray:
    """bool, shape of `values`: which of them an axis can hold."""
    return np.isfinite(values) & (np.abs(values) < HUGE)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values in [low, high], about `count` of them, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    step = round_step((high - low) / max(1, count))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def round_step(wanted: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `wanted`."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * (1 - 1e-9))


def log_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` values in [low, high]: powers of ten; where those are few 1, 2 and 5 times them, or round steps."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**power for power in range(first, last + 1)]
    for made in (powers, [power * factor for power in powers for factor in (1, 2, 5)]):
        inside = [tick for tick in made if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) > 2:
            return inside[:: -(-len(inside) // (count + 1))]
    return [tick for tick in ticks(low, high, count) if tick > 0]


def extent(low: float, high: float) -> tuple[float, float]:
    """[low, high] out to round values, and to something where both are equal, or as good as equal."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = max(abs(low), abs(high)) * 0.1 or 1.0
        low, high = low - room, high + room
    step = round_step((high - low) / 4)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def tick_label(value: float, step: float, *, percent: bool = False) -> str:
    """A tick as people write it: 0.05, 2.5k, 5e-7; all of an axis with as many decimals as its `step` needs."""
    if percent:
        return f"{tick_label(100 * value, 100 * step)}%"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e9:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}".replace("-", MINUS)
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size and step >= size / 1000:
            return tick_label(value / size, step / size) + suffix
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}".replace("-", MINUS)


def figure(value: float, *, percent: bool = False) -> str:
    """A value as a table shows it, with four significant digits; a dash for one that is missing."""
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if percent:
        return f"{100 * value:.1f}%".replace("-", MINUS)
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -4 <= size < 9:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits}e{int(power)}".replace("-", MINUS)
    text = f"{value:,.{max(0, 3 - size)}f}"
    if value == int(value):
        text = f"{int(value):,}"
    return text.replace("-", MINUS)


def duration(seconds: float) -> str:
    """Seconds as people say them: 3.2 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"

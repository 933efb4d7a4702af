"""From a pair's margin to its beta: each run's rule over the margins its data has.

The rules are those of objectives/preference.py, written once more in numpy because that one starts a jax backend; a
test holds them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.objectives import DPO, MMDPO, MMDPOReleasedBatch, MMDPOReleasedFactor, Objective
from mmrlhf_jax.objectives.preference import RELEASED_BETA_FLOOR
from mmrlhf_jax.report.charts import details
from mmrlhf_jax.report.markup import Markup, element, fragment
from mmrlhf_jax.report.metrics import key_of
from mmrlhf_jax.report.scales import HUGE, Scale, extent, figure, round_step, tick_label, ticks

BARS = 30
POINTS = 121


@dataclass(frozen=True, eq=False)
class Rule:
    """One run's objective over its data; `hue` is the run's number."""

    hue: int
    objective: Objective


def beta_of(objective: Objective, margin: np.ndarray) -> np.ndarray | None:
    """The beta of pairs with these margins, shape of `margin`; None where a pair's margin does not decide it."""
    match objective:
        case MMDPO(beta=beta, w=w, k=k):
            return beta * (1 - w * np.expm1(-k * np.maximum(margin, 0)))
        case MMDPOReleasedFactor(beta=beta, w=w):
            return np.maximum(beta * (1 + w * margin), RELEASED_BETA_FLOOR)
        case DPO(beta=beta):
            return np.full(np.shape(margin), beta)
    return None


def rule_in_words(objective: Objective) -> str | None:
    """The rule as a formula with its numbers; None for objectives without a beta."""
    match objective:
        case MMDPO(beta=beta, w=w, k=k):
            return (
                f"β = {beta:g} (1 + {w:g} (1 − exp(−{k:g} d))), held in [{beta:g}, {(1 + w) * beta:.4g}]; "
                "d is the pair's margin, a negative one counts as 0"
            )
        case MMDPOReleasedFactor(beta=beta, w=w):
            return f"β = max({beta:g} (1 + {w:g} f), {RELEASED_BETA_FLOOR:g}); f is the pair's stored factor"
        case DPO(beta=beta):
            return f"β = {beta:g} for every pair"
        case MMDPOReleasedBatch(beta=beta, w=w, selected=selected):
            return (
                f"one β a batch, max({beta:g} (1 + {w:g} (mean log-ratio of {figure(selected, percent=True)} of the "
                f"pairs, drawn, less that of all)), {RELEASED_BETA_FLOOR:g}): no pair's margin decides it"
            )
    return None


@dataclass(frozen=True, eq=False)
class Histogram:
    """`count` [n] of the values in [edge[i], edge[i + 1])."""

    edge: np.ndarray
    count: np.ndarray


def histogram(values: np.ndarray, bars: int = BARS) -> Histogram:
    """At most about `bars` bars of a round width; whole numbers, where there are few, each have their own. `values` f64
    [n], n > 0, all of them drawable."""
    values = np.where(np.abs(values) < 1 / HUGE, 0, values)
    low, high = float(values.min()), float(values.max())
    if (values == np.round(values)).all() and high - low < bars and max(-low, high) < 1e9:
        edge = np.arange(low - 0.5, high + 1)
    else:
        width = round_step(max((high - low) / bars, 1e-9 * max(abs(low), abs(high)), 1e-9))
        edge = width * np.arange(np.floor(low / width), np.floor(high / width) + 2)
    place = np.clip(np.searchsorted(edge, values, side="right") - 1, 0, len(edge) - 2)
    return Histogram(edge, np.bincount(place, minlength=len(edge) - 1))


WIDTH, LEFT, RIGHT, TOP = 400, 52, 30, 26
CURVES, COUNTS = 170, 84  # heights of the two panels
GAP = 14


def beta_chart(rules: Sequence[Rule], margins: np.ndarray, title: str) -> Markup:
    """The rules above, the distribution of `margins` f64 [pairs] below, one axis of margins for both. Every rule must
    be decided by the margin."""
    bars = histogram(margins)
    x = Scale(min(0.0, float(bars.edge[0])), max(1e-9, float(bars.edge[-1])), LEFT, WIDTH - RIGHT)
    at = np.linspace(x.low, x.high, POINTS)
    curves = [beta_of(rule.objective, at) for rule in rules]
    values = np.concatenate([curve for curve in curves if curve is not None])
    low, high = extent(float(values.min()), float(values.max()))
    y = Scale(low, high, TOP + CURVES, TOP)
    words = [f"{_key(rule, rules)}{rule_in_words(rule.objective)}." for rule in rules]
    return element(
        "figure",
        element("figcaption", element("b", title)),
        element(
            "svg",
            _beta_axis(x, y),
            [
                element("path", d=_path(at, curve, x, y), class_=f"line r{rule.hue}")
                for rule, curve in zip(rules, curves, strict=True)
                if curve is not None
            ],
            _tags(rules, curves, y, x),
            _bars(bars, x),
            viewBox=f"0 0 {WIDTH} {TOP + CURVES + GAP + COUNTS + 40}",
            role="img",
            aria_label=f"{title}. {' '.join(words)} {_spread_in_words(margins)}",
        ),
        element("p", _spread_in_words(margins), " ", _means(rules, margins), class_="remark"),
        details("β by margin as a table", _table(rules, bars)),
        class_="chart",
    )


def _key(rule: Rule, rules: Sequence[Rule]) -> str:
    return f"{key_of(rule.hue)}: " if len(rules) > 1 else ""


def _spread_in_words(margins: np.ndarray) -> str:
    low, first, middle, third, high = np.percentile(margins, [0, 25, 50, 75, 100])
    said = (
        f"{len(margins):,} pairs with margins from {figure(low)} to {figure(high)}, half of them between "
        f"{figure(first)} and {figure(third)}, median {figure(middle)}."
    )
    negative = int((margins < 0).sum())
    return said + (f" {negative:,} are negative." if negative else "")


def _means(rules: Sequence[Rule], margins: np.ndarray) -> str:
    means = [(rule, beta_of(rule.objective, margins)) for rule in rules]
    said = (f"{_key(rule, rules)}{figure(float(beta.mean()))}" for rule, beta in means if beta is not None)
    return f"Mean β over them: {', '.join(said)}."


def _beta_axis(x: Scale, y: Scale) -> Markup:
    values = ticks(y.low, y.high, 5)
    step = values[1] - values[0]
    rows = [
        (
            element("line", x1=LEFT, x2=x.stop, y1=_at(y(value)), y2=_at(y(value)), class_="grid"),
            element("text", tick_label(value, step), x=LEFT - 6, y=_at(y(value) + 3.5), text_anchor="end"),
        )
        for value in values
    ]
    return element("g", rows, element("text", "β", x=0, y=12, class_="quiet"), class_="axes")


def _tags(rules: Sequence[Rule], curves: Sequence[np.ndarray | None], y: Scale, x: Scale) -> list[Markup]:
    if len(rules) < 2:
        return []
    ends: dict[int, list[Rule]] = {}
    for rule, curve in zip(rules, curves, strict=True):
        if curve is not None:  # equal rules share a place, and their letters
            ends.setdefault(round(y(float(curve[-1])) / 12), []).append(rule)
    return [
        element(
            "text",
            [element("tspan", key_of(rule.hue), class_=f"r{rule.hue} own") for rule in here],
            x=_at(x.stop + 5),
            y=_at(12 * place + 3.5),
            class_="tag",
        )
        for place, here in ends.items()
    ]


def _bars(bars: Histogram, x: Scale) -> Markup:
    top, bottom = TOP + CURVES + GAP, TOP + CURVES + GAP + COUNTS
    y = Scale(0, float(bars.count.max()), bottom, top + 12)
    drawn = [
        element(
            "rect",
            element("title", f"{count:,} pairs with margins from {figure(float(a))} to {figure(float(b))}"),
            x=_at(x(a) + 0.5),
            width=_at(max(x(b) - x(a) - 1, 0.5)),
            y=_at(y(count)),
            height=_at(bottom - y(count)),
        )
        for a, b, count in zip(bars.edge[:-1], bars.edge[1:], bars.count.tolist(), strict=True)
        if count
    ]
    most = int(bars.count.max())
    marks = ticks(x.low, x.high, 6)
    scale = (
        element("line", x1=LEFT, x2=x.stop, y1=_at(y(most)), y2=_at(y(most)), class_="grid"),
        element("text", f"{most:,}", x=LEFT - 6, y=_at(y(most) + 3.5), text_anchor="end"),
        element("text", "pairs", x=LEFT + 4, y=_at(y(most) - 4), class_="quiet"),
        element("line", x1=LEFT, x2=x.stop, y1=bottom, y2=bottom, class_="axis"),
        [
            element("text", tick_label(tick, marks[1] - marks[0]), x=_at(x(tick)), y=bottom + 15, text_anchor="middle")
            for tick in marks
        ],
        element("text", "margin", x=x.stop, y=bottom + 30, text_anchor="end", class_="quiet"),
    )
    return element("g", drawn, scale, class_="axes bars")


def _table(rules: Sequence[Rule], bars: Histogram) -> Markup:
    middle = (bars.edge[:-1] + bars.edge[1:]) / 2
    curves = [beta_of(rule.objective, middle) for rule in rules]
    heads = ["margins", "pairs", *(f"{_key(rule, rules)}β at the middle" for rule in rules)]
    rows = [
        element(
            "tr",
            element("th", f"{figure(float(bars.edge[i]))} to {figure(float(bars.edge[i + 1]))}", scope="row"),
            element("td", f"{int(count):,}"),
            [element("td", figure(float(curve[i]))) for curve in curves if curve is not None],
        )
        for i, count in enumerate(bars.count)
    ]
    head = element("tr", [element("th", text, scope="col") for text in heads])
    return fragment(element("table", element("thead", head), element("tbody", rows)))


def _path(at: np.ndarray, curve: np.ndarray, x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{_at(x(a))},{_at(y(b))}" for a, b in zip(at.tolist(), curve.tolist(), strict=True))


def _at(place: float) -> str:
    return f"{place:.1f}".removesuffix(".0")

"""Is a reward model as sure as it is right? Its Bradley-Terry probability against how often annotators agree.

Of a pair with scores s and t the model says that the higher one is preferred with probability sigmoid(|s - t|), from
1/2 to 1; it is right where the annotators rank that response higher. Equal scores say 1/2 and are half right. Responses
that annotators tied are in no pair. Expected calibration error: https://arxiv.org/abs/1706.04599, equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.data import ranking
from mmrlhf_jax.groups import Group
from mmrlhf_jax.report.charts import details
from mmrlhf_jax.report.datasets import Judged
from mmrlhf_jax.report.markup import Markup, element, fragment
from mmrlhf_jax.report.scales import Scale, figure, round_step, tick_label, ticks

BINS = 10
CONFIDENCE = 1.959963984540054  # normal quantile of a 95 % interval


@dataclass(frozen=True)
class Bin:
    """Pairs whose probability lies in [low, high): how many, what was predicted and what came, each on average, and
    where the share that came lies with 95 % confidence (Wilson's interval, pairs taken as independent)."""

    low: float
    high: float
    count: int
    predicted: float
    agreed: float
    least: float
    most: float


@dataclass(frozen=True)
class Calibration:
    """`bins` that hold pairs, in order; over all pairs: how often the model agrees with the annotators (equal scores
    count half), how sure it was, the expected calibration error and the Brier score."""

    bins: tuple[Bin, ...]
    pairs: int
    equal: int
    accuracy: float
    predicted: float
    error: float
    brier: float


def calibrate(differences: np.ndarray, bins: int = BINS) -> Calibration:
    """`differences` f64 [n], n > 0 and all finite: score of the preferred response less that of the other."""
    probability = 1 / (1 + np.exp(-np.abs(differences)))
    right = np.where(differences == 0, 0.5, differences > 0)
    place = np.minimum(((probability - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for index in range(bins):
        inside = place == index
        if count := int(inside.sum()):
            agreed = float(right[inside].mean())
            low, high = 0.5 + index / (2 * bins), 0.5 + (index + 1) / (2 * bins)
            found.append(Bin(low, high, count, float(probability[inside].mean()), agreed, *wilson(agreed, count)))
    pairs = len(differences)
    return Calibration(
        bins=tuple(found),
        pairs=pairs,
        equal=int((differences == 0).sum()),
        accuracy=float(right.mean()),
        predicted=float(probability.mean()),
        error=sum(each.count * abs(each.agreed - each.predicted) for each in found) / pairs,
        brier=float(np.where(differences == 0, 0.25, (probability - right) ** 2).mean()),  # whichever way it came out
    )


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval that holds the true share with 95 % confidence, of `count` trials (Wilson 1927)."""
    z = CONFIDENCE
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def differences_of(scored: Judged, groups: Sequence[Group]) -> tuple[np.ndarray, int]:
    """Score differences f64 [pairs] of the annotated pairs that are scored, and how many pairs of responses to the same
    prompt the annotators ranked equal."""
    found, tied = [], 0
    for row, reward in sorted(scored.rewards.items()):
        score, group = reward.score, groups[row]
        found += [score[pair.chosen] - score[pair.rejected] for pair in group.pairs]
        tied += len(ranking.tied(group))
    return np.array(found, float), tied


SIDE, LEFT, TOP, COUNTS = 360, 46, 26, 54  # of the drawing: width, margins, height of the counts below
PLOT = 210


def calibration_chart(found: Calibration, title: str, subtitle: str, note: str, hue: int) -> Markup:
    """The diagram, the counts below it, and the numbers as a table."""
    return element(
        "figure",
        element("figcaption", element("b", title)),
        element("p", subtitle, class_="remark"),
        _drawing(found, title, hue),
        element("p", _summary(found), " ", note, class_="remark"),
        details("Calibration as a table", _table(found)),
        class_="chart",
    )


def _summary(found: Calibration) -> str:
    equal = f", {found.equal:,} of them with equal scores" if found.equal else ""
    return (
        f"ECE {figure(found.error, percent=True)}. {found.pairs:,} pairs{equal}: right in "
        f"{figure(found.accuracy, percent=True)}, by its own account in {figure(found.predicted, percent=True)}. "
        f"Brier score {figure(found.brier)}."
    )


def _drawing(found: Calibration, title: str, hue: int) -> Markup:
    low = max(0.0, math.floor(10 * min(0.5, *(each.least for each in found.bins)) + 1e-9) / 10)
    x = Scale(0.5, 1.0, LEFT, SIDE - 12)
    y = Scale(low, 1.0, TOP + PLOT, TOP)
    return element(
        "svg",
        _grid(x, y, low),
        element("line", x1=_at(x(0.5)), y1=_at(y(0.5)), x2=_at(x(1)), y2=_at(y(1)), class_="ideal"),
        element("g", [_point(each, x, y) for each in found.bins], class_=f"r{hue}"),
        _counts(found, x),
        viewBox=f"0 0 {SIDE} {TOP + PLOT + 36 + COUNTS + 6}",
        role="img",
        aria_label=f"{title}. {_summary(found)} " + " ".join(map(_described, found.bins)),
    )


def _described(each: Bin) -> str:
    return (
        f"Of {each.count} pairs at {figure(each.predicted, percent=True)} annotators agree in "
        f"{figure(each.agreed, percent=True)}."
    )


def _grid(x: Scale, y: Scale, low: float) -> Markup:
    rows = [
        (
            element("line", x1=LEFT, x2=x.stop, y1=_at(y(tick)), y2=_at(y(tick)), class_="grid"),
            element("text", f"{100 * tick:.0f}%", x=LEFT - 6, y=_at(y(tick) + 3.5), text_anchor="end"),
        )
        for tick in ticks(low, 1.0, 6)
    ]
    columns = [
        element("text", f"{100 * tick:.0f}%", x=_at(x(tick)), y=TOP + PLOT + 15, text_anchor="middle")
        for tick in ticks(0.5, 1.0, 5)
    ]
    names = (
        element("text", "annotators agree", x=0, y=12, class_="quiet"),
        element("text", "predicted", x=x.stop, y=TOP + PLOT + 30, text_anchor="end", class_="quiet"),
    )
    return element("g", rows, columns, names, class_="axes")


def _point(each: Bin, x: Scale, y: Scale) -> Markup:
    at = _at(x(each.predicted))
    said = f"{_described(each)} 95% interval {figure(each.least, percent=True)} to {figure(each.most, percent=True)}."
    return element(
        "g",
        element("title", said),
        element("line", x1=at, x2=at, y1=_at(y(each.least)), y2=_at(y(each.most)), class_="whisker"),
        element("circle", cx=at, cy=_at(y(each.agreed)), r=4),
    )


def _counts(found: Calibration, x: Scale) -> Markup:
    """How many pairs stand behind each point."""
    top = TOP + PLOT + 38
    most = max(each.count for each in found.bins)
    height = Scale(0, most, 0, COUNTS - 14)
    bars = [
        fragment(
            element(
                "rect",
                x=_at(x(each.low) + 1),
                y=_at(top + COUNTS - height(each.count)),
                width=_at(x(each.high) - x(each.low) - 2),
                height=_at(height(each.count)),
            ),
            element(
                "text",
                tick_label(each.count, round_step(max(1, each.count / 100))),
                x=_at(x((each.low + each.high) / 2)),
                y=_at(top + COUNTS - height(each.count) - 4),
                text_anchor="middle",
            ),
        )
        for each in found.bins
    ]
    base = element("line", x1=LEFT, x2=x.stop, y1=top + COUNTS, y2=top + COUNTS, class_="axis")
    said = element("text", "pairs", x=LEFT - 6, y=top + COUNTS, text_anchor="end")
    return element("g", bars, base, said, class_="axes bars")


def _table(found: Calibration) -> Markup:
    heads = ("predicted between", "mean", "annotators agree", "95% interval", "pairs")
    rows = [
        element(
            "tr",
            element("th", f"{100 * each.low:.0f}% and {100 * each.high:.0f}%", scope="row"),
            [
                element("td", text)
                for text in (
                    figure(each.predicted, percent=True),
                    figure(each.agreed, percent=True),
                    f"{figure(each.least, percent=True)} to {figure(each.most, percent=True)}",
                    f"{each.count:,}",
                )
            ],
        )
        for each in found.bins
    ]
    head = element("tr", [element("th", text, scope="col") for text in heads])
    return element("table", element("thead", head), element("tbody", rows))


def _at(place: float) -> str:
    return f"{place:.1f}".removesuffix(".0")

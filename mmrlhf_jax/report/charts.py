"""Curves over steps as SVG: one small chart, its readout under the pointer, and the same numbers as a table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.report.curves import Curve, segments
from mmrlhf_jax.report.markup import Markup, element, fragment
from mmrlhf_jax.report.scales import Scale, extent, figure, log_ticks, tick_label, ticks

WIDTH, HEIGHT = 360, 208
LEFT, TOP, BOTTOM = 46, 10, 26  # around the plot; to the right as wide as the labels need
ZONES = 60  # places under the pointer that have a readout
READOUT_ROWS = 9
FAR_APART = 10.0  # greatest by least value, from which a chart that may is logarithmic


@dataclass(frozen=True, eq=False)
class Line:
    """A curve with its name in full, the short one at its end, and how it is drawn. `hue` is the number of its run;
    `dots`: measured now and then, on held-out groups."""

    label: str
    tag: str
    hue: int
    curve: Curve
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, eq=False)
class Chart:
    """`mark` is a value to compare with, and what it is; `within` is what the axis must show at least; `log` asks for a
    logarithmic axis where values are positive and far apart."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    percent: bool = False
    log: bool = False
    mark: tuple[float, str] | None = None
    within: tuple[float, ...] = ()


def line_chart(chart: Chart) -> Markup:
    """The chart as a figure: caption, drawing with a text alternative, remarks, and a table of every point drawn."""
    remarks = [chart.note, "Logarithmic axis." if logarithmic(chart) else "", *_remarks(chart.lines)]
    return element(
        "figure",
        element("figcaption", element("b", chart.title), _latest(chart)),
        _drawing(chart),
        element("p", " ".join(filter(None, remarks)), class_="remark") if any(remarks) else None,
        _table(chart),
        class_="chart",
    )


def _drawing(chart: Chart) -> Markup:
    right = WIDTH - 10 - max(_text_width(line.tag) for line in chart.lines)
    x, y = _scales(chart, right)
    return element(
        "svg",
        _axes(chart, x, y),
        _mark(chart, x, y),
        [_line(line, x, y) for line in chart.lines],
        _tags(chart.lines, x, y),
        _readouts(chart, x, y),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=describe(chart),
    )


def describe(chart: Chart) -> str:
    """The chart in words: where each line begins and ends, and how far it went."""
    return f"{chart.title} by step. " + " ".join(_described(line, chart.percent) for line in chart.lines)


def _described(line: Line, percent: bool) -> str:
    there = np.flatnonzero(line.curve.finite)
    first, last = there[0], there[-1]
    step, value = line.curve.step, line.curve.value

    def say(number: float) -> str:
        return figure(float(number), percent=percent)

    name = f"{line.label}: " if line.label else ""
    if first == last:
        return f"{name}{say(value[first])} at step {step[first]:g}."
    return (
        f"{name}from {say(value[first])} at step {step[first]:g} to {say(value[last])} at step {step[last]:g}, "
        f"between {say(np.nanmin(line.curve.low))} and {say(np.nanmax(line.curve.high))}."
    )


def _scales(chart: Chart, right: float) -> tuple[Scale, Scale]:
    steps = np.concatenate([line.curve.step for line in chart.lines])
    values = np.concatenate([part for line in chart.lines for part in (line.curve.low, line.curve.high)])
    values = np.concatenate([values[np.isfinite(values)], chart.within, [chart.mark[0]] if chart.mark else []])
    first, last = float(steps.min()), float(steps.max())
    x = Scale(first, last if last > first else first + 1, LEFT, right)
    if logarithmic(chart):
        values = values[values > 0]
    low, high = float(values.min()), float(values.max())
    if logarithmic(chart):
        low, high = (low / 1.1, high * 1.1) if high > low else (low / 3, high * 3)
        return x, Scale(low, high, HEIGHT - BOTTOM, TOP, log=True)
    return x, Scale(*extent(low, high), HEIGHT - BOTTOM, TOP)


def logarithmic(chart: Chart) -> bool:
    """Whether a chart that may have a logarithmic axis gets one."""
    low = min(float(np.nanmin(line.curve.low)) for line in chart.lines)
    high = max(float(np.nanmax(line.curve.high)) for line in chart.lines)
    return chart.log and low > 0 and high / low > FAR_APART


def _axes(chart: Chart, x: Scale, y: Scale) -> Markup:
    values = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high)
    even = values[1] - values[0] if len(values) > 1 and not y.log else 0.0
    rows = [
        (
            element("line", x1=LEFT, x2=x.stop, y1=_at(y(value)), y2=_at(y(value)), class_="grid"),
            element(
                "text",
                tick_label(value, even or abs(value) or 1, percent=chart.percent),
                x=LEFT - 6,
                y=_at(y(value) + 3.5),
                text_anchor="end",
            ),
        )
        for value in values
    ]
    marks = [tick for tick in ticks(x.low, x.high, 4) if tick == int(tick) and x(tick) > LEFT + 34]
    columns = [
        element(
            "text",
            tick_label(tick, marks[1] - marks[0] if len(marks) > 1 else 1),
            x=_at(x(tick)),
            y=HEIGHT - 8,
            text_anchor="middle",
        )
        for tick in marks
    ]
    base = element("line", x1=LEFT, x2=x.stop, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis")
    said = element("text", "step", x=LEFT, y=HEIGHT - 8, class_="quiet")
    return element("g", rows, base, columns, said, class_="axes")


def _mark(chart: Chart, x: Scale, y: Scale) -> Markup | None:
    if chart.mark is None:
        return None
    value, said = chart.mark
    return element(
        "g",
        element("line", x1=LEFT, x2=x.stop, y1=_at(y(value)), y2=_at(y(value))),
        element("text", said, x=_at(x.stop - 2), y=_at(y(value) + 12), text_anchor="end"),
        class_="mark",
    )


def _line(line: Line, x: Scale, y: Scale) -> Markup:
    parts, curve = segments(line.curve), line.curve
    path = "".join(_path([(x(curve.step[i]), y(curve.value[i])) for i in part]) for part in parts)
    band = ""
    if curve.per_point > 1:
        for part in parts:
            upper = [(x(curve.step[i]), y(curve.high[i])) for i in part]
            band += _path([*upper, *((x(curve.step[i]), y(curve.low[i])) for i in reversed(part))]) + "Z"
    alone = [part[0] for part in parts if len(part) == 1]  # a line of one point is not seen
    dots = np.flatnonzero(curve.finite) if line.dots else alone
    return element(
        "g",
        element("path", d=band, class_="band") if band else None,
        element("path", d=path, class_="dotted" if line.dots else "dashed" if line.dashed else "line"),
        [element("circle", cx=_at(x(curve.step[i])), cy=_at(y(curve.value[i])), r=2.6, class_="dot") for i in dots],
        class_=f"r{line.hue}",
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_at(a)},{_at(b)}" for a, b in points)


def _tags(lines: Sequence[Line], x: Scale, y: Scale) -> list[Markup]:
    """The short names at the ends of the lines, moved apart where they would lie on each other."""
    named = [(line, y(line.curve.value[line.curve.finite][-1])) for line in lines if line.tag]
    places = spread([place for _, place in named], 11.5, TOP + 2, HEIGHT - BOTTOM)
    return [
        element("text", line.tag, x=_at(x.stop + 5), y=_at(place + 3.5), class_=f"tag r{line.hue}")
        for (line, _), place in zip(named, places, strict=True)
    ]


def spread(places: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """`places` moved as little as it takes to lie `apart` from each other within [low, high], in the same order."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, here in itertools.pairwise(order):
        moved[here] = max(moved[here], moved[before] + apart)
    ceiling = high
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - apart
    floor = low
    for index in order:  # more than there is room for: they leave at the bottom
        moved[index] = max(moved[index], floor)
        floor = moved[index] + apart
    return moved


def _readouts(chart: Chart, x: Scale, y: Scale) -> Markup:
    """Under the pointer a rule and the value of each line there; by style sheet alone."""
    steps = np.unique(np.concatenate([line.curve.step[line.curve.finite] for line in chart.lines]))
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, min(ZONES, len(steps))).round().astype(int))]
    places = [x(step) for step in steps]
    edges = [x.start, *((a + b) / 2 for a, b in itertools.pairwise(places)), x.stop]
    zones = [
        element(
            "g",
            element("rect", x=_at(left), y=TOP, width=_at(max(right - left, 0.1)), height=HEIGHT - TOP - BOTTOM),
            element(
                "g",
                element("line", x1=_at(place), x2=_at(place), y1=TOP, y2=HEIGHT - BOTTOM),
                _readout(chart, float(step), place, x, y),
                class_="say",
            ),
            class_="zone",
        )
        for step, place, (left, right) in zip(steps, places, itertools.pairwise(edges), strict=True)
    ]
    return element("g", zones, class_="zones", aria_hidden="true")


def _readout(chart: Chart, step: float, place: float, x: Scale, y: Scale) -> Markup:
    rows: list[tuple[str, int | None]] = [(f"step {step:g}", None)]
    dots = []
    for line in chart.lines:
        near = np.abs(line.curve.step - step)
        index = int(near.argmin())
        if near[index] <= max(line.curve.per_point, 1) / 2 and line.curve.finite[index]:
            value = float(line.curve.value[index])
            rows.append((f"{line.label} {figure(value, percent=chart.percent)}".strip(), line.hue))
            dots.append(element("circle", cx=_at(place), cy=_at(y(value)), r=2.6, class_=f"dot r{line.hue}"))
    rows = rows[:READOUT_ROWS]
    wide = max(_text_width(text) for text, _ in rows) + 12
    left = place + 8 if place + 8 + wide < x.stop else place - 8 - wide
    return fragment(
        dots,
        element("rect", x=_at(left), y=TOP, width=_at(wide), height=13 * len(rows) + 6, rx=3, class_="plate"),
        [
            element("text", text, x=_at(left + 6), y=TOP + 13 * row, class_=None if hue is None else f"r{hue} own")
            for row, (text, hue) in enumerate(rows, 1)
        ],
    )


def _latest(chart: Chart) -> Markup:
    """The last value of each line, beside the title."""
    return element(
        "span",
        [
            element(
                "span",
                figure(float(line.curve.value[line.curve.finite][-1]), percent=chart.percent),
                class_=f"r{line.hue} own",
                title=f"{line.label} at the end".strip(),
            )
            for line in chart.lines
            if not line.dots
        ],
        class_="latest",
    )


def _remarks(lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        if line.curve.lost:
            name = f"{line.label}: " if line.label else ""
            many = "1 value is" if line.curve.lost == 1 else f"{line.curve.lost} values are"
            yield f"{name}{many} NaN, infinite or beyond 1e100, the first at step {line.curve.first_lost}."


def _table(chart: Chart) -> Markup:
    steps = np.unique(np.concatenate([line.curve.step for line in chart.lines]))
    columns = [dict(zip(line.curve.step.tolist(), line.curve.value.tolist(), strict=True)) for line in chart.lines]
    binned = any(line.curve.per_point > 1 for line in chart.lines)
    heads = ("middle of steps" if binned else "step", *(line.label or chart.title for line in chart.lines))
    head = element("tr", [element("th", name, scope="col") for name in heads])
    rows = [
        element(
            "tr",
            element("th", f"{step:g}", scope="row"),
            [
                element("td", figure(column[step], percent=chart.percent) if step in column else "")
                for column in columns
            ],
        )
        for step in steps.tolist()
    ]
    return details(f"{chart.title} as a table", element("table", element("thead", head), element("tbody", rows)))


def details(summary: str, content: Markup) -> Markup:
    """Content that opens on demand, in a box that scrolls by itself, by keyboard too."""
    box = element("div", content, class_="scroll", tabindex=0, role="region", aria_label=summary)
    return element("details", element("summary", summary), box, class_="data")


def _text_width(text: str) -> float:
    return 6.2 * len(text)


def _at(place: float) -> str:
    return f"{place:.1f}".removesuffix(".0") if math.isfinite(place) else "0"

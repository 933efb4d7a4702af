"""A summary as Markdown that is also fit for a terminal: columns are padded, one line a policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmrlhf_jax.study.intervals import Interval
from mmrlhf_jax.study.summary import Intervals

MISSING = "-"


@dataclass(frozen=True)
class Column:
    """A figure under its heading. Shares are shown in per cent, their differences in points; others as they are."""

    figure: str
    heading: str
    share: bool = True
    digits: int = 1


def table(
    intervals: Intervals, titles: Mapping[str, str], columns: Sequence[Column], *, signed: bool = False
) -> list[str]:
    """A row for each of `titles` that has figures, in its order. `signed`: they are differences; those whose interval
    leaves out 0 end in an asterisk. The last column says over how many seeds."""
    shown = [column for column in columns if any(column.figure in figures for figures in intervals.values())]
    rows = []
    for name, title in titles.items():
        if figures := intervals.get(name):
            found = [figures.get(column.figure) for column in shown]
            cells = [cell(one, column, signed=signed) for one, column in zip(found, shown, strict=True)]
            rows.append([title, *cells, str(max((one.n for one in found if one is not None), default=0))])
    return markdown(["", *(column.heading for column in shown), "seeds"], rows)


def cell(found: Interval | None, column: Column, *, signed: bool) -> str:
    """ "16.4 ± 1.2"; without what a single value does not say."""
    if found is None:
        return MISSING
    scale = 100 if column.share else 1
    sign = "+" if signed else ""
    text = f"{scale * found.mean:{sign}.{column.digits}f}"
    if found.half is not None:
        text += f" ± {scale * found.half:.{column.digits}f}"
    return text + "*" * (signed and found.excludes_zero)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A padded table: the first column to the left, the others to the right."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [line(rows[0]), rule, *map(line, rows[1:])]

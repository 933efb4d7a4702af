"""What an evaluation leaves: OUTPUT/results.json and OUTPUT/rows.jsonl, each written whole, and a table.

results.json   benchmark, settings (everything the figures depend on), remarks, and of each system its figures:
               section -> counts, metrics (null where there is nothing to divide by); written last
rows.jsonl     one line a row of the input, in its order: id, line, category, lengths (characters of chosen and
               rejected); with a model rewards [chosen, rejected], right, critiques [of chosen, of rejected].
               Of a benchmark of answers (`questions`): id, line, category, answers and what they were found to be
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.command import one_line
from mmrlhf_jax.data.sources.pictures import Store
from mmrlhf_jax.evaluation.comparisons import BenchmarkError, Comparison, lengths_of

RESULTS, ROWS = "results.json", "rows.jsonl"
LONGEST_NAME = 60  # of a section in a table; a benchmark's file may name them

Measured = dict[str, dict[str, Any]]
"""Section (a category, `overall`, ...) -> name of a count or metric -> its value."""


class Columns(Protocol):
    """What a table of figures needs to know: `counts` and `metrics` (name -> heading), in order."""

    @property
    def title(self) -> str: ...

    @property
    def counts(self) -> Sequence[str]: ...

    @property
    def metrics(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Sheet:
    """`Columns`, and nothing else."""

    title: str
    counts: Sequence[str]
    metrics: Mapping[str, str]


@dataclass(frozen=True)
class Benchmark:
    """A reward benchmark. `counts` and `metrics` (name -> heading) are what its sections hold, in order."""

    name: str
    title: str
    counts: Sequence[str]
    metrics: Mapping[str, str]
    read: Callable[[str, Store], tuple[Comparison, ...]]
    measure: Callable[[Sequence[Comparison], np.ndarray], Measured]
    chance: Callable[[Sequence[Comparison]], Measured]
    remarks: Callable[[Sequence[Comparison]], list[str]]


def figures(benchmark: Benchmark, rows: Sequence[Comparison], rewards: np.ndarray | None) -> dict[str, Measured]:
    """System -> figures: the model's, for `rewards` f64 [rows, 2], beside what needs no model."""
    systems = {} if rewards is None else {"model": benchmark.measure(rows, rewards)}
    return {
        **systems,
        "longer answer": benchmark.measure(rows, lengths_of(rows)),
        "random": benchmark.chance(rows),
    }


def find_done(output: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results of an earlier evaluation with these settings (it may have more); None where there are none yet.

    Raises:
        BenchmarkError: `output` is no directory, or holds the results of other settings.
    """
    directory = storage.to_path(output)
    if directory.exists() and not directory.is_dir():
        raise BenchmarkError(f"{output} is not a directory: choose another --output")
    if not (directory / RESULTS).exists():
        return None
    try:
        found = json.loads((directory / RESULTS).read_text())
        earlier = found["settings"]
        if not isinstance(earlier, dict):
            raise ValueError("settings are no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BenchmarkError(f"{directory / RESULTS} is not an evaluation's: choose another --output") from error
    # as JSON has them: tuples are lists there
    asked = json.loads(json.dumps(dict(settings)))
    if changed := [name for name in asked if earlier.get(name) != asked[name]]:
        listed = "".join(f"\n  {name}: there {earlier.get(name)!r}, now {asked[name]!r}" for name in changed)
        raise BenchmarkError(
            f"{output} holds the results of other settings: choose another --output or remove it{listed}"
        )
    return found


def write(output: str, results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Both files; who sees results.json sees all rows."""
    directory = storage.to_path(output)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / ROWS, "".join(json.dumps(record) + "\n" for record in records))
    _write(directory / RESULTS, json.dumps(results, indent=2) + "\n")


def _write(path: epath.Path, text: str) -> None:
    storage.write_whole(path, text.encode())


def table(benchmark: Columns, systems: Mapping[str, Measured], remarks: Sequence[str]) -> list[str]:
    """The figures for a terminal, a line a section."""
    head, names = [one_line(benchmark.title), *benchmark.counts], ["", *("" for _ in benchmark.counts)]
    for system in systems:
        head += [system, *("" for _ in range(len(benchmark.metrics) - 1))]
        names += benchmark.metrics.values()
    lines = [head, names]
    for section, counted in next(iter(systems.values())).items():
        line = [one_line(section)[:LONGEST_NAME], *(str(counted.get(count, "")) for count in benchmark.counts)]
        for measured in systems.values():
            line += [_figure(measured[section].get(metric)) for metric in benchmark.metrics]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines[1:]) for i in range(len(head))]
    widths[0] = max(widths[0], len(head[0]))
    for i in range(1, len(head)):
        widths[i] = max(widths[i], len(head[i]), 5)
    drawn = ["  ".join(_cell(cell, width, i) for i, (cell, width) in enumerate(zip(line, widths))) for line in lines]
    return [line.rstrip() for line in drawn] + [f"note: {one_line(remark)}" for remark in remarks]


def _cell(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

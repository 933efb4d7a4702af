"""What a RUN says of itself, read for the report: recipe, start, machines, and every number it logged.

Reading starts no jax backend and no part of a run is changed. A run may still be training, and may be on gs://.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from etils import epath

from mmrlhf_jax.objectives import OBJECTIVES, Objective
from mmrlhf_jax.training import recipe as recipes
from mmrlhf_jax.training.run import RunDirectory

NO_METRICS = {"step", "rows"}  # of a line of metrics.jsonl: which step, which rows of the dataset


class ReportError(ValueError):
    """What was given cannot be reported on: names file and line, and what to do."""


@dataclass(frozen=True, eq=False)
class Series:
    """One number over the steps whose line has it: `step` i64 [n], rising; `value` f64 [n], NaN and infinite ones as
    they were logged (null is NaN)."""

    step: np.ndarray
    value: np.ndarray


@dataclass(frozen=True, eq=False)
class Log:
    """What a .jsonl file of a run holds: the step of every line, i64 [n], and every number by name."""

    step: np.ndarray
    series: Mapping[str, Series]

    def __len__(self) -> int:
        return len(self.step)

    def total(self, name: str) -> float:
        """The sum of the finite values."""
        return float(np.nansum(np.where(np.isfinite(found := self.values(name)), found, 0)))

    def values(self, name: str) -> np.ndarray:
        """f64 [n], none where no line has it."""
        return self.series[name].value if name in self.series else np.zeros(0)


@dataclass(frozen=True, eq=False)
class Run:
    """`name` is how the report calls it. `complete` is None while it is not finished; `starts` are the lines of its
    environment file, none where it was begun before there was one."""

    name: str
    path: str
    objective: Objective
    recipe: Mapping[str, Any]
    start: Mapping[str, Any]
    complete: Mapping[str, Any] | None
    starts: Sequence[Mapping[str, Any]]
    steps: Log
    evaluations: Log

    @property
    def kind(self) -> str:
        return type(self.objective).__name__


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs at `paths`, in their order. Raises ReportError naming file and line."""
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def read_run(path: str, name: str) -> Run:
    """Raises ReportError where there is no run, or one of its files is not what launch/train.py writes."""
    run = RunDirectory.at(path)
    if not run.exists():
        what = "has no recipe.json" if run.path.exists() else "does not exist"
        raise ReportError(f"{path} is no RUN: it {what}. A RUN is made by launch/train.py --output {path}")
    recipe = _object(run.recipe)
    return Run(
        name=name,
        path=path,
        objective=_objective(recipe, run.recipe),
        recipe=recipe,
        start=_object(run.start) if run.start.exists() else {},
        complete=_object(run.complete) if run.complete.exists() else None,
        starts=[record for _, record in _records(run.environment)],
        steps=read_log(run.metrics),
        evaluations=read_log(run.evaluation),
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of `paths` that tell them apart."""
    parts = [PurePosixPath(path.rstrip("/").replace("\\", "/")).parts or (path,) for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def read_log(path: epath.Path) -> Log:
    """The numbers of a metrics.jsonl or evaluation.jsonl; empty where there is none. Raises ReportError naming file and
    line for anything a run does not write."""
    steps: list[int] = []
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line, record in _records(path):
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**62:
            raise ReportError(f"{path}:{line}: step {step!r} is not a whole number from 0 on")
        if steps and step <= steps[-1]:
            raise ReportError(f"{path}:{line}: step {step} follows step {steps[-1]}: steps rise from line to line")
        steps.append(step)
        for name in record.keys() - NO_METRICS:
            at, values = found.setdefault(name, ([], []))
            at.append(step)
            values.append(number_of(record[name], name, f"{path}:{line}"))
    series = {name: Series(np.array(found[name][0], np.int64), np.array(found[name][1])) for name in sorted(found)}
    return Log(np.array(steps, np.int64), series)


def number_of(value: Any, name: str, where: str) -> float:
    """NaN for none. Raises ReportError for what is no number."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ReportError(f"{where}: {name} is {json.dumps(value)[:60]}, not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ReportError(f"{where}: {name} is too large a number") from error


def _records(path: epath.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) of a .jsonl file of a run; of one that was killed, half a line at the end is passed over."""
    if not path.exists():
        return
    for line, text in enumerate(_text(path).split("\n")[:-1], 1):
        if text:
            yield line, _parsed(text, f"{path}:{line}")


def _object(path: epath.Path) -> dict[str, Any]:
    return _parsed(_text(path), str(path))


def _text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not UTF-8 text: {error}") from error


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where}: not JSON ({error}): restore the file, launch/train.py wrote it whole") from error
    if not isinstance(value, dict):
        raise ReportError(f"{where}: not a JSON object")
    return value


def _objective(recipe: Mapping[str, Any], path: epath.Path) -> Objective:
    """The objective a flattened recipe holds."""
    known = {each.__name__: each for each in OBJECTIVES.values()}
    name = recipe.get("objective")
    if not isinstance(name, str) or name not in known:
        raise ReportError(f"{path}: objective {name!r} is not one of {', '.join(known)}")
    fields = {key.removeprefix("objective."): value for key, value in recipe.items() if key.startswith("objective.")}
    try:
        return known[name](**fields)
    except (TypeError, ValueError) as error:
        raise ReportError(f"{path}: objective {name}: {error}") from error


def defaults(run: Run) -> dict[str, Any]:
    """The flattened recipe of the run's objective with everything else as a recipe has it by itself."""
    made = recipes.defaults(type(run.objective)())
    return json.loads(json.dumps(made))


def resolved(run: Run) -> dict[str, Any]:
    """The run's recipe; a field that did not exist when it began ran with that field's default."""
    return {**defaults(run), **run.recipe}

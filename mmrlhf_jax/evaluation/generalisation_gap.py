"""Generalisation gap: what a model loses where data are not like those it was trained for.

Source: https://arxiv.org/abs/2310.06452: the figure in distribution less the one out of it. Both are the results.json
of evaluations by launch/evaluate.py, of one benchmark and of one model; the gap is taken of each metric of the sections
that both have. The reader knows which way is good: of a rate that should be low, a negative gap is the loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mmrlhf_jax import storage
from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.results import RESULTS, Measured, Sheet

MAX_BYTES = 2**24
SYSTEM = "model"
_OF_THE_ROWS = {"input_sha256", "answers_sha256", "prompts", "tasks", "skip_bad", "model", "model_fingerprint"}


METRICS = {"in": "in distr.", "out": "out", "gap": "gap"}


def sheet(benchmark: str) -> Sheet:
    return Sheet(f"{benchmark}, gap", (), METRICS)


def read(path: str) -> dict[str, Any]:
    """A results.json, or that of a directory. Raises BenchmarkError where it is none with figures of a model."""
    file = storage.to_path(path)
    file = file / RESULTS if file.is_dir() else file
    if not file.exists():
        raise BenchmarkError(f"{file} does not exist: name the output of an evaluation")
    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        found = json.loads(data)
        sections = found["systems"][SYSTEM]
        if (
            not isinstance(found["benchmark"], str)
            or not isinstance(found["settings"], dict)
            or not all(isinstance(one, dict) for one in sections.values())
        ):
            raise ValueError("no sections of figures")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BenchmarkError(f"{file} holds no figures of a model: {error}") from error
    return dict(found)


def measure(inside: Mapping[str, Any], outside: Mapping[str, Any]) -> Measured:
    """ "section metric" -> figure in distribution, out of it, and gap.

    Raises:
        BenchmarkError: the two are of different benchmarks or models, or have no figure in common.
    """
    if inside["benchmark"] != outside["benchmark"]:
        raise BenchmarkError(
            f"figures of {inside['benchmark']!r} and {outside['benchmark']!r} do not compare: give one benchmark's"
        )
    _check_one_model(inside["settings"], outside["settings"])
    first, second = inside["systems"][SYSTEM], outside["systems"][SYSTEM]
    sections = {
        f"{section} {metric}": {"in": value, "out": second[section][metric], "gap": value - second[section][metric]}
        for section, figures in first.items()
        for metric, value in figures.items()
        if section in second and _is_figure(value) and _is_figure(second[section].get(metric))
    }
    if not sections:
        raise BenchmarkError("the two have no figure in common")
    return sections


def _check_one_model(inside: Mapping[str, Any], outside: Mapping[str, Any]) -> None:
    """By its weights where both state them, else by its place; of answers that a file brought nobody knows whose."""
    for name in ("model_fingerprint", "model"):
        one, other = inside.get(name), outside.get(name)
        if one and other:
            if one != other:
                raise BenchmarkError(f"figures of two models ({one} and {other}): a gap is one model's")
            return


def remarks(inside: Mapping[str, Any], outside: Mapping[str, Any]) -> list[str]:
    """A line for each setting, rows and answers aside, in which the two evaluations differ."""
    first, second = inside["settings"], outside["settings"]
    names = sorted((first.keys() | second.keys()) - _OF_THE_ROWS)
    return [
        f"evaluated differently, {name}: {json.dumps(first.get(name))} and {json.dumps(second.get(name))}"
        for name in names
        if first.get(name) != second.get(name)
    ]


def _is_figure(value: Any) -> bool:
    """Counts, which are whole numbers, are no figures."""
    return isinstance(value, float) and math.isfinite(value)

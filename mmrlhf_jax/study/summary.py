"""What the seeds of a study say together: each figure's interval, and that of its difference to what it is held
against.

A seed's results are {"policies": {policy: figures}, "scores": {source: figures}}, figures being numbers, None where a
seed has nothing to divide by, or mappings of these. A summary names a figure by its path: "hallucination/board".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from mmrlhf_jax.study.intervals import Interval, interval, paired_difference

KINDS = ("policies", "scores")

Results = Mapping[int, Mapping[str, Any]]
"""Of each seed."""
Intervals = dict[str, dict[str, Interval]]
"""Of each policy, or source of scores, its figures."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """`means`: of each kind. `differences`: of all of a kind to one of them, the baseline, paired by seed; only what
    shares a seed and a figure with it is there."""

    seeds: tuple[int, ...]
    means: dict[str, Intervals]
    differences: dict[str, Intervals]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def summarise(found: Results, baselines: Mapping[str, Iterable[str]]) -> Summary:
    """`baselines`: of each kind, the names that all others are held against."""
    means: dict[str, Intervals] = {}
    differences: dict[str, Intervals] = {}
    for kind in KINDS:
        values = _by_figure(found, kind)
        means[kind] = {
            name: {figure: interval(list(seeds.values())) for figure, seeds in figures.items()}
            for name, figures in values.items()
        }
        for baseline in baselines.get(kind, ()):
            if baseline in values:
                differences[baseline] = {
                    name: _held_against(figures, values[baseline])
                    for name, figures in values.items()
                    if name != baseline
                }
    return Summary(tuple(found), means, differences)


def _by_figure(found: Results, kind: str) -> dict[str, dict[str, dict[int, float]]]:
    """Name -> figure -> seed -> value; what is None is left out."""
    out: dict[str, dict[str, dict[int, float]]] = {}
    for seed, results in found.items():
        for name, figures in results[kind].items():
            for figure, value in flat(figures).items():
                out.setdefault(name, {}).setdefault(figure, {})[seed] = value
    return out


def _held_against(ours: Mapping[str, Mapping[int, float]], theirs: Mapping[str, Mapping[int, float]]) -> Any:
    found = {figure: paired_difference(seeds, theirs.get(figure, {})) for figure, seeds in ours.items()}
    return {figure: difference for figure, difference in found.items() if difference is not None}


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"a": {"b": 1.0}} -> {"a/b": 1.0}, without what is None."""
    out: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}/")
        elif value is not None:
            out[prefix + name] = float(value)
    return out

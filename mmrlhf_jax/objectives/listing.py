"""Every objective on a page: its name, its class, its options, formula and source, as its docstring states them."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Any

from mmrlhf_jax.objectives import OBJECTIVES, AttributeObjective

WIDTH = 100


def listing() -> str:
    """One paragraph an objective, in the order of `OBJECTIVES`."""
    head = (
        f"{len(OBJECTIVES)} objectives. A recipe holds one, `objective=CLASS(option=value)`, and "
        "--objective.option VALUE changes it. z = s_i - s_j for a pair 'i is preferred to j', s = log policy / "
        "reference; r = a reward model's score. Where there is an option gamma, gamma * NLL(chosen) is added."
    )
    return "\n\n".join([textwrap.fill(head, WIDTH), *(described(name) for name in OBJECTIVES)])


def described(name: str) -> str:
    """Name, class, options with their defaults, and the docstring, which gives formula and source."""
    kind = OBJECTIVES[name]
    lines = [f"{name}  ({kind.__name__})", f"options: {', '.join(options(kind)) or 'none'}"]
    lines += [f"needs: {needs}"] if (needs := ", ".join(_needs(kind))) else []
    lines += (inspect.getdoc(kind) or "").split("\n")
    return "\n".join([lines[0], *(f"    {line}".rstrip() for line in lines[1:] if line)])


def options(kind: type[Any]) -> list[str]:
    """`name = default` of every field."""
    return [f"{field.name} = {field.default!r}" for field in dataclasses.fields(kind)]


def _needs(kind: type[Any]) -> list[str]:
    found = {
        "reference log-probs": kind.needs_reference,
        "a margin for every pair": kind.needs_margin,
        "a step in one micro-batch": kind.needs_step_statistics,
        "ratings of responses": issubclass(kind, AttributeObjective),
    }
    return [words for words, needed in found.items() if needed]

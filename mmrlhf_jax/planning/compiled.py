"""A recipe's programs compiled ahead of time, and what the compiler says of their memory."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core

_USED = (
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
)
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """XLA's memory analysis of one program on one device, bytes; `aliased` outputs take the place of arguments."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    seconds: float

    @property
    def needs(self) -> float:
        """All of it at once: what XLA reserves."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclass(frozen=True)
class TooLarge:
    """The compiler found no way to fit the program: bytes it would use, and has (0: it did not say)."""

    needs: float
    has: float
    seconds: float
    message: str


def compile_ahead(lowered: Any) -> Compiled | TooLarge:
    """Compiles a jax.stages.Lowered; running out of the device's memory is an answer, not an error."""
    began = time.monotonic()
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs, has = read_exhaustion(str(error))
        return TooLarge(needs, has, time.monotonic() - began, str(error).splitlines()[0][:300])
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        time.monotonic() - began,
    )


def read_exhaustion(message: str) -> tuple[float, float]:
    """Bytes needed and had, from XLA's message; zeros where it does not say."""
    found = next(filter(None, (form.search(message) for form in _USED)), None)
    if not found:
        return 0.0, 0.0
    needs, unit, has, unit_has = found.groups()
    return float(needs) * _UNIT[unit], float(has) * _UNIT[unit_has]


def traced_flops(jaxpr: core.Jaxpr) -> float:
    """Matrix products (2mnk) of a traced program on all devices together, bodies of loops as often as they run.

    XLA's own count takes a loop's body once, however long the loop. Kernels count every block of their grid, also those
    a causal mask lets them skip.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _product(eqn)
        elif name == "cond":
            total += max((traced_flops(branch.jaxpr) for branch in eqn.params["branches"]), default=0.0)
        else:
            total += _times(name, eqn.params) * sum(traced_flops(inner) for inner in _inner(eqn.params))
    return total


def _product(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * summed * math.prod(eqn.outvars[0].aval.shape)


def _times(name: str, params: Any) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its shapes are those of one device
        return params["mesh"].size
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _inner(params: Any) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, core.Jaxpr):
                yield one

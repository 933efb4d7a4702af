"""A plan as text for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from mmrlhf_jax.models.families import declare
from mmrlhf_jax.nn.devices import GIB
from mmrlhf_jax.nn.params import count
from mmrlhf_jax.nn.remat import RematRung
from mmrlhf_jax.nn.sharding import MeshConfig, shape_of_mesh
from mmrlhf_jax.planning.compiled import Compiled, TooLarge
from mmrlhf_jax.planning.plan import Plan
from mmrlhf_jax.training.memory import GRADIENTS, MARGIN
from mmrlhf_jax.training.planning import abstract_run

_AGAIN: dict[RematRung, str] = {
    "full": "everything",
    "attention": "all but attention",
    "projections": "norms and activations",
    "none": "nothing",
}


def lines(plan: Plan) -> Iterator[str]:
    """The whole plan: what runs, what a device holds, how long a step takes, the verdict."""
    yield from _what(plan)
    yield from _estimate(plan)
    yield from _compiled(plan)
    yield from _time(plan)
    yield from _verdict(plan)


def verdict(plan: Plan) -> str:
    """One line: whether it fits, in bytes a device needs and has."""
    has = plan.target.chip.memory
    by = "by XLA's count" if plan.compiled else "by the estimate"
    if plan.fits:
        return f"fits {plan.target}: needs {_gib(plan.needs)} GiB a device, has {_gib(has)} ({by})"
    return f"does not fit {plan.target}: needs {_gib(plan.needs)} GiB a device, has {_gib(has)} ({by})"


def _what(plan: Plan) -> Iterator[str]:
    recipe, config, mesh = plan.recipe, plan.config, plan.mesh
    run = abstract_run(recipe, config, shape_of_mesh(MeshConfig(), 1))
    trains = sum(leaf.size for leaf in jax.tree.leaves(run.state.trainable))
    yield (
        f"{type(recipe.objective).__name__}: {count(declare(config)) / 1e9:.2f} billion parameters, {trains / 1e9:.3g} "
        f"billion that train; remat {recipe.compute.rung!r} (computed again: {_AGAIN[recipe.compute.rung]}), "
        f"{recipe.compute.dtype}"
    )
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    yield f"{plan.target}: {plan.target.total} chips, mesh {sizes}"
    shards = mesh["data"] * mesh["fsdp"]
    for load, held in zip(plan.loads, plan.footprints, strict=True):
        yield (
            f"  bucket {load.bucket}: {load.bucket.groups // shards} groups a device, {load.micro_batches:.3g} "
            f"micro-batches a step, {load.filled:.0%} of them filled; {_gib(held.total)} GiB estimated"
        )


def _estimate(plan: Plan) -> Iterator[str]:
    held = plan.footprints[plan.largest]
    yield f"bytes on a device, bucket {plan.loads[plan.largest].bucket}:                  GiB"
    yield from (f"  {name:<50}{_gib(amount):>10}" for name, amount in held.kept.items() if amount)
    for name, amount in held.passing.items():
        yield f"  {name:<50}{_gib(amount):>10}{'' if name == GRADIENTS else '  estimated'}"
    more = f"total, with {MARGIN - 1:.0%} more of what is estimated"
    yield f"  {more:<50}{_gib(held.total):>10}  of {_gib(plan.target.chip.memory)}"


def _compiled(plan: Plan) -> Iterator[str]:
    programs: list[tuple[str, str, Compiled | TooLarge]] = [
        ("accumulate", f"accumulate, bucket {one.bucket}", one.accumulate) for one in plan.compiled
    ]
    if plan.apply is not None:
        programs.append(("apply", "apply", plan.apply))
    for name, title, answer in programs:
        yield f"compiled in {answer.seconds:.0f} s: {title}"
        if isinstance(answer, TooLarge):
            yield f"  does not compile: {answer.message}"
            continue
        yield (
            f"  arguments {_gib(answer.arguments)} + outputs {_gib(answer.outputs - answer.aliased)} + temporaries "
            f"{_gib(answer.temporaries)} + beside it {_gib(plan.beside[name])} = {_gib(plan.need_of(answer, name))} GiB"
        )
    for one in plan.compiled:
        if isinstance(one.accumulate, Compiled):
            passing = _passing_of(plan, one.bucket)
            ratio = passing / one.accumulate.temporaries if one.accumulate.temporaries else float("inf")
            yield f"  temporaries were estimated at {_gib(passing)} GiB, {ratio:.2f} of XLA's"


def _passing_of(plan: Plan, bucket: Any) -> float:
    index = next(i for i, load in enumerate(plan.loads) if load.bucket == bucket)
    return sum(plan.footprints[index].passing.values())


def _time(plan: Plan) -> Iterator[str]:
    time = plan.time
    parts = {field.name: getattr(time.useful, field.name) for field in dataclasses.fields(time.useful)}
    shares = ", ".join(f"{name} {amount / time.useful.total:.0%}" for name, amount in parts.items() if amount)
    yield f"FLOPs/step: {time.useful.total:.3g} useful ({shares}), {time.done.total:.3g} with filler and recomputation"
    for one in plan.compiled:
        load = next(load for load in plan.loads if load.bucket == one.bucket)
        yield (
            f"  counted in the traced program, bucket {one.bucket}: {one.flops:.3g} a micro-batch, "
            f"{one.flops * load.micro_batches:.3g} a step (whole squares of attention)"
        )
    streams = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in time.seconds.items())
    yield (
        f"a step should take {time.total:.3g} s, bound by {time.bound}, MFU {time.mfu:.0%}: {streams} (predicted, not "
        f"measured; products at {plan.efficiency:.0%} of the peak)"
    )


def _verdict(plan: Plan) -> Iterator[str]:
    yield verdict(plan)
    has = plan.target.chip.memory
    if plan.changes:
        yield "what would need less, by the estimate (what it frees may then go into recomputing less):"
    for change in plan.changes:
        yield f"  {_gib(change.total):>8} GiB  {'fits' if change.total <= has else 'does not fit'}  {change.flags}"
    if plan.smallest:
        yield "fewest chips of each kind that hold it, by the estimate, recomputing and cutting up what is left open:"
    for holder in sorted(plan.smallest, key=lambda holder: holder.target.total):
        held = f"{_gib(holder.total)} of {_gib(holder.target.chip.memory)} GiB"
        yield f"  {holder.target.total:>4} chips  {holder.target!s:<14}{held}"
    if not plan.smallest:
        yield "no size of any chip listed holds it by the estimate"


def _gib(amount: float) -> str:
    return f"{amount / GIB:.2f}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's figures: bytes, FLOPs and seconds."""
    chosen, time = plan.footprints[plan.largest], plan.time
    return {
        "target": str(plan.target),
        "chips": plan.target.total,
        "mesh": plan.mesh,
        "fits": plan.fits,
        "by": "compiler" if plan.compiled else "estimate",
        "bytes_needed": plan.needs,
        "bytes_had": plan.target.chip.memory,
        "parameters": count(declare(plan.config)),
        "buckets": [
            {**dataclasses.asdict(load), "estimated_bytes": held.total}
            for load, held in zip(plan.loads, plan.footprints, strict=True)
        ],
        "estimate": {"kept": chosen.kept, "passing": chosen.passing, "total": chosen.total},
        "compiled": [dataclasses.asdict(one) for one in plan.compiled],
        "apply": None if plan.apply is None else dataclasses.asdict(plan.apply),
        "step": {
            "useful_flops": time.useful.total,
            "done_flops": time.done.total,
            "efficiency": plan.efficiency,
            "seconds": time.seconds,
            "total": time.total,
            "bound": time.bound,
            "mfu": time.mfu,
        },
        "would_need": [{"flags": change.flags, "bytes": change.total} for change in plan.changes],
        "smallest": [
            {"target": str(holder.target), "chips": holder.target.total, "bytes": holder.total}
            for holder in plan.smallest
        ],
    }

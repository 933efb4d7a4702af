"""Every backend of nn/attention.py that can serve here, beside XLA: the same groups, interleaved repeats, how far their
results lie apart, and how near they come to what this device does in plain matrix products.

Operations are those a group needs and no more: two products (2mnk each) over the pairs of query and key that see each
other, twice as many in the backward pass. What a backend computes again, or computes and masks, is its own loss.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mmrlhf_jax.benchmarks.machine import machine, measured_peak
from mmrlhf_jax.command import CommandError, UsageError, one_line
from mmrlhf_jax.nn.attention import Backend, GroupRule, backend_problem, group_attention
from mmrlhf_jax.training.runtime import set_up_jax

Model = Literal["0.5b", "7b"]
HEADS: dict[Model, tuple[int, int, int]] = {"0.5b": (14, 2, 64), "7b": (28, 4, 128)}  # queries, keys, head size: Qwen2
BACKENDS = tuple(name for name in ("xla", *get_args(Backend)) if name != "auto")
PASSES = ("forward", "both")


@dataclass(frozen=True)
class Attention:
    """Attention over one group, forward and with its backward pass: each backend that can serve here beside XLA, and
    beside the device's own rate of matrix products."""

    models: tuple[Model, ...] = ("0.5b", "7b")
    """whose heads: 14 on 2 of 64, and 28 on 4 of 128"""
    prompts: tuple[int, ...] = ()
    """prompt slots; by default 512 and 1024 on a CPU, elsewhere 3072 and 7424 (a 640 x 480 picture, a large one)"""
    responses: int = 4
    """K"""
    response: int = 128
    """tokens of each"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """by default float32 on a CPU, bfloat16 elsewhere"""
    repeats: int = 7
    seconds: float = 30.0
    """no more repeats of a case are begun after this long"""
    output: str | None = None
    """a JSON file for the figures"""


@dataclass(frozen=True)
class Case:
    model: Model
    prompt: int
    responses: int
    response: int

    @property
    def flops(self) -> dict[str, float]:
        """Of each of PASSES; prompt and responses are full, so every slot counts."""
        heads, _, head_dim = HEADS[self.model]
        own = self.response * (self.response + 1) // 2
        pairs = self.prompt * (self.prompt + 1) // 2 + self.responses * (self.response * self.prompt + own)
        forward = 4.0 * heads * head_dim * pairs
        return {"forward": forward, "both": 3 * forward}


def time_attention(command: Attention) -> None:
    """Prints each case. Raises CommandError, once all cases have been told, where a backend failed that should have
    served."""
    if not command.models or min(command.repeats, command.responses, command.response, *command.prompts) < 1:
        raise UsageError("--models must name some; --prompts, --responses, --response and --repeats are at least 1")
    platform = jax.devices()[0].platform
    dtype = command.dtype or ("float32" if platform == "cpu" else "bfloat16")
    set_up_jax(dtype)
    here = {**machine(), "device": jax.devices()[0].device_kind, "platform": platform}
    print(f"{here['device']} ({here['processor']}, {here['cores']} cores), {dtype}", flush=True)
    rows = []
    for model in command.models:
        for prompt in command.prompts or ((512, 1024) if platform == "cpu" else (3072, 7424)):
            case = Case(model, prompt, command.responses, command.response)
            # anew for each case: clocks, and who else uses the machine, change in minutes
            peak = measured_peak(dtype)
            rows.append(time_case(case, platform, dtype, peak, command.repeats, command.seconds))
            print("\n".join(_lines(rows[-1])), flush=True)
    if command.output:
        figures = {
            "command": dataclasses.asdict(command), "machine": here, "dtype": dtype, "rows": rows
        }  # fmt: skip
        Path(command.output).write_text(json.dumps(figures, indent=2) + "\n")
    if failed := sorted({name for row in rows for name, found in row["backends"].items() if "failed" in found}):
        raise CommandError(f"{', '.join(failed)} should serve here and failed, see above")


def time_case(case: Case, platform: str, dtype: str, peak: float, repeats: int, seconds: float) -> dict[str, Any]:
    """One case, as a row of the figures: of each backend its times, why it cannot serve ("problem") or how it failed
    ("failed")."""
    arrays, rule = _group(case, dtype)
    backends: dict[str, dict[str, Any]] = {}
    programs: dict[str, dict[str, Callable[[], Any]]] = {}
    results: dict[str, Any] = {}
    for name in BACKENDS:
        if problem := backend_problem(name, platform, case.prompt, HEADS[case.model][2], dtype):
            backends[name] = {"problem": problem}
            continue
        made = _programs(name, platform, arrays, rule)
        try:
            results[name] = {each: jax.block_until_ready(run()) for each, run in made.items()}  # compiles, too
            programs[name] = made
        except jax.errors.JaxRuntimeError as error:  # no memory for it, or a kernel that this device's driver refuses
            backends[name] = {"failed": one_line(str(error))[:300]}
    taken = _interleaved(programs, repeats, seconds)
    for name in programs:
        difference = _differences(results[name], results["xla"]) if "xla" in results else None
        backends[name] = _figures(taken[name], taken.get("xla"), case, peak) | {"difference": difference}
    heads, kv_heads, head_dim = HEADS[case.model]
    return {
        **dataclasses.asdict(case), "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "flops": case.flops,
        "peak_flops": peak,
        "backends": {name: backends[name] for name in BACKENDS},
    }  # fmt: skip


def _group(case: Case, dtype: str) -> tuple[tuple[jax.Array, ...], GroupRule]:
    """q, k, v and the slope of the loss, [1, P+S, heads, head size]; and the rule of a group without padding."""
    heads, kv_heads, head_dim = HEADS[case.model]
    slots = case.prompt + case.responses * case.response
    rng = np.random.default_rng(0)
    arrays = tuple(
        jnp.asarray(rng.normal(size=(1, slots, count, head_dim)), dtype) for count in (heads, kv_heads, kv_heads, heads)
    )
    own = np.tile(case.prompt + np.arange(case.response), case.responses)
    position = np.concatenate([np.arange(case.prompt), own])
    branch = np.concatenate([np.full(case.prompt, -1), np.repeat(np.arange(case.responses), case.response)])
    rule = GroupRule(
        jnp.asarray(position[None], jnp.int32),
        jnp.asarray(branch[None], jnp.int32),
        jnp.asarray([case.prompt], jnp.int32),
        prompt=case.prompt,
    )
    return arrays, rule


def _programs(
    backend: Backend, platform: str, arrays: tuple[jax.Array, ...], rule: GroupRule
) -> dict[str, Callable[[], Any]]:
    """Of each of PASSES what runs it: the output; the loss and the gradients of q, k and v."""
    q, k, v, slope = arrays
    attend = partial(group_attention, backend=backend, platform=platform)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, slope: jax.Array, rule: GroupRule) -> jax.Array:
        return jnp.sum(attend(q, k, v, rule) * slope, dtype=jnp.float32)

    # with the value, without which no forward pass would be needed where the backward pass repeats it
    forward, both = jax.jit(attend), jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return {"forward": lambda: forward(q, k, v, rule), "both": lambda: both(q, k, v, slope, rule)}


def _interleaved(
    programs: dict[str, dict[str, Callable[[], Any]]], repeats: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each backend and pass, one a repeat; one repeat at least, however long it takes."""
    taken: dict[str, dict[str, list[float]]] = {name: {each: [] for each in PASSES} for name in programs}
    start = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - start > seconds:
            break
        for name, passes in programs.items():
            for each, run in passes.items():
                began = time.perf_counter()
                jax.block_until_ready(run())
                taken[name][each].append(time.perf_counter() - began)
    return taken


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of outputs and of gradients, and the largest absolute value beside which to see
    it."""

    def apart(a: jax.Array, b: jax.Array) -> float:
        return float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))))

    gradients = list(zip(found["both"][1], wanted["both"][1], strict=True))
    return {
        "forward": apart(found["forward"], wanted["forward"]),
        "forward_largest": float(jnp.max(jnp.abs(wanted["forward"].astype(jnp.float32)))),
        "gradient": max(apart(a, b) for a, b in gradients),
        "gradient_largest": max(float(jnp.max(jnp.abs(b.astype(jnp.float32)))) for _, b in gradients),
    }


def _figures(
    taken: dict[str, list[float]], xla: dict[str, list[float]] | None, case: Case, peak: float
) -> dict[str, Any]:
    """Medians; `ratio` is that of XLA's time to this one's, neighbouring repeats."""
    seconds = {each: statistics.median(taken[each]) for each in PASSES}
    rates = {each: case.flops[each] / seconds[each] for each in PASSES}
    ratio = None
    if xla is not None:
        ratio = {each: statistics.median(a / b for a, b in zip(xla[each], taken[each], strict=True)) for each in PASSES}
    return {
        "repeats": len(taken["forward"]),
        "seconds": seconds,
        "range": {each: (min(taken[each]), max(taken[each])) for each in PASSES},
        "flops_per_second": rates,
        "of_peak": {each: rate / peak for each, rate in rates.items()},
        "ratio": ratio,
    }


def _lines(row: dict[str, Any]) -> list[str]:
    lines = [
        f"{row['model']}: prompt {row['prompt']} + {row['responses']} x {row['response']}, {row['heads']} heads on "
        f"{row['kv_heads']} of {row['head_dim']}; {row['flops']['forward'] / 1e9:.2f} GFLOP forward; "
        f"plain products run at {row['peak_flops'] / 1e9:,.0f} GFLOP/s"
    ]
    for name, found in row["backends"].items():
        if "seconds" not in found:
            said = f"cannot serve: {found['problem']}" if "problem" in found else f"FAILED: {found['failed']}"
            lines.append(f"  {name:7} {said}")
            continue
        passes = [
            f"{label} {1e3 * found['seconds'][each]:.2f} ms ({found['flops_per_second'][each] / 1e9:,.0f} GFLOP/s, "
            f"{found['of_peak'][each]:.0%} of the products' rate)"
            for each, label in (("forward", "forward"), ("both", "and backward"))
        ]
        beside = ""
        if name != "xla" and found["ratio"]:
            apart = found["difference"]
            beside = (
                f"; {found['ratio']['forward']:.2f}x and {found['ratio']['both']:.2f}x XLA's speed, at most "
                f"{apart['forward']:.1e} (of {apart['forward_largest']:.1f}) and {apart['gradient']:.1e} (of "
                f"{apart['gradient_largest']:.1f}) apart"
            )
        lines.append(f"  {name:7} {', '.join(passes)}{beside}")
    return lines

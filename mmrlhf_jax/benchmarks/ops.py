"""One group step by part: each part's floating-point operations and bytes, what the machine's measured speeds make of
them (the roofline: the larger of both times), and what it takes when it runs by itself.

Every part is the model's own functions in a program of its own, at the case's shapes with its padding, on random
activations: forward, and forward with the gradients of its inputs and of what trains in it. FLOPs and bytes
(models/llava_onevision/cost.py) are of the real tokens without recomputation, so padding, masked scores and what
`remat` repeats show as distance from the roofline. The sum of the parts is not the step: the step fuses across parts,
reads the decoder's weights once for prompt and responses, and adds its gradients to those of earlier micro-batches.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mmrlhf_jax.batch import GroupBatch
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.cost import Cost, GroupShape, Part, Widths, group_parts
from mmrlhf_jax.models.llava_onevision.model import (
    Compute,
    logps_of,
    project_features,
    response_logps,
    tower_features,
    with_pictures,
)
from mmrlhf_jax.models.qwen2 import model as qwen2
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.attention import GroupRule, group_attention, response_attention
from mmrlhf_jax.nn.compiler import compiler_options
from mmrlhf_jax.nn.lora import is_adapter
from mmrlhf_jax.nn.remat import remat
from mmrlhf_jax.training.state import combine
from mmrlhf_jax.training.step import rounded

REFERENCE, SUM, STEP = "reference, forward", "sum of the parts", "the step itself"
PASSES = ("forward", "both")


@dataclass(frozen=True)
class Program:
    """`run(params, moving, fixed)`: gradients go to `moving` and to what trains of the parameters whose names start
    with one of `uses`. `backward` False: nothing below trains."""

    run: Callable[[Any, Any, Any], jax.Array]
    uses: tuple[str, ...] = ()
    moving: tuple[jax.Array, ...] = ()
    fixed: Any = None
    backward: bool = True


def time_parts(
    trainable: Any,
    frozen: Any,
    reference: Any,
    config: LlavaOnevisionConfig,
    compute: Compute,
    batch: GroupBatch,
    shape: GroupShape,
    repeats: int,
) -> list[dict[str, Any]]:
    """Of each part, then of the reference's forward: FLOPs, bytes and median seconds of PASSES, a pass None where the
    step has none. `batch` holds one group of `shape`; call under its mesh."""
    policy = combine(trainable, frozen)
    programs = _programs(policy, config, compute, batch)
    costs = part_costs(config, shape, compute, policy, trainable, reference)
    taken = {name: _time(program, trainable, frozen, compute, repeats) for name, program in programs.items()}
    forward = _compiled(lambda tree, batch, seen: response_logps(tree, config, batch, compute, seen).logp, compute)
    seen = None  # by the policy's tower, which then is the reference's
    if reference.tower is None:
        seen = _compiled(lambda tree, tiles: tower_features(tree, config, tiles, compute), compute)(policy, batch.tiles)
    taken[REFERENCE] = {"forward": _median(partial(forward, reference, batch, seen), repeats), "both": None}
    return [_row(name, costs[name], seconds) for name, seconds in taken.items()]


def part_costs(
    config: LlavaOnevisionConfig, shape: GroupShape, compute: Compute, policy: Any, trainable: Any, reference: Any
) -> dict[str, Part]:
    """`group_parts` in the dtypes of the trees, and a reference's forward pass, which leaves a shared tower out."""
    trains = any(not is_adapter(name) for name, _ in nn_params.named_leaves(trainable))
    activation = jnp.dtype(compute.dtype).itemsize

    def parts(tree: Any, *gradients: int) -> dict[str, Part]:
        widths = Widths(activation, tree.decoder.norm.dtype.itemsize, *gradients)
        return group_parts(config, shape, widths, policy.tower.position.dtype.itemsize)

    again = {name: part.forward for name, part in parts(reference).items() if name != "tower" or reference.tower}
    forward = sum(again.values(), Cost())
    # as the trainer: gradients of kernels in the compute dtype, of tables in fp32
    return {**parts(policy, *((activation, 4) if trains else ())), REFERENCE: Part(forward, forward)}


def _programs(policy: Any, config: LlavaOnevisionConfig, compute: Compute, batch: GroupBatch) -> dict[str, Program]:
    d, p, slots = config.decoder, batch.tap_index.shape[1], batch.token.shape[1]
    rule = GroupRule(batch.position, batch.branch, batch.prompt_length, prompt=p)
    of_prompt, of_answers = (
        GroupRule(rule.position[:, part], rule.branch[:, part], rule.prompt_length, prompt=p)
        for part in (slice(None, p), slice(p, None))
    )
    x = _normal(1, slots, d.embed, dtype=compute.dtype)
    q, k, v = (_normal(1, slots, heads, d.head_dim, dtype=compute.dtype) for heads in (d.heads, d.kv_heads, d.kv_heads))
    tiles = batch.tiles.shape[1]
    features = _normal(1, tiles, config.tokens_per_tile, config.tower.embed, dtype=compute.dtype)
    table = "decoder.embedding" if policy.decoder.unembedding is None else "decoder.unembedding"
    of_group = partial(group_attention, backend=compute.attention, platform=compute.platform)

    def tower(params: Any, _: Any, batch: GroupBatch) -> jax.Array:
        return tower_features(params, config, batch.tiles, compute)

    def projector(params: Any, _: Any, fixed: Any) -> jax.Array:
        features, batch = fixed
        tokens = qwen2.embed(params.decoder, batch.token, features.dtype)
        return with_pictures(tokens, project_features(params, features), batch)

    def linear(params: Any, moving: Any, rule: GroupRule) -> jax.Array:
        return qwen2.run_layers(params.decoder, d, moving[0], rule, _unattended, rung=compute.remat)

    def attention(attend: Callable[..., jax.Array], _: Any, moving: Any, rule: GroupRule) -> jax.Array:
        q, k, v = moving
        layer = remat(lambda q, k, v, rule: attend(q, k, v, rule=rule), compute.remat)
        return jax.lax.scan(lambda q, _: (layer(q, k, v, rule), None), q, None, length=d.layers)[0]

    def log_probs(params: Any, moving: Any, batch: GroupBatch) -> jax.Array:
        return logps_of(params, moving[0], batch, compute).logp

    return {
        "tower": Program(tower, ("tower.",), fixed=batch, backward=False),
        "projector and taps": Program(
            projector, ("projector.", "newline", "decoder.embedding"), fixed=(features, batch)
        ),
        "prompt, linear": Program(linear, ("decoder.layers.",), (x[:, :p],), of_prompt),
        "prompt, attention": Program(partial(attention, of_group), (), (q[:, :p], k[:, :p], v[:, :p]), of_prompt),
        "responses, attention": Program(partial(attention, response_attention), (), (q[:, p:], k, v), rule),
        "responses, linear": Program(linear, ("decoder.layers.",), (x[:, p:],), of_answers),
        "log-probs": Program(log_probs, (table,), (x,), batch),
    }  # fmt: skip


def _normal(*shape: int, dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(math.prod(shape)), shape, dtype)


def _unattended(q: jax.Array, k: jax.Array, v: jax.Array, *, rule: GroupRule) -> jax.Array:
    """In attention's place: next to no work, yet of use to all three projections, which would not run otherwise."""
    del rule
    return q + jnp.repeat(k + v, q.shape[2] // k.shape[2], axis=2)


def _compiled(function: Callable[..., Any], compute: Compute) -> jax.stages.Wrapped:
    return jax.jit(function, compiler_options=compiler_options(compute.platform, "step"))


def _time(program: Program, trainable: Any, frozen: Any, compute: Compute, repeats: int) -> dict[str, float | None]:
    """Median seconds of each of PASSES."""
    trainable, frozen = (_only(tree, program.uses) for tree in (trainable, frozen))
    run, moving, fixed = program.run, program.moving, program.fixed

    def forward(trainable: Any, frozen: Any, moving: Any, fixed: Any) -> jax.Array:
        return run(combine(trainable, frozen), moving, fixed)

    def loss(trainable: Any, moving: Any, frozen: Any, fixed: Any, slope: jax.Array) -> jax.Array:
        return jnp.sum(forward(trainable, frozen, moving, fixed) * slope, dtype=jnp.float32)

    def gradients(trainable: Any, *rest: Any) -> Any:
        # with the value, without which no forward pass would be needed where the backward pass repeats it
        return jax.value_and_grad(loss, (0, 1))(rounded(trainable, compute.dtype), *rest)

    once = partial(_compiled(forward, compute), trainable, frozen, moving, fixed)
    seconds: dict[str, float | None] = {"forward": _median(once, repeats), "both": None}
    if program.backward:
        out = jax.eval_shape(once)
        slope = _normal(*out.shape, dtype=out.dtype)
        both = partial(_compiled(gradients, compute), trainable, moving, frozen, fixed, slope)
        seconds["both"] = _median(both, repeats)
    return seconds


def _only(tree: Any, prefixes: tuple[str, ...]) -> Any:
    """Without the other parameters, whose gradients, all zero, a program would have to write."""
    return nn_params.map_named(lambda name, leaf: leaf if name.startswith(prefixes) else None, tree)


def _median(run: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(run())  # compiles
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _row(name: str, part: Part, seconds: dict[str, float | None]) -> dict[str, Any]:
    return {
        "part": name,
        "flops": {each: getattr(part, each).flops for each in PASSES},
        "bytes": {each: getattr(part, each).bytes for each in PASSES},
        "seconds": seconds,
    }


def with_bounds(parts: Sequence[dict[str, Any]], step: float, peak: float, bandwidth: float) -> list[dict[str, Any]]:
    """The parts with, for each pass, the roofline's seconds and which of the two speeds bounds it, and the share of
    the `step`'s seconds that the step's pass takes; then their sum and the step itself."""
    rows = [_bounded(row, peak, bandwidth) for row in parts]
    counted = {name: sum(_counted(row, name) for row in rows) for name in ("flops", "bytes", "seconds", "roofline")}
    whole = {**counted, "seconds": step}
    sums = [{"part": name, **total, "bound": None} for name, total in ((SUM, counted), (STEP, whole))]
    return [{**row, "share": _counted(row, "seconds") / step} for row in (*rows, *sums)]


def _bounded(row: dict[str, Any], peak: float, bandwidth: float) -> dict[str, Any]:
    times = {each: (row["flops"][each] / peak, row["bytes"][each] / bandwidth) for each in PASSES}
    return {
        **row,
        "roofline": {each: max(pair) for each, pair in times.items()},
        "bound": {each: "compute" if pair[0] >= pair[1] else "memory" for each, pair in times.items()},
    }


def _counted(row: dict[str, Any], name: str) -> float:
    """What the step has of it: with gradients where it takes them."""
    value = row[name]
    if not isinstance(value, dict):
        return value
    return value["forward" if row["seconds"]["both"] is None else "both"]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """`with_bounds` as lines."""
    lines = [f"  {'':22}{'':13}{'GFLOP':>10}{'GB':>8}{'roofline':>20}{'measured':>12}{'of the step':>13}"]
    for row in rows:
        passes = [each for each in PASSES if row["seconds"][each] is not None] if row["bound"] else [None]
        lines += [_table_line(row, each, share=each == passes[-1]) for each in passes]
    return lines


def _table_line(row: dict[str, Any], each: str | None, *, share: bool) -> str:
    flops, moved, roofline, seconds = (
        row[name][each] if each else row[name] for name in ("flops", "bytes", "roofline", "seconds")
    )
    bound = f"{row['bound'][each]} " if each else ""
    label = {"forward": "forward", "both": "and backward", None: ""}[each]
    name = row["part"] if each in (None, "forward") else ""
    return (
        f"  {name:22}{label:13}{flops / 1e9:10,.1f}{moved / 1e9:8.2f}{bound + f'{1e3 * roofline:,.1f} ms':>20}"
        f"{1e3 * seconds:9,.1f} ms" + (f"{row['share']:12.0%}" if share else "")
    )

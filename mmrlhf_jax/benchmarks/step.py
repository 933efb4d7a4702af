"""The gradient step of DPO over all pairs of one group, against the same preferences one by one: as our own separate
pairs, or as TRL's DPOTrainer takes them.

Same weights, same tokens, online reference on both sides (under LoRA the policy without its adapters); interleaved
repeats, medians, ratios of neighbouring repeats. Both sides must find the same loss and gradient, or their times mean
nothing.

A step's seconds are from batches on the device to gradients on the device. Its data wait is told beside them: the
seconds, on one thread of this host, to make those batches from rendered groups (token ids, u8 tiles, taps) and move
them to the device; ours packs rows of a bucket, TRL's side pads pairs and normalises pixels, as its collator does for
every row. Decoding and tiling pictures and tokenizing count for neither (benchmark.py data), nor does the overlap with
the previous step that both trainers seek: it is the wait where nothing overlaps.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax

from mmrlhf_jax.benchmarks.machine import busy, machine
from mmrlhf_jax.benchmarks.models import Shape, shape_config, write_models
from mmrlhf_jax.benchmarks.ops import table, with_bounds
from mmrlhf_jax.benchmarks.sides import Form, Measured, Settings, Side
from mmrlhf_jax.benchmarks.workload import ANSWERS, PICTURES, Case, mix_cases, ranked_case
from mmrlhf_jax.command import CommandError, UsageError, progress_line
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.cost import group_flops, pairs_flops
from mmrlhf_jax.nn.attention import Backend
from mmrlhf_jax.nn.remat import RematRung
from mmrlhf_jax.training.recipe import ComputeConfig

_FORMS: dict[str, Form] = {"pairs": "pairs", "trl": "trl", "trl-default": "trl default"}
MOST_OF_MIX = len(ANSWERS) // len(PICTURES)  # its groups are drawn once each


@dataclass(frozen=True)
class StepCompute:
    """How both sides compute (dtype), and how ours does."""

    dtype: Literal["bfloat16", "float32"] | None = None
    """default: float32 on CPUs, bfloat16 elsewhere; parameters that train are fp32 whatever this says"""
    attention: Backend = "auto"
    remat: RematRung | None = None
    """default: none, and full for 7b"""
    vocab_chunk: int = 8192


@dataclass(frozen=True)
class Step:
    """One group step against the same preferences as separate pairs."""

    against: Literal["pairs", "trl", "trl-default"] = "pairs"
    """pairs: our own code, every pair as two full sequences; trl: TRL 1.16 at its fastest, nothing recomputed;
    trl-default: with gradient checkpointing, as it comes. Both need the parity extra"""
    shape: Shape = "pinned"
    """pinned: a small model for CPUs; 0.5b and 7b: LLaVA-OneVision's own sizes, random weights. Both sides must fit the
    device together: 7b needs --lora-rank on one of 80 GB"""
    lora_rank: int = 0
    """both sides train LoRA adapters of this rank on the kernels of decoder and projector, from the same random values,
    over a base in the compute dtype; 0: the parameters themselves"""
    responses: tuple[int, ...] = (2, 4)
    """the K to time, all pairs of K strictly ranked answers each; none to leave these cases out"""
    prompt: int = 1300
    """prompt tokens, those of the picture included"""
    response: int = 64
    """tokens of each answer"""
    picture: tuple[int, int] = (384, 200)
    """width and height in pixels; this one is two tiles, 1,149 tokens"""
    mix: int = 0
    """also time this many of MM-RLHF's groups for each of four sizes of picture, and their weighted mean"""
    mix_pairs: int = 0
    """of each group of the mix, time only so many pairs on the other side and count them for all by their FLOPs; 0 =
    every pair"""
    scaling: bool = False
    """also time growing answers and growing micro-batches of our side, and fit lines through them"""
    ops: bool = False
    """also time the parts of our step one by one, beside their FLOPs, bytes and what the machine's speeds allow"""
    repeats: int = 5
    decoder_layers: int | None = None
    """of the pinned shape, as the next three: 8 if not given"""
    embed: int | None = None
    """512 if not given"""
    vocab: int | None = None
    """32000 if not given"""
    tower_layers: int | None = None
    """6 if not given"""
    pairs_at_once: int = 1
    """pairs TRL forwards in one batch"""
    compute: StepCompute = field(default_factory=StepCompute)
    output: str | None = None
    """a JSON file for the figures"""


@dataclass(frozen=True)
class Bench:
    """What every case of one run shares: the sides are loaded. `rate` FLOP/s, `bandwidth` bytes a second."""

    command: Step
    config: LlavaOnevisionConfig
    compute: ComputeConfig
    ours: Side
    other: Side
    device: tuple[str, str]
    rate: float
    bandwidth: float


def time_step(command: Step) -> None:
    """Prints a line a case. Raises UsageError for a case that cannot be made, CommandError for a side that fails or
    computes something else."""
    _check(command)
    names = ("decoder_layers", "embed", "vocab", "tower_layers")
    config = shape_config(command.shape, {name: getattr(command, name) for name in names})
    try:
        cases = [ranked_case(k, command.prompt, command.response, command.picture, config) for k in command.responses]
    except ValueError as error:
        raise UsageError(f"--prompt {command.prompt}: {error}") from error
    mixed = mix_cases(command.mix) if command.mix else []
    jax.config.update("jax_platforms", "cpu")  # this process only writes the models; the sides have the accelerator
    with tempfile.TemporaryDirectory() as work, _bench(command, config, Path(work)) as bench:
        _say_what_runs(bench)
        rows = [_time_case(bench, case, case.pairs) for case in cases]
        shown = [_time_case(bench, case, _some(case, command.mix_pairs)) for case in mixed]
        mean = _mean_of_mix(mixed, shown) if mixed else None
        lines = _scaling(command, config, bench.ours) if command.scaling else []
    if command.output:
        figures = {
            "command": dataclasses.asdict(command),
            "compute": dataclasses.asdict(bench.compute),
            "machine": {**machine(), "platform": bench.device[0], "device": bench.device[1]},
            "matrix_rate": bench.rate,
            "bandwidth": bench.bandwidth,
            "rows": rows,
            "mix_rows": shown,
            "scaling": lines,
        }
        Path(command.output).write_text(json.dumps({**figures, "mix": mean}, indent=2) + "\n")


def _check(command: Step) -> None:
    if command.repeats < 1 or command.pairs_at_once < 1 or not 0 <= command.mix <= MOST_OF_MIX or command.mix_pairs < 0:
        raise UsageError(
            f"--repeats and --pairs-at-once are at least 1, --mix is 0 to {MOST_OF_MIX}, --mix-pairs is not negative"
        )
    if wrong := [k for k in command.responses if k < 2]:
        raise UsageError(f"--responses {wrong[0]}: preferences are between at least 2 responses")
    if command.lora_rank < 0:
        raise UsageError(f"--lora-rank {command.lora_rank}: a rank is positive; 0 is no adapters")
    needed = ["trl", "torch", *(["peft"] if command.lora_rank else [])]
    if command.against != "pairs" and not all(importlib.util.find_spec(name) for name in needed):
        raise CommandError("the other side is TRL, which is not installed: pip install 'mmrlhf-jax[parity]'")


@contextmanager
def _bench(command: Step, config: LlavaOnevisionConfig, work: Path) -> Iterator[Bench]:
    sides = ours, other = Side("group"), Side(_FORMS[command.against])
    try:
        device, theirs = ours.device(), other.device()
        if device[0] != theirs[0]:
            raise CommandError(
                f"jax computes on {device[0]}, {command.against} on {theirs[0]}: two devices cannot be compared; "
                "install both for one, or hide it (JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES=)"
            )
        compute = _compute(command, device[0])
        rate, bandwidth = ours.speeds(compute.dtype)  # before the models take memory
        models = write_models(config, work, compute.dtype, command.lora_rank)
        for side in sides:
            side.load(Settings(models, command.lora_rank, compute, 0.1, command.pairs_at_once))
        yield Bench(command, config, compute, ours, other, device, rate, bandwidth)
    finally:
        for side in sides:
            side.close()


def _compute(command: Step, platform: str) -> ComputeConfig:
    """What is not given: what trains there fastest, within the memory of one device."""
    asked = command.compute
    return ComputeConfig(
        dtype=asked.dtype or ("float32" if platform == "cpu" else "bfloat16"),
        attention=asked.attention,
        remat=asked.remat or ("full" if command.shape == "7b" else "none"),
        vocab_chunk=asked.vocab_chunk,
    )


def _say_what_runs(bench: Bench) -> None:
    command, d, t, on = bench.command, bench.config.decoder, bench.config.tower, machine()
    trained = f"LoRA of rank {command.lora_rank}, adapters off as" if command.lora_rank else "online"
    accelerator = "" if bench.device[0] == "cpu" else f"{bench.device[1]}, "
    print(
        f"{accelerator}{on['processor']}, {on['cores']} cores, jax {on['jax']}, matrix products at "
        f"{bench.rate / 1e9:,.0f} GFLOP/s, memory at {bench.bandwidth / 1e9:,.0f} GB/s; {command.shape}: "
        f"decoder {d.layers} x {d.embed}, vocabulary {d.vocab}, frozen tower {t.layers} x {t.embed}, "
        f"{bench.compute.dtype}, remat {bench.compute.remat}, {trained} reference; against {command.against}, "
        f"medians of {command.repeats}",
        flush=True,
    )
    if note := busy():
        print(note, flush=True)


def _some(case: Case, count: int) -> tuple[tuple[int, int], ...]:
    """`count` of the case's pairs, evenly chosen from shortest to longest."""
    if not count or count >= len(case.pairs):
        return case.pairs
    by_length = sorted(case.pairs, key=lambda pair: max(case.responses[k] for k in pair))
    return tuple(by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count))


def _time_case(bench: Bench, case: Case, timed: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    command, ours, other, shape = bench.command, bench.ours, bench.other, case.shape(bench.config)
    first = {side.form: side.prepare(case, pairs) for side, pairs in ((ours, case.pairs), (other, timed))}
    steps: dict[str, list[Measured]] = {ours.form: [], other.form: []}
    turns = [side for _ in range(command.repeats) for side in (ours, other)]
    for side in progress_line(turns, desc=f"K={len(case.responses)}, steps of both sides", unit="step", leave=False):
        steps[side.form].append(side.step())
    mine, theirs = steps[ours.form], steps[other.form]
    if timed == case.pairs:
        _check_same(case, mine[0], theirs[0], bench.compute.dtype)
    trains = command.lora_rank == 0
    # TRL 1.16 computes logits of prompts and drops them, but not where it has Triton
    everywhere = command.against != "pairs" and bench.device[0] == "cpu"
    whole, part = (
        pairs_flops(bench.config, shape, pairs, decoder=trains, every_position=everywhere).total
        for pairs in (case.pairs, timed)
    )
    counted = whole / part
    useful = group_flops(bench.config, shape, decoder=trains, reference=True)
    ratios = [counted * b.seconds / a.seconds for a, b in zip(mine, theirs, strict=True)]
    seconds: dict[str, float] = {ours.form: _median(mine), other.form: counted * _median(theirs)}
    waits: dict[str, float] = {f: statistics.median(m.data_seconds for m in taken) for f, taken in steps.items()}
    waits[other.form] *= len(case.pairs) / len(timed)
    row: dict[str, Any] = {
        "case": case.name,
        "K": len(case.responses),
        "pairs": len(case.pairs),
        "pairs_timed": len(timed),
        "prompt": shape.prompt,
        "response_tokens": sum(shape.responses),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_range": (min(ratios), max(ratios)),
        "flops_ratio": whole / useful.total,
        "pairs_per_second": {form: len(case.pairs) / s for form, s in seconds.items()},
        "tokens_per_second": (shape.prompt + sum(shape.responses)) / seconds[ours.form],
        "mfu": {form: useful.total / s / bench.rate for form, s in seconds.items()},
        "data_wait_seconds": waits,
        "data_wait_share": {form: wait / (wait + seconds[form]) for form, wait in waits.items()},
        "peak_bytes": {form: max(m.peak_bytes for m in taken) for form, taken in steps.items()},
        "first_step_seconds": first,
        "loss": {form: taken[0].loss for form, taken in steps.items()},
        "gradient_norm": {form: taken[0].gradient_norm for form, taken in steps.items()},
    }
    print(_line(row, ours.form, other.form), flush=True)
    if command.ops:
        parts = with_bounds(ours.parts(command.repeats), seconds[ours.form], bench.rate, bench.bandwidth)
        print("\n".join(table(parts)), flush=True)
        row["parts"] = parts
    return row


def _check_same(case: Case, mine: Measured, theirs: Measured, dtype: str) -> None:
    room = 1e-3 if dtype == "float32" else 0.05
    for name in ("loss", "gradient_norm"):
        a, b = getattr(mine, name), getattr(theirs, name)
        if not math.isclose(a, b, rel_tol=room):
            raise CommandError(f"{case.name}: the sides compute different things, {name} {a} and {b}")


def _median(steps: Iterable[Measured]) -> float:
    return statistics.median(step.seconds for step in steps)


def _line(row: dict[str, Any], ours: str, other: str) -> str:
    seconds, peak, low_high, waits = row["seconds"], row["peak_bytes"], row["ratio_range"], row["data_wait_share"]
    spread = f"{low_high[0]:.2f} to {low_high[1]:.2f}, " if low_high[0] < low_high[1] else ""
    some = "" if row["pairs_timed"] == row["pairs"] else f" ({row['pairs_timed']} timed)"
    return (
        f"K={row['K']}, {row['pairs']} pairs{some}, picture {row['case']}, prompt {row['prompt']}: {ours} "
        f"{seconds[ours]:.2f} s ({row['pairs_per_second'][ours]:.2f} pairs/s, "
        f"{row['mfu'][ours]:.0%} MFU, {peak[ours] / 2**30:.2f} GiB, data wait {waits[ours]:.1%}), {other} "
        f"{seconds[other]:.2f} s ({row['pairs_per_second'][other]:.2f} pairs/s, {peak[other] / 2**30:.2f} GiB, data "
        f"wait {waits[other]:.1%}): {row['ratio']:.2f}x "
        f"({spread}by FLOPs {row['flops_ratio']:.2f}x); first step "
        f"{row['first_step_seconds'][ours]:.0f} s"
    )


def _mean_of_mix(cases: list[Case], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds a prompt of the mix takes, its pairs a second, and their ratio."""
    forms = list(rows[0]["seconds"])
    seconds = {
        form: sum(case.share * row["seconds"][form] for case, row in zip(cases, rows, strict=True)) for form in forms
    }
    pairs = sum(case.share * len(case.pairs) for case in cases)
    ratio = seconds[forms[1]] / seconds[forms[0]]
    print(
        f"the mix: {pairs:.2f} pairs a prompt, {forms[0]} {seconds[forms[0]]:.2f} s, {forms[1]} "
        f"{seconds[forms[1]]:.2f} s a prompt: {ratio:.2f}x",
        flush=True,
    )
    return {"seconds": seconds, "pairs": pairs, "ratio": ratio}


def _scaling(command: Step, config: LlavaOnevisionConfig, ours: Side) -> list[dict[str, Any]]:
    """Seconds of our step over the length of four answers, and over the groups of a micro-batch."""
    one = ranked_case(4, command.prompt, command.response, command.picture, config)
    lengths = [command.response * n for n in (1, 2, 4, 8)]
    return [
        _line_through(
            command,
            ours,
            "response tokens",
            [4 * length for length in lengths],
            [dataclasses.replace(one, responses=(length,) * 4) for length in lengths],
        ),
        _line_through(
            command, ours, "groups", [1, 2, 3, 4], [dataclasses.replace(one, groups=n) for n in (1, 2, 3, 4)]
        ),
    ]


def _line_through(command: Step, ours: Side, what: str, amounts: list[int], cases: list[Case]) -> dict[str, Any]:
    """The least-squares line seconds = base + slope x amount, and the share of the spread it explains."""
    seconds = []
    for case in cases:
        ours.prepare(case, case.pairs)
        seconds.append(_median([ours.step() for _ in range(command.repeats)]))
    slope, base = statistics.linear_regression(amounts, seconds)
    explained = statistics.correlation(amounts, seconds) ** 2
    points = ", ".join(f"{amount}: {s:.2f} s" for amount, s in zip(amounts, seconds, strict=True))
    print(
        f"by {what} ({points}): {base:.2f} s + {1000 * slope:.3g} ms x {what}, R^2 {explained:.4f}",
        flush=True,
    )
    return {"over": what, "amounts": amounts, "seconds": seconds, "slope": slope, "base": base, "r2": explained}

"""The gradient step of DPO over all pairs of one group, against the same preferences one by one: as our own separate
pairs, or as TRL's DPOTrainer takes them.

Same weights, same tokens, online reference on both sides; interleaved repeats, medians, ratios of neighbouring repeats.
Both sides must find the same loss and gradient, or their times mean nothing.
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

from mmrlhf_jax.benchmarks.machine import machine
from mmrlhf_jax.benchmarks.sides import Form, Measured, Settings, Side
from mmrlhf_jax.benchmarks.workload import ANSWERS, PICTURES, Case, mix_cases, model_config, ranked_case
from mmrlhf_jax.command import CommandError, UsageError
from mmrlhf_jax.models.llava_onevision import fresh
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.cost import group_flops, pairs_flops
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.models.llava_onevision.weights import save_directory
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.recipe import ComputeConfig

_FORMS: dict[str, Form] = {"pairs": "pairs", "trl": "trl", "trl-default": "trl default"}
MOST_OF_MIX = len(ANSWERS) // len(PICTURES)  # its groups are drawn once each


@dataclass(frozen=True)
class Step:
    """One group step against the same preferences as separate pairs."""

    against: Literal["pairs", "trl", "trl-default"] = "pairs"
    """pairs: our own code, every pair as two full sequences; trl: TRL 1.16 at its fastest, nothing recomputed;
    trl-default: with gradient checkpointing, as it comes. Both need the parity extra"""
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
    repeats: int = 5
    decoder_layers: int = 8
    embed: int = 512
    vocab: int = 32000
    tower_layers: int = 6
    pairs_at_once: int = 1
    """pairs TRL forwards in one batch"""
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig(dtype="float32", remat="none"))
    output: str | None = None
    """a JSON file for the figures"""


def time_step(command: Step) -> None:
    """Prints a line a case. Raises UsageError for a case that cannot be made, CommandError for a side that fails or
    computes something else."""
    if command.repeats < 1 or command.pairs_at_once < 1 or not 0 <= command.mix <= MOST_OF_MIX or command.mix_pairs < 0:
        raise UsageError(
            f"--repeats and --pairs-at-once are at least 1, --mix is 0 to {MOST_OF_MIX}, --mix-pairs is not negative"
        )
    if command.against != "pairs" and not (importlib.util.find_spec("trl") and importlib.util.find_spec("torch")):
        raise CommandError("the other side is TRL, which is not installed: pip install 'mmrlhf-jax[parity]'")
    config = model_config(command.decoder_layers, command.embed, command.vocab, command.tower_layers)
    config = dataclasses.replace(config, image_token=command.vocab - 2, video_token=command.vocab - 1)
    try:
        cases = [ranked_case(k, command.prompt, command.response, command.picture, config) for k in command.responses]
    except ValueError as error:
        raise UsageError(f"--prompt {command.prompt}: {error}") from error
    mixed = mix_cases(command.mix) if command.mix else []
    jax.config.update("jax_platforms", "cpu")  # this process only writes the models; the sides have the accelerator
    with tempfile.TemporaryDirectory() as work, _sides(command, config, Path(work)) as (ours, other):
        rate = ours.matrix_rate()
        _say_what_runs(command, config, rate)
        rows = [_time_case(command, config, case, ours, other, rate, case.pairs) for case in cases]
        shown = [_time_case(command, config, case, ours, other, rate, _some(case, command.mix_pairs)) for case in mixed]
        mean = _mean_of_mix(mixed, shown) if mixed else None
        lines = _scaling(command, config, ours) if command.scaling else []
    if command.output:
        figures = {
            "command": dataclasses.asdict(command),
            "machine": machine(),
            "matrix_rate": rate,
            "rows": rows,
            "mix_rows": shown,
            "scaling": lines,
        }
        Path(command.output).write_text(json.dumps({**figures, "mix": mean}, indent=2) + "\n")


def write_models(config: LlavaOnevisionConfig, work: Path) -> tuple[str, str]:
    """Two random models of one shape, a policy and a reference, in the llava-hf layout: their directories."""
    assets = work / "assets"
    fresh.write_fresh_files(str(assets), config)
    # the tokenizer of 261 tokens is only there to be loaded: prompts are drawn as ids from the whole vocabulary
    (assets / "config.json").write_text(json.dumps(fresh.hf_config(config)))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    for seed, name in enumerate(("policy", "reference")):
        save_directory(nn_params.initialise(declare(config), seed, mesh, ShardingRules()), assets, work / name)
    return str(work / "policy"), str(work / "reference")


@contextmanager
def _sides(command: Step, config: LlavaOnevisionConfig, work: Path) -> Iterator[tuple[Side, Side]]:
    policy, reference = write_models(config, work)
    settings = Settings(policy, reference, command.compute, 0.1, command.pairs_at_once)
    sides = [Side(form, settings) for form in ("group", _FORMS[command.against])]
    try:
        yield sides[0], sides[1]
    finally:
        for side in sides:
            side.close()


def _say_what_runs(command: Step, config: LlavaOnevisionConfig, rate: float) -> None:
    d, t, on = config.decoder, config.tower, machine()
    print(
        f"{on['processor']}, {on['cores']} cores, jax {on['jax']}, matrix products at {rate / 1e9:,.0f} GFLOP/s; "
        f"decoder {d.layers} x {d.embed}, vocabulary {d.vocab}, frozen tower {t.layers} x {t.embed}, "
        f"{command.compute.dtype}, remat {command.compute.remat}, online reference; against {command.against}, "
        f"medians of {command.repeats}",
        flush=True,
    )


def _some(case: Case, count: int) -> tuple[tuple[int, int], ...]:
    """`count` of the case's pairs, evenly chosen from shortest to longest."""
    if not count or count >= len(case.pairs):
        return case.pairs
    by_length = sorted(case.pairs, key=lambda pair: max(case.responses[k] for k in pair))
    return tuple(by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count))


def _time_case(
    command: Step,
    config: LlavaOnevisionConfig,
    case: Case,
    ours: Side,
    other: Side,
    rate: float,
    timed: tuple[tuple[int, int], ...],
) -> dict[str, Any]:
    shape = case.shape(config)
    first = {side.form: side.prepare(case, pairs) for side, pairs in ((ours, case.pairs), (other, timed))}
    steps: dict[str, list[Measured]] = {ours.form: [], other.form: []}
    for _ in range(command.repeats):
        for side in (ours, other):
            steps[side.form].append(side.step())
    mine, theirs = steps[ours.form], steps[other.form]
    if timed == case.pairs:
        _check_same(case, mine[0], theirs[0], command.compute.dtype)
    everywhere = command.against != "pairs"  # TRL 1.16 computes logits of prompts and drops them
    whole, part = (pairs_flops(config, shape, pairs, every_position=everywhere).total for pairs in (case.pairs, timed))
    counted = whole / part
    useful = group_flops(config, shape, reference=True)
    ratios = [counted * b.seconds / a.seconds for a, b in zip(mine, theirs, strict=True)]
    seconds = {ours.form: _median(mine), other.form: counted * _median(theirs)}
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
        "mfu": {form: useful.total / s / rate for form, s in seconds.items()},
        "peak_bytes": {form: max(m.peak_bytes for m in taken) for form, taken in steps.items()},
        "first_step_seconds": first,
        "loss": {form: taken[0].loss for form, taken in steps.items()},
        "gradient_norm": {form: taken[0].gradient_norm for form, taken in steps.items()},
    }
    print(_line(row, ours.form, other.form), flush=True)
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
    seconds, peak, low_high = row["seconds"], row["peak_bytes"], row["ratio_range"]
    some = "" if row["pairs_timed"] == row["pairs"] else f" ({row['pairs_timed']} timed)"
    return (
        f"K={row['K']}, {row['pairs']} pairs{some}, picture {row['case']}, prompt {row['prompt']}: {ours} "
        f"{seconds[ours]:.2f} s ({row['pairs_per_second'][ours]:.2f} pairs/s, "
        f"{row['mfu'][ours]:.0%} MFU, {peak[ours] / 2**30:.2f} GiB), {other} {seconds[other]:.2f} s "
        f"({row['pairs_per_second'][other]:.2f} pairs/s, {peak[other] / 2**30:.2f} GiB): {row['ratio']:.2f}x "
        f"({low_high[0]:.2f} to {low_high[1]:.2f}), by FLOPs {row['flops_ratio']:.2f}x; first step "
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

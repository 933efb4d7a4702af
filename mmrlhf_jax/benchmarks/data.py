"""Pictures a second of the host's side of training: read a record, decode, cut any-res tiles, tokenize, pack.

It is the pipeline of training, as training/train.py walks it, with nothing behind it that would make it wait: a
dataset prepared from generated photographs, `measure_data`, `plan_data`, `micro_batches`. Two views: the rate by number
of worker processes, and what each part of it costs in one process, where nothing runs beside it.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrlhf_jax.batch import EMPTY, pack
from mmrlhf_jax.benchmarks.machine import machine
from mmrlhf_jax.benchmarks.photos import TEXT, prepare_photos
from mmrlhf_jax.command import UsageError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.media import decode
from mmrlhf_jax.data.pipeline import micro_batches
from mmrlhf_jax.data.plan import MicroBatch
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.fresh import write_fresh_files
from mmrlhf_jax.models.llava_onevision.layout import image_layout
from mmrlhf_jax.models.llava_onevision.render import LlavaOnevisionRenderer, load_renderer
from mmrlhf_jax.models.llava_onevision.tiles import image_tiles
from mmrlhf_jax.nn.sharding import BatchShare
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.data import RunData, measure_data, plan_data
from mmrlhf_jax.training.recipe import DataConfig, Recipe

PARTS = ("read", "decode", "tiles", "tokenize", "taps", "pack")
_MOST_A_SECOND = 500  # pictures of one worker: how long a plan is made, so that it does not run out
_QUIET = 0.1  # cores that other work may keep busy before a figure has to say so
_WARM_UP = 3  # micro-batches of each worker that are not counted


@dataclass(frozen=True)
class Data:
    """Pictures a second from a prepared dataset to packed micro-batches, by number of worker processes, and where the
    time goes."""

    workers: tuple[int, ...] = (0, 1, 2)
    """worker processes to time, as in data.workers of a recipe; 0 = two threads of this one"""
    pictures: int = 64
    """different ones; each is seen many times"""
    size: tuple[int, int] = (640, 480)
    """width and height"""
    responses: int = 4
    """answers of each picture's group"""
    words: int = 100
    """of each answer"""
    seconds: float = 5.0
    """each measurement takes"""
    repeats: int = 5
    model: str | None = None
    """a Hugging Face directory whose geometry and tokenizer are used; by default LLaVA-OneVision's (384-pixel tiles, 36
    canvases) with a tokenizer of 1,024 tokens"""
    output: str | None = None
    """a JSON file for the figures"""


@dataclass(frozen=True)
class Rate:
    """One measurement: pictures in so many seconds, the processor time all our processes together took for them, and
    how many cores other work kept busy meanwhile (both None where the system does not say)."""

    pictures: int
    seconds: float
    processor_seconds: float | None
    others: float | None = None


def time_data(command: Data) -> None:
    """Prints what each part costs and the rates. Raises UsageError for a command that would measure nothing."""
    if not command.workers or min(command.workers) < 0:
        raise UsageError("--workers are numbers from 0 on, one at least")
    if min(command.pictures, command.words, command.repeats, *command.size, command.responses - 1) < 1:
        raise UsageError("--pictures, --size, --words and --repeats are at least 1, --responses at least 2: a pair")
    with tempfile.TemporaryDirectory(prefix="mmrlhf-benchmark-") as folder:
        data, renderer = set_up(command, Path(folder))
        parts = time_parts(data, renderer, command.repeats)
        head = _head(command, data, parts, renderer)
        print("\n".join(_head_lines(head)), flush=True)
        rates: dict[int, list[Rate]] = {workers: [] for workers in command.workers}
        for _ in range(command.repeats):
            for workers, found in rates.items():
                found.append(measure_rate(data, workers, command.seconds))
    rows = _rows(rates)
    print("\n".join(map(_line, rows)))
    if command.output:
        figures = {"command": dataclasses.asdict(command), "machine": machine(), **head, "rates": rows}
        Path(command.output).write_text(json.dumps(figures, indent=2) + "\n")


def set_up(command: Data, folder: Path) -> tuple[RunData, LlavaOnevisionRenderer]:
    """A run's data as training plans it on one device, over photographs prepared in `folder`."""
    dataset = prepare_photos(
        folder, pictures=command.pictures, size=command.size, responses=command.responses, words=command.words
    )
    model = command.model
    if model is None:
        model = str(folder / "model")
        write_fresh_files(model, LlavaOnevisionConfig(), texts=[TEXT])
    renderer = load_renderer(model)
    busiest = max(1, *command.workers)
    epochs = 1 + _WARM_UP * busiest + _MOST_A_SECOND * command.seconds * busiest // command.pictures
    recipe = Recipe(objective=DPO(), dataset=dataset, data=DataConfig(groups_per_step=command.pictures, epochs=epochs))
    measured = measure_data(recipe, open_dataset(dataset), renderer)
    return plan_data(recipe, measured, renderer.config, BatchShare((0,), 1)), renderer


# --- the rate ------------------------------------------------------------------------------------------------------


def measure_rate(data: RunData, workers: int, seconds: float) -> Rate:
    """Takes micro-batches as fast as they come, for so many seconds once every worker has delivered some."""
    pictures, began, ended = 0, 0.0, 0.0
    with closing(micro_batches(data.plan, data.loader, workers=workers)) as batches:
        for _ in range(_WARM_UP * max(1, workers)):
            next(batches)
        processor, everyone = _processor_seconds(), _busy_seconds()
        began = ended = time.perf_counter()
        for _, batch in batches:
            pictures += int(np.count_nonzero(batch.row != EMPTY))  # one a group
            ended = time.perf_counter()
            if ended - began >= seconds:
                break
        after, everyone_after = _processor_seconds(), _busy_seconds()
    if processor is None or after is None or everyone is None or everyone_after is None:
        return Rate(pictures, ended - began, None)
    took = after - processor
    others = max(0.0, everyone_after - everyone - took) / (ended - began)
    return Rate(pictures, ended - began, took, others)


def _processor_seconds() -> float | None:
    """Of this process and its children so far."""
    stats = [Path(f"/proc/{process.pid}/stat") for process in multiprocessing.active_children()]
    if not Path("/proc/self/stat").exists():
        return None
    ticks = 0
    for stat in stats:
        fields = stat.read_text().rpartition(")")[2].split()  # the name before it may hold spaces
        ticks += int(fields[11]) + int(fields[12])  # utime, stime: fields 14 and 15 of proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _busy_seconds() -> float | None:
    """Of all cores, whoever keeps them busy: figures taken beside other work mean little, and should say so."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _rows(rates: dict[int, list[Rate]]) -> list[dict[str, Any]]:
    """Medians over the repeats; `scaling` is the rate of w workers over w times that of one."""
    each = {w: [rate.pictures / rate.seconds for rate in found] for w, found in rates.items()}
    rows = []
    for workers, found in rates.items():
        rate = statistics.median(each[workers])
        busy = [r.pictures / r.processor_seconds for r in found if r.processor_seconds]
        others = [r.others for r in found if r.others is not None]
        row = {
            "workers": workers,
            "pictures": [r.pictures for r in found],
            "pictures_per_second": rate,
            "range": (min(each[workers]), max(each[workers])),
            "per_worker": rate / max(1, workers),
            "per_core_second": statistics.median(busy) if busy else None,
            "others": statistics.median(others) if others else None,
            "scaling": rate / workers / statistics.median(each[1]) if workers and 1 in each else None,
        }
        rows.append(row)
    return rows


# --- its parts -----------------------------------------------------------------------------------------------------


def time_parts(data: RunData, renderer: LlavaOnevisionRenderer, repeats: int) -> dict[str, float]:
    """Seconds a picture of each of PARTS, and of a loader's whole call as `all`: medians, in this process alone.

    read: the record and its checksum; tiles: two resizings and the cut; tokenize: prompt and answers; taps: where the
    picture's tokens come from; pack: into the arrays of a micro-batch.
    """
    seconds: dict[str, list[float]] = {part: [] for part in (*PARTS, "all")}
    first = [micro for micro in data.plan.micro_batches if micro.step == 0]
    for _ in range(repeats):
        for micro in first:
            items = [item for item in micro.items if item != EMPTY]
            with _timed(seconds["all"], len(items)):
                data.loader(micro)
            for item in items:
                _time_rendering(data, renderer, data.items.items[item].row, seconds)
            _time_packing(data, renderer, micro, seconds["pack"])
    return {part: statistics.median(taken) for part, taken in seconds.items()}


def _time_rendering(data: RunData, renderer: LlavaOnevisionRenderer, row: int, seconds: dict[str, list[float]]) -> None:
    with _timed(seconds["read"]):
        group = data.loader.dataset.with_media(row)
    (media,) = group.media
    with _timed(seconds["decode"]):
        pixels = decode(media.encoded[0])
    with _timed(seconds["tiles"]):
        image_tiles(pixels, image_layout(*media.sizes[0], renderer.config), renderer.config)
    with _timed(seconds["tokenize"]):
        prompt = renderer.prompt_ids(group)
        for response in group.responses:
            renderer.response_ids(response.text)
    with _timed(seconds["taps"]):
        renderer.with_pictures(group, prompt)


def _time_packing(data: RunData, renderer: LlavaOnevisionRenderer, micro: MicroBatch, seconds: list[float]) -> None:
    loader = data.loader
    entries = [None if item == EMPTY else loader.entry(loader.items[item]) for item in micro.items]
    sizes: Any = {"tokens_per_tile": renderer.tokens_per_tile, "tile_size": renderer.tile_size}
    with _timed(seconds, sum(entry is not None for entry in entries)):
        pack(entries, loader.buckets[micro.bucket], micro.totals, responses=loader.responses, **sizes)


@contextmanager
def _timed(into: list[float], pictures: int = 1) -> Iterator[None]:
    began = time.perf_counter()
    yield
    into.append((time.perf_counter() - began) / pictures)


# --- what is said of it --------------------------------------------------------------------------------------------


def _head(command: Data, data: RunData, parts: dict[str, float], renderer: LlavaOnevisionRenderer) -> dict[str, Any]:
    groups = [data.loader.dataset.with_media(row) for row in range(command.pictures)]
    lengths = [renderer.measure(group) for group in groups]
    return {
        "picture": {
            "bytes": statistics.fmean(len(group.media[0].encoded[0]) for group in groups),
            "tiles": statistics.fmean(length.tiles for length in lengths),
            "prompt_tokens": statistics.fmean(length.prompt for length in lengths),
            "response_tokens": statistics.fmean(sum(length.responses) for length in lengths),
        },
        "buckets": [str(bucket) for bucket in data.buckets.buckets],
        "seconds_a_picture": parts,
    }


def _head_lines(head: dict[str, Any]) -> list[str]:
    picture, parts, here = head["picture"], head["seconds_a_picture"], machine()
    shares = ", ".join(f"{part} {1e3 * parts[part]:.2f}" for part in PARTS)
    rest = parts["all"] - sum(parts[part] for part in PARTS)
    return [
        f"{here['processor']}, {here['cores']} cores; JPEG files of {picture['bytes'] / 1e3:.0f} kB, "
        f"{picture['tiles']:.1f} tiles, {picture['prompt_tokens']:.0f} prompt and {picture['response_tokens']:.0f} "
        f"response tokens; micro-batches {', '.join(head['buckets'])}",
        f"one process, ms a picture: {shares}, rest {1e3 * rest:.2f}: {1e3 * parts['all']:.2f}, or "
        f"{1 / parts['all']:.1f} pictures/s",
    ]


def _line(row: dict[str, Any]) -> str:
    low, high = row["range"]
    busy = "" if row["per_core_second"] is None else f", {row['per_core_second']:.1f} a second of one core"
    scaling = "" if row["scaling"] is None else f", {row['scaling']:.2f} of linear"
    beside = "" if (row["others"] or 0) < _QUIET else f"; BESIDE OTHER WORK ON {row['others']:.1f} CORES"
    name = "threads  " if not row["workers"] else f"{row['workers']} workers"
    return (
        f"{name}: {row['pictures_per_second']:6.1f} pictures/s ({low:.1f} to {high:.1f}), "
        f"{row['per_worker']:.1f} a worker{busy}{scaling}{beside}"
    )

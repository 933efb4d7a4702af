"""The readers that take files of strangers, each as: valid files, a way to spoil them, what the reader makes of it.

`make` spoils (a pure function of the Random), `run` reads and names the outcomes; every exception that is not among
`refusals` is a crash. `run` also holds what must be true of whatever is accepted: all rows accounted for, texts that
can be written, nothing from outside the media root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import corpus
import mutate
import pixels
import prepared
import stored
from data_samples import WordCounter
from texts import (
    SOURCES,
    Made,
    Rows,
    check_group,
    classed,
    parquet_at,
    read_any,
    read_parquet,
    rows_at,
    rows_of_all,
    source,
    spoiled_any,
    spoiled_parquet,
    spoiled_rows,
)

from mmrlhf_jax.data import containers
from mmrlhf_jax.data.media import MediaError, MediaRoot
from mmrlhf_jax.data.mixture import MixtureError, open_mixture
from mmrlhf_jax.data.sources.rows import SourceError
from mmrlhf_jax.evaluation import comparisons, reward_bench, vl_reward_bench
from mmrlhf_jax.evaluation.comparisons import BenchmarkError, as_groups, lengths_of
from mmrlhf_jax.groups import Group, Turn
from mmrlhf_jax.inference import prompts


@dataclass(frozen=True)
class Reader:
    """`start(folder)` makes the state that `make(rng, state)` and `run(state, made)` share; `modules` are what it
    covers of its own, see `covered`."""

    name: str
    modules: tuple[str, ...]
    refusals: tuple[type[BaseException], ...]
    start: Callable[[Path], Any]
    make: Callable[[Random, Any], Made]
    run: Callable[[Any, Made], Iterable[str]]


def _run_prompts(state: Rows, made: Made) -> Iterable[str]:
    root = None if made["rng"] < 0.1 else str(state.root)
    read = prompts.read_prompts(made["file"], root, str(state.folder / "kept"), frames=2, workers=1)
    for row in read.rejected:
        yield f"rejected: {classed(row.reason)}"
    for index, group in enumerate(read.groups):
        check_group(group)
        assert all(corpus.SECRET not in each.sizes for each in group.media), "a picture from outside the media root"
        read.with_media(index)
        yield "accepted"
    read.fingerprint()


def _no_progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class Scored:
    """What a reward model says, without one."""

    score: tuple[float, ...]

    @property
    def critiques(self) -> tuple[tuple[str, ...], ...]:
        return (("",),) * len(self.score)

    @property
    def ended(self) -> list[list[bool]]:
        return [[False]] * len(self.score)


def _benchmark(module: Any) -> Callable[[Rows, Made], Iterable[str]]:
    def run(state: Rows, made: Made) -> Iterable[str]:
        rows = module.read(made["file"], state.store)
        groups, places = as_groups(rows, human=made["rng"] < 0.5)
        assert len(places) == len(rows)
        for group in groups:
            check_group(group)
        if made["rng"] < 0.2:
            comparisons.check_reasons(rows)
        comparisons.check_lengths(groups, WordCounter(), 5)  # type: ignore[arg-type]
        root = None if made["rng"] > 0.9 else MediaRoot(str(state.root))
        kept = MediaRoot(str(state.store.directory))
        filled = comparisons.with_pictures(groups, root, kept, workers=1, progress=_no_progress)
        assert all(corpus.SECRET not in each.sizes for group in filled for each in group.media), "left the media root"
        score = 1.0 if made["rng"] > 0.05 else float("nan")
        scored = [Scored(tuple(score / (1 + k) for k in range(len(g.responses)))) for g in groups]
        comparisons.cut_short(scored)
        comparisons.row_records(rows, places, scored)
        module.measure(rows, lengths_of(rows))
        module.chance(rows)
        module.remarks(rows)
        yield "accepted"

    return run


class _Part:
    """What a mixture asks of a dataset."""

    def __init__(self, path: str):
        self.path, self.fingerprint = path, path.rsplit("/", 1)[-1]
        if self.fingerprint not in ("vqa", "chat"):
            raise ValueError(f"{path} is not a prepared dataset")

    def __len__(self) -> int:
        return 6

    def group(self, row: int) -> Group:
        return Group(f"{'short' if row % 2 else 'long'}/{row}", (Turn("user", "q"),), (), (), (), ())

    def groups(self) -> Iterable[Group]:
        return map(self.group, range(6))


def _spoiled_mixture(rng: Random, state: Rows) -> Made:
    value = rng.choice(state.rows)
    if rng.random() < 0.9:
        value = mutate.mutated(rng, value, rng.choice((1, 1, 2)))
    data = mutate.offline(mutate.dumps(rng, value).encode("utf-8", "surrogatepass"))
    (state.folder / "mix.json").write_bytes(mutate.mutated_bytes(rng, data) if rng.random() < 0.1 else data)
    return {"file": str(state.folder / "mix.json")}


def _run_mixture(state: Rows, made: Made) -> Iterable[str]:
    mixed = open_mixture(made["file"], _Part)  # type: ignore[arg-type]
    assert len(list(mixed.groups())) == len(mixed)
    assert sum(len(rows) for _, rows in mixed.parts()) == len(mixed)
    mixed.group(0)
    yield "accepted"


ALL: tuple[Reader, ...] = (
    Reader("rows", ("data/sources/rows",), (SourceError,), rows_of_all, spoiled_any, read_any),
    *(
        Reader(
            name,
            modules,
            (SourceError,),
            rows_at(name),
            spoiled_rows,
            source(name, *options),
        )
        for name, modules, options in SOURCES
    ),
    Reader("parquet", ("data/sources/parquet",), (SourceError,), parquet_at, spoiled_parquet, read_parquet),
    Reader(
        "pictures",
        (f"data/media:{pixels.OF_BYTES}",),
        (MediaError,),
        pixels.picture_at,
        pixels.spoiled_picture,
        pixels.run_picture,
    ),
    Reader(
        "media",
        (f"data/media:{pixels.OF_PATHS}",),
        (MediaError,),
        pixels.media_at,
        pixels.spoiled_path,
        pixels.run_media,
    ),
    Reader(
        "video",
        ("data/video", "data/containers"),
        (containers.VideoError,),
        pixels.clips_at,
        pixels.spoiled_clip,
        pixels.run_clip,
    ),
    Reader(
        "prompts",
        ("inference/prompts", "data/sources/pictures:is_embedded"),
        (SourceError,),
        rows_at("prompts", True),
        spoiled_rows,
        _run_prompts,
    ),
    Reader(
        "reward_bench",
        ("evaluation/reward_bench", "evaluation/comparisons"),
        (SourceError, BenchmarkError),
        rows_at("reward_bench", True),
        spoiled_rows,
        _benchmark(reward_bench),
    ),
    Reader(
        "vl_reward_bench",
        ("evaluation/vl_reward_bench",),
        (SourceError, BenchmarkError),
        rows_at("vl_reward_bench", True),
        spoiled_rows,
        _benchmark(vl_reward_bench),
    ),
    Reader("mixture", ("data/mixture",), (MixtureError,), rows_at("mixture"), _spoiled_mixture, _run_mixture),
    *(Reader(*each) for each in stored.STORED),
    Reader(
        "dataset",
        ("data/dataset", "data/datasets", "data/report"),
        prepared.REFUSALS,
        prepared.dataset_at,
        prepared.spoiled_dataset,
        prepared.run_dataset,
    ),
    Reader(
        "prepare",
        ("data/prepare",),
        (SourceError, *prepared.REFUSALS),
        prepared.prepare_at,
        prepared.spoiled_prepare,
        prepared.run_prepare,
    ),
)

"""A prepared dataset, which may be downloaded too, and the preparation of one.

Names as in `readers`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import corpus
import mutate
from data_samples import WordCounter
from etils import epath
from stored import Made, Stored, spoiled_json
from texts import Rows, rows_at, spoiled_rows

from mmrlhf_jax.data.dataset import DatasetError, write_dataset
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.mixture import MixtureError
from mmrlhf_jax.data.prepare import PrepareError, PrepareOptions, prepare
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.groups import Group, Lengths

REFUSALS = (DatasetError, PrepareError, MixtureError)


@dataclass(frozen=True)
class Contents:
    """How a dataset was prepared, and what is in it: groups as JSON values and the pictures of each."""

    options: PrepareOptions
    groups: list[Any]
    pictures: list[list[bytes]]


@dataclass(frozen=True)
class Record:
    """A group as `write_dataset` takes it, whatever stands in it."""

    text: str
    pictures: list[bytes]

    def to_json(self) -> str:
        return self.text


def dataset_at(folder: Path) -> Stored:
    """Groups with pictures and without, measured, some rejected: everything that a report can say."""
    good = [row for row in corpus.text_rows()["mm_rlhf"] if row["id"] in ("q", "t", 7)]
    rows = [*good, {**good[0], "id": "long", "prompt": "w " * 40}, *({"id": str(n)} for n in range(21))]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PrepareOptions(
        source="mm_rlhf",
        inputs=(str(folder / "in.jsonl"),),
        output=str(folder / "data"),
        media=str(corpus.media_root(folder)),
        source_options=SourceOptions(margin_column="margin"),
        renderer=WordCounter(),  # type: ignore[arg-type]
        max_tokens=40,
        max_rejected=1.0,
        workers=1,
    )
    prepare(options)
    home = folder / "data"
    files = {path.name: path.read_bytes() for path in sorted(home.iterdir())}
    data = open_dataset(str(home))
    whole = [data.with_media(row) for row in range(len(data))]
    pictures = [[each for media in group.media for each in media.encoded] for group in whole]
    return Stored(home, files, Contents(options, [json.loads(group.to_json()) for group in whole], pictures))


def spoiled_dataset(rng: Random, state: Stored) -> Made:
    kind = rng.random()
    if kind < 0.03:
        return {"changed": rng.choice((dict.fromkeys(state.files), {rng.choice(list(state.files)): None}))}
    if kind < 0.06:
        return {"changed": {"": spoiled_json(rng, {"parts": [{"dataset": "whole", "weight": 1.5}]})}}
    if kind < 0.4:
        return {"changed": _other_records(rng, state)}
    name = rng.choice(list(state.files))
    data = state.files[name]
    if rng.random() < 0.3:
        return {"changed": {name: mutate.mutated_bytes(rng, data, list(state.files.values()))}}
    if name.endswith(".json"):
        return {"changed": {name: spoiled_json(rng, json.loads(data))}}
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in data.splitlines()]
        at = rng.randrange(len(rows))
        rows[at] = mutate.mutated(rng, rows[at], 1)
        return {"changed": {name: mutate.json_file(rng, rows)}}
    at = rng.randrange(len(data))
    return {"changed": {name: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]}}


def _other_records(rng: Random, state: Stored) -> dict[str, bytes | None]:
    """Other groups and pictures, in shards that are whole, as the project writes them."""
    groups, pictures = list(state.more.groups), [list(each) for each in state.more.pictures]
    at = rng.randrange(len(groups))
    kind = rng.randrange(8)
    if kind == 0:
        pictures[at] = rng.choice(([], pictures[at] * 2, [b""], [b"x"] * len(pictures[at]), pictures[at - 1]))
    elif kind == 1:
        groups, pictures = groups[:at] or groups, pictures[:at] or pictures
    else:
        groups[at] = mutate.mutated(rng, groups[at], rng.choice((1, 1, 1, 2)))
    texts = [mutate.dumps(rng, group).encode("utf-8", "replace").decode() for group in groups]
    records = [Record(text, own) for text, own in zip(texts, pictures, strict=True)]
    aside = state.folder.parent / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    made = write_dataset(
        epath.Path(aside),
        records,  # type: ignore[arg-type]
        [sum(map(len, own)) for own in pictures],
        lambda record: record.pictures,  # type: ignore[attr-defined]
        json.loads(state.files["metadata.json"]),
        1,
    )
    files: dict[str, bytes | None] = {path.name: path.read_bytes() for path in made.iterdir()}
    if rng.random() < 0.2:  # of one split only
        split = rng.choice(("groups", "media"))
        files = {name: data for name, data in files.items() if f"-{split}." in name}
    return files


def run_dataset(state: Stored, made: Made) -> Iterable[str]:
    whole = state.folder.parent / "whole"  # what a mixture may name
    if "" in made["changed"] and not whole.exists():
        state.put({})
        shutil.copytree(state.folder, whole)
    state.put(made["changed"])
    data = open_dataset(str(state.folder))
    groups = list(data.groups())
    assert sum(len(rows) for _, rows in data.parts()) == len(groups) == len(data)
    for row, group in enumerate(groups):
        check_stored(group)
        data.with_media(row)
    if state.folder.is_file():
        yield "a mixture"
        return
    yield from prepare(state.more.options).lines()[:1]


def check_stored(group: Group) -> None:
    """What every program relies on that reads a dataset."""
    texts = [group.id, *(turn.text for turn in group.prompt), *(each.path for each in group.media)]
    for text in [*texts, *(text for each in group.responses for text in (each.text, each.reason or ""))]:
        text.encode()
    assert sum(group.media_before()) == len(group.media), "media in no turn"
    assert all(isinstance(origin.line, int) and isinstance(origin.file, str) for origin in group.origins)
    assert Group.from_json(group.to_json()) == group
    for pair in group.pairs:
        group.margin(pair)
    group.content_hash(reasons=True)


class Refusing(WordCounter):
    """A renderer that some groups cannot be written with, and a model that takes little."""

    fingerprint = "refusing"
    max_positions = 12

    def measure(self, group: Group) -> Lengths:
        if any("<|" in turn.text for turn in group.prompt):
            raise ValueError("a special token in a text")
        return super().measure(group)


def prepare_at(folder: Path) -> Rows:
    state = rows_at("mm_rlhf", True)(folder)
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in state.rows[:3]))
    prepare(_options(state, str(folder / "good.jsonl"), str(folder / "other")))
    return state


_BEFORE = ("file", "folder", "refused", "uploading", "other")


def spoiled_prepare(rng: Random, state: Rows) -> Made:
    """Rows; what stands where the output is to be; what else the user may give."""
    made = spoiled_rows(rng, state)
    if rng.random() < 0.03:
        made["file"] = rng.choice((str(state.folder / "gone.jsonl"), str(state.folder)))
    return {
        **made,
        "before": rng.choice(_BEFORE) if rng.random() < 0.1 else None,
        "max_tokens": rng.choice((3, 12, 30)) if rng.random() < 0.2 else None,
        "renderer": rng.choice((None, WordCounter(), Refusing(), Refusing())) if rng.random() < 0.3 else WordCounter(),
        "media": rng.choice((None, str(state.folder / "nowhere"))) if rng.random() < 0.06 else str(state.root),
        "max_rejected": 1.0 if rng.random() < 0.9 else 0.3,
        "limit": 1 if rng.random() < 0.05 else None,
    }


def _options(state: Rows, file: str, output: str, **more: Any) -> PrepareOptions:
    given = {"media": str(state.root), "max_rejected": 1.0, **more}
    return PrepareOptions(source="mm_rlhf", inputs=(file,), output=output, workers=1, video_frames=2, **given)


def _put_before(state: Rows, output: Path, what: str | None) -> None:
    for place in (output, *state.folder.glob(".out.*")):
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
    if what == "file":
        output.write_text("mine")
    elif what == "other":
        shutil.copytree(state.folder / "other", output)
    elif what is not None:
        output.mkdir()
        name = {"folder": "mine.txt", "refused": "rejected.jsonl", "uploading": ".uploading"}[what]
        (output / name).write_text("{}\n")


def run_prepare(state: Rows, made: Made) -> Iterable[str]:
    """Everything that launch/prepare.py does, on rows about pictures, frames and clips."""
    output = state.folder / "out"
    _put_before(state, output, made["before"])
    asked = {name: made[name] for name in ("media", "max_rejected", "max_tokens", "renderer", "limit")}
    options = _options(state, made["file"], str(output), **asked)
    report = prepare(options)
    report.lines()
    if made["rng"] < 0.3:
        assert prepare(options).groups == report.groups
    data = open_dataset(str(output))
    assert len(data) == report.groups
    for row in range(len(data)):
        check_stored(data.group(row))
        sizes = [size for each in data.with_media(row).media for size in each.sizes]
        assert corpus.SECRET not in sizes, "a picture from outside the media root"
    yield f"prepared, {'some' if report.rejected else 'none'} rejected"

"""Readers of what our own programs store: a dataset, its annotations and an OUTPUT may be downloaded too.

Names as in `readers`.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import corpus
import mutate
import numpy as np
from data_samples import WordCounter
from etils import epath

from mmrlhf_jax.data.annotations import AnnotationError, AnnotationStore, find
from mmrlhf_jax.data.dataset import DatasetError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareError, PrepareOptions, prepare
from mmrlhf_jax.data.rewards import REWARD, GroupReward, content_of, made_by, read_rewards
from mmrlhf_jax.evaluation import results
from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.groups import Group, Response, Turn
from mmrlhf_jax.inference.answer_file import AnswerFile, AnswerFileError

Made = dict[str, Any]
KEY = {"critiques": "generated", "samples": 2, "sampling": {"temperature": 1.0}, "dtype": "float32", "model": "m" * 20}
SETTINGS = {"model": "m", "samples": 2, "sampling": {"temperature": 0.5}}


@dataclass
class Stored:
    """A folder that is made new for each execution, and its whole files by name."""

    folder: Path
    files: dict[str, bytes]
    more: Any = None

    def put(self, changed: dict[str, bytes]) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name, data in {**self.files, **changed}.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


@dataclass(frozen=True)
class Groups:
    """What annotations belong to."""

    path: str

    def __len__(self) -> int:
        return 4

    def groups(self) -> Iterator[Group]:
        for row in range(4):
            yield Group(str(row), (Turn("user", "q"),), (), (Response("a"), Response(f"b{row}", 1)), (), ())


def annotations_at(folder: Path) -> Stored:
    home = folder / "data"
    home.mkdir()
    groups = list(Groups("").groups())
    store = AnnotationStore.open(str(home), REWARD, KEY)
    reward = GroupReward(np.ones((2, 2), np.float32), (("good", "né"), ("", "x")), np.ones((2, 2), bool))
    for rows in ([0, 2], [3]):
        arrays = [reward.arrays() for _ in rows]
        hashes = [content_of(groups[row], "generated") for row in rows]
        store.write(rows, hashes, {name: [each[name] for each in arrays] for name in arrays[0]})
    (store.directory / "made_by.json").write_text(json.dumps({"model": "m", "command": "c"}))
    files = {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    return Stored(home, files)


def spoiled_annotations(rng: Random, state: Stored) -> Made:
    name = rng.choice(list(state.files))
    if name.endswith(".json"):
        data = spoiled_json(rng, json.loads(state.files[name]))
    elif rng.random() < 0.4:
        data = mutate.mutated_bytes(rng, state.files[name])
    else:
        data = _spoiled_npz(rng, state.files[name])
    return {"name": name, "changed": {name: data}}


def spoiled_json(rng: Random, value: Any) -> bytes:
    data = mutate.dumps(rng, mutate.mutated(rng, value, rng.choice((1, 1, 2, 3)))).encode("utf-8", "surrogatepass")
    return mutate.mutated_bytes(rng, data) if rng.random() < 0.2 else data


def _spoiled_npz(rng: Random, data: bytes) -> bytes:
    """The arrays changed and zipped again, so that the zip is whole and its contents lie."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    kind = rng.randrange(6)
    if kind == 0:
        members[name] = mutate.mutated_bytes(rng, members[name], list(members.values()))
    elif kind == 1:
        del members[name]
    elif kind == 2:
        members[rng.choice(list(members))] = members[name]
    elif kind == 3:
        members[name] = _npy_header(rng.choice(_HEADERS)) + bytes(rng.choice((0, 8, 64)))
    elif kind == 4:
        members[name] = _npy(rng.choice(_ARRAYS))
    else:
        members[f"{mutate.hostile_text(rng)[:100]}.npy"] = members[name]
    buffer = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name.replace("\0", "") or "x", member)
    return buffer.getvalue() if rng.random() < 0.7 else mutate.mutated_bytes(rng, buffer.getvalue())


_HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (300000000,), }",
    "__import__('os').system('true')",
    "{'descr': '<U1000000000', 'shape': (2,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4294967296), }",
    "(" * 200,
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }",
)
_ARRAYS = (
    np.zeros(()),
    np.zeros(0),
    np.arange(3),
    np.arange(2.5),
    np.array([0, 2]),
    np.array([-1, 2**62]),
    np.array(["a", "b"]),
    np.array([[1, 2]]),
    np.full(2, np.nan),
    np.zeros((2, 0)),
    np.array([3, 3], np.uint8),
    np.array([1 + 2j, 2]),
    np.array([b"x" * 32] * 2),
    np.zeros((2, 2, 2)),
    np.array([2**40, 2**40]),
    np.zeros(20_000_000, np.uint8),
    np.array(["2020-01-01"], "datetime64[D]"),
)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npy_header(text: str) -> bytes:
    return b"\x93NUMPY\1\0" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"


def run_annotations(state: Stored, made: Made) -> Iterable[str]:
    state.put(made["changed"])
    groups = Groups(str(state.folder))
    for store in find(groups.path, REWARD):
        store.done()
        made_by(store)
        for reward in read_rewards(store, groups).values():
            assert len(reward.score) == len(reward.critiques) == 2
            reward.arrays()
        yield "accepted"


def answers_at(folder: Path) -> Stored:
    home = folder / "out"
    file = AnswerFile(epath.Path(home) / "answers.jsonl", "line")
    file.check(SETTINGS)
    file.state(SETTINGS)
    for numbers in ([1, 2], [5]):
        file.write("answers", [{"line": number, "id": str(number), "answers": ["a", "b"]} for number in numbers])
    files = {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    return Stored(home, files, file)


def spoiled_answers(rng: Random, state: Stored) -> Made:
    name = rng.choice(list(state.files))
    if name.endswith(".json"):
        return {"changed": {name: spoiled_json(rng, json.loads(state.files[name]))}}
    rows = [json.loads(line) for line in state.files[name].splitlines()]
    return {"changed": {name: mutate.json_file(rng, [mutate.mutated(rng, row, 1) for row in rows])}}


def run_answers(state: Stored, made: Made) -> Iterable[str]:
    state.put(made["changed"])
    state.more.check(SETTINGS)
    state.more.done("answers")
    state.more.finish("answers")
    state.more.read()
    yield "accepted"


def results_at(folder: Path) -> Stored:
    whole = {"benchmark": "b", "settings": SETTINGS, "remarks": [], "systems": {"random": {"overall": {"acc": 0.5}}}}
    return Stored(folder / "out", {"results.json": json.dumps(whole).encode()})


def spoiled_results(rng: Random, state: Stored) -> Made:
    return {"changed": {"results.json": spoiled_json(rng, json.loads(state.files["results.json"]))}}


def run_results(state: Stored, made: Made) -> Iterable[str]:
    state.put(made["changed"])
    found = results.find_done(str(state.folder), SETTINGS)
    yield "found" if found else "nothing there"


def dataset_at(folder: Path) -> Stored:
    """A prepared dataset of two groups with a picture, and the options that find it done."""
    rows = [row for row in corpus.text_rows()["mm_rlhf"] if row["id"] in ("q", "t")]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PrepareOptions(
        source="mm_rlhf",
        inputs=(str(folder / "in.jsonl"),),
        output=str(folder / "data"),
        media=str(corpus.media_root(folder)),
        workers=1,
    )
    prepare(options)
    home = folder / "data"
    return Stored(home, {path.name: path.read_bytes() for path in home.iterdir()}, options)


def spoiled_dataset(rng: Random, state: Stored) -> Made:
    name = rng.choice(list(state.files))
    data = state.files[name]
    if rng.random() < 0.4:
        return {"changed": {name: mutate.mutated_bytes(rng, data, list(state.files.values()))}}
    if name.endswith(".json"):
        return {"changed": {name: spoiled_json(rng, json.loads(data))}}
    if name.endswith(".jsonl"):
        return {
            "changed": {
                name: mutate.json_file(rng, [mutate.mutated(rng, json.loads(line), 1) for line in data.splitlines()])
            }
        }
    return {"changed": {name: _spoiled_record(rng, data)}}


def _spoiled_record(rng: Random, data: bytes) -> bytes:
    """A shard with another record of a group in it, written as the project writes them."""
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def run_dataset(state: Stored, made: Made) -> Iterable[str]:
    state.put(made["changed"])
    data = open_dataset(str(state.folder))
    for row, group in enumerate(data.groups()):
        assert group.origins is not None
        data.with_media(row)
    prepare(state.more)
    yield "accepted"


def run_prepare(state: Any, made: Made) -> Iterable[str]:
    """Everything that launch/prepare.py does, on rows about pictures, frames and clips."""
    output = state.folder / "out"
    for place in (output, *state.folder.glob(".out.*")):
        shutil.rmtree(place, ignore_errors=True)
    limited = made["rng"] < 0.2
    options = PrepareOptions(
        source="mm_rlhf",
        inputs=(made["file"],),
        output=str(output),
        media=str(state.root) if made["rng"] < 0.95 else None,
        workers=1,
        max_rejected=1.0 if made["rng"] < 0.9 else 0.3,
        video_frames=2,
        renderer=WordCounter() if limited else None,
        max_tokens=30 if limited else None,
        limit=1 if made["rng"] < 0.05 else None,
    )  # type: ignore[arg-type]
    report = prepare(options)
    if made["rng"] < 0.3:
        assert prepare(options).groups == report.groups
    data = open_dataset(str(output))
    assert len(data) == report.groups
    for row in range(len(data)):
        sizes = [size for each in data.with_media(row).media for size in each.sizes]
        assert corpus.SECRET not in sizes, "a picture from outside the media root"
    yield f"prepared, {'some' if report.rejected else 'none'} rejected"


STORED = (
    (
        "annotations",
        ("data/annotations", "data/rewards"),
        (AnnotationError,),
        annotations_at,
        spoiled_annotations,
        run_annotations,
        1,
    ),
    ("answer_file", ("inference/answer_file",), (AnswerFileError,), answers_at, spoiled_answers, run_answers, 1),
    ("results", ("evaluation/results",), (BenchmarkError,), results_at, spoiled_results, run_results, 1),
    (
        "dataset",
        ("data/dataset", "data/datasets", "data/report"),
        (DatasetError, PrepareError),
        dataset_at,
        spoiled_dataset,
        run_dataset,
        1,
    ),
)
NOT_READERS = {
    "annotations.py": ("AnnotationStore.open", "AnnotationStore.write", "_stack", "Rows."),
    "rewards.py": (
        "write_readable",
        "with_scores",
        "note_command",
        "stored_scores",
        "_store_beside",
        "_described",
        "cut_short",
    ),
    "dataset.py": ("PreparedGroups.", "_shards", "_ahead", "write_dataset", "upload_dataset", "_is_data"),
    "report.py": ("Spread.of", "report_of", "_spreads", "_buckets", "rejected_to_json", "Report.to_json"),
    "prepare.py": ("_progress", "_write", "_reload", "_metadata", "_clear", "_waiting"),
    "results.py": ("figures", "write", "_write", "table", "_cell", "_figure"),
    "answer_file.py": (
        "AnswerFile.write",
        "AnswerFile.state",
        "AnswerFile.saving",
        "AnswerFile.list_rejected",
        "AnswerFile.clear_parts",
        "AnswerFile.rejected",
        "AnswerFile.finished",
    ),
    "comparisons.py": ("Scored.",),
    "rows.py": ("Source.",),
    "prompts.py": ("dataset_prompts", "Prompts.without", "Prompts._origin"),
    "media.py": ("_read_object",),  # of a bucket
    "containers.py": (),
    "video.py": ("_require_av",),
}
"""What only writes, or needs a bucket, by the beginning of its name: left out where lines of readers are counted."""

REFUSALS_OF_PREPARE = (PrepareError, DatasetError)

"""Readers of what our own programs leave beside a dataset, and of an OUTPUT: they may be downloaded too.

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

import mutate
import numpy as np
from etils import epath

from mmrlhf_jax.data.annotations import AnnotationError, AnnotationStore, find
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

    def put(self, changed: dict[str, bytes | None]) -> None:
        """What is changed to None is not there; a file "" stands in the folder's place."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.unlink(missing_ok=True) if self.folder.is_file() else None
        if "" in changed:
            self.folder.write_bytes(changed[""] or b"")
            return
        for name, data in {**self.files, **changed}.items():
            if data is None:
                continue
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
    files = {str(path.relative_to(home)): path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}
    return Stored(home, files)


def spoiled_annotations(rng: Random, state: Stored) -> Made:
    name = rng.choice(list(state.files))
    kind = rng.random()
    if kind < 0.02:
        return {"changed": dict.fromkeys(state.files)}
    if kind < 0.04:
        return {"changed": {name: None}}
    if kind < 0.08 and name.endswith(".npz"):  # a part whose rows another one has too
        return {
            "changed": {f"{name.rsplit('-', 2)[0]}-{rng.choice(('1-1', '0-9', '3-2', 'x'))}.npz": state.files[name]}
        }
    if name.endswith(".json"):
        data = spoiled_json(rng, json.loads(state.files[name]))
    elif rng.random() < 0.4:
        data = mutate.mutated_bytes(rng, state.files[name])
    else:
        data = _spoiled_npz(rng, state.files[name])
    return {"changed": {name: data}}


def spoiled_json(rng: Random, value: Any) -> bytes:
    data = mutate.dumps(rng, mutate.mutated(rng, value, rng.choice((1, 1, 2, 3)))).encode("utf-8", "surrogatepass")
    return mutate.offline(mutate.mutated_bytes(rng, data) if rng.random() < 0.2 else data)


def _spoiled_npz(rng: Random, data: bytes) -> bytes:
    """The arrays changed and zipped again, so that the zip is whole and its contents lie."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    kind = rng.randrange(8)
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
    elif kind == 5:  # rows of other groups, or of none, well written
        members["rows.npy"] = _npy(np.array(rng.choice(([0, 1], [1, 0], [2, 3], [0, 4], [0, 0], [0, -1], [7]))))
    elif kind == 6:  # arrays in the order of another
        whole = np.load(io.BytesIO(members[name]))
        members[name] = _npy(
            rng.choice((whole[::-1], whole[:1], whole.astype(bool) if name != "hashes.npy" else whole))
        )
    else:
        members[f"{mutate.hostile_text(rng)[:100]}.npy"] = members[name]
    buffer = io.BytesIO()
    stored, others = zipfile.ZIP_STORED, (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    method = stored if rng.random() < 0.8 else rng.choice(others)
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
    files = {str(path.relative_to(home)): path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}
    return Stored(home, files, file)


def spoiled_answers(rng: Random, state: Stored) -> Made:
    name = rng.choice(list(state.files))
    part = next(each for each in state.files if each.endswith(".jsonl"))
    if rng.random() < 0.1:
        return {"changed": rng.choice(_other_outputs(state.files, part))}
    if name.endswith(".json"):
        return {"changed": {name: spoiled_json(rng, json.loads(state.files[name]))}}
    rows = [json.loads(line) for line in state.files[name].splitlines()]
    return {"changed": {name: mutate.json_file(rng, [mutate.mutated(rng, row, 1) for row in rows])}}


def _other_outputs(files: dict[str, bytes], part: str) -> tuple[dict[str, bytes | None], ...]:
    """Whole files, of which some are missing, stand twice, or are those of another program."""
    settings = next(name for name in files if name.endswith(".json"))
    return (
        dict.fromkeys(files),
        {settings: None},
        {settings: None, "answers.jsonl": b"{}\n"},
        {name: None for name in files if name != settings},
        {f"{part.rsplit('/', 1)[0]}/answers-1-9.jsonl": files[part]},
        {f"{part.rsplit('/', 1)[0]}/critiques-1-2.jsonl": files[part]},
        {f"{part.rsplit('/', 1)[0]}/mine.txt": b"mine"},
        {"answers.jsonl": files[part]},
    )


def run_answers(state: Stored, made: Made) -> Iterable[str]:
    state.put(made["changed"])
    state.more.check(SETTINGS)
    state.more.state(SETTINGS)  # adds to what is stored there
    state.more.done("answers")
    state.more.finish("answers")
    state.more.read()
    yield "accepted"


def results_at(folder: Path) -> Stored:
    whole = {"benchmark": "b", "settings": SETTINGS, "remarks": [], "systems": {"random": {"overall": {"acc": 0.5}}}}
    return Stored(folder / "out", {"results.json": json.dumps(whole).encode()})


def spoiled_results(rng: Random, state: Stored) -> Made:
    if rng.random() < 0.05:
        return {"changed": rng.choice(({"": b"a file"}, {"results.json": None}))}
    return {"changed": {"results.json": spoiled_json(rng, json.loads(state.files["results.json"]))}}


def run_results(state: Stored, made: Made) -> Iterable[str]:
    state.put(made["changed"])
    found = results.find_done(str(state.folder), SETTINGS)
    yield "found" if found else "nothing there"


STORED = (
    (
        "annotations",
        ("data/annotations", "data/rewards"),
        (AnnotationError,),
        annotations_at,
        spoiled_annotations,
        run_annotations,
    ),
    ("answer_file", ("inference/answer_file",), (AnswerFileError,), answers_at, spoiled_answers, run_answers),
    ("results", ("evaluation/results",), (BenchmarkError,), results_at, spoiled_results, run_results),
)

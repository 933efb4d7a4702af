from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_samples import row, write_rows

from mmrlhf_jax.data.annotations import AnnotationError, AnnotationStore, find
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareOptions, prepare

KEY = {"model": "m1", "dtype": "float32"}
COUNT = 12


@pytest.fixture
def data(tmp_path: Path) -> PreparedDataset:
    file = write_rows(tmp_path / "in.jsonl", [row(id=str(i), image=None, prompt=f"What is {i}?") for i in range(COUNT)])
    prepare(PrepareOptions(source="mm_rlhf", inputs=(file,), output=str(tmp_path / "data")))
    return open_dataset(tmp_path / "data")


def values(rows: list[int]) -> dict[str, list[np.ndarray]]:
    return {"logp": [np.arange(r, dtype=np.float32) + r for r in rows], "score": [np.float64([r, -r]) for r in rows]}


def write(store: AnnotationStore, data: PreparedDataset, rows: list[int]) -> None:
    store.write(rows, [data.group(r).content_hash() for r in rows], values(rows))


def test_rows_come_back_as_they_went_in(data: PreparedDataset) -> None:
    store = AnnotationStore.open(data.path, "reference", KEY)
    assert store.done() == set()
    write(store, data, [3, 0])
    write(store, data, [7])
    again = AnnotationStore.open(data.path, "reference", KEY)
    assert again.done() == store.done() == {0, 3, 7}
    read = again.read(data)
    assert sorted(read) == [0, 3, 7]
    for r, arrays in read.items():
        for name, expected in values([r]).items():
            np.testing.assert_array_equal(arrays[name], expected[0])
            assert arrays[name].dtype == expected[0].dtype
    assert [path.name for path in sorted(Path(again.directory).iterdir())] == [
        "key.json",
        "part-0-2.npz",
        "part-7-1.npz",
    ]


def test_another_key_is_another_store_and_all_can_be_found(data: PreparedDataset) -> None:
    write(AnnotationStore.open(data.path, "reference", KEY), data, [0])
    other = AnnotationStore.open(data.path, "reference", {**KEY, "model": "m2"})
    AnnotationStore.open(data.path, "reward", KEY)
    assert other.done() == set()
    assert sorted(store.key["model"] for store in find(data.path, "reference")) == ["m1", "m2"]
    assert [store.key for store in find(data.path, "reward")] == [KEY]
    assert find(data.path, "critique") == ()


def test_a_row_is_written_once(data: PreparedDataset) -> None:
    store = AnnotationStore.open(data.path, "reference", KEY)
    write(store, data, [0, 1])
    with pytest.raises(AnnotationError, match=r"row 1 is stored already; write only rows not in done\(\)"):
        write(AnnotationStore.open(data.path, "reference", KEY), data, [1, 2])
    assert store.done() == {0, 1}


def test_a_row_in_two_parts_is_an_error(data: PreparedDataset) -> None:
    store = AnnotationStore.open(data.path, "reference", KEY)
    write(store, data, [4])
    directory = Path(store.directory)
    (directory / "part-5-1.npz").write_bytes((directory / "part-4-1.npz").read_bytes())
    with pytest.raises(AnnotationError, match="row 4 is stored twice"):
        store.read(data)


def test_values_of_other_content_are_not_used(data: PreparedDataset) -> None:
    store = AnnotationStore.open(data.path, "reference", KEY)
    store.write([5], [data.group(6).content_hash()], values([5]))
    with pytest.raises(AnnotationError, match="row 5 was computed for other content"):
        store.read(data)


def test_a_row_beyond_the_dataset_is_an_error(data: PreparedDataset) -> None:
    store = AnnotationStore.open(data.path, "reference", KEY)
    store.write([COUNT], ["00" * 32], values([COUNT]))
    with pytest.raises(AnnotationError, match=f"row {COUNT} is not in"):
        store.read(data)


def test_torn_parts_are_reported_and_other_files_are_not_ours(data: PreparedDataset) -> None:
    store = AnnotationStore.open(data.path, "reference", KEY)
    write(store, data, [0, 1])
    part = Path(store.directory) / "part-0-2.npz"
    for name in ("notes.txt", ".part-9-9.npz.writing", "part-x.npz", "part-1-1.npz.bak"):
        (part.parent / name).write_bytes(b"junk")
    assert store.done() == {0, 1}
    whole = part.read_bytes()
    for torn in (whole[:-40], b"", b"junk", whole[:200] + b"\xff" + whole[201:]):
        part.write_bytes(torn)
        with pytest.raises(
            AnnotationError, match=r"part-0-2.npz is damaged .*: delete it, its rows are computed again"
        ):
            AnnotationStore.open(data.path, "reference", KEY).done()
    part.unlink()
    write(store, data, [0, 1])
    assert sorted(store.read(data)) == [0, 1]


def test_what_cannot_be_stored_is_refused(data: PreparedDataset) -> None:
    store = AnnotationStore.open(data.path, "reference", KEY)
    one = np.zeros(3, np.float32)
    cases: list[tuple[list[int], list[str], dict[str, list[np.ndarray]], str]] = [
        ([], [], {"a": []}, "are empty or repeat"),
        ([1, 1], ["00" * 32] * 2, {"a": [one, one]}, "are empty or repeat"),
        ([1], [], {"a": [one]}, "need as many hashes"),
        ([1], ["00" * 32], {}, "for at least one name"),
        ([1], ["00" * 32], {"a": [np.float32(1)]}, "plain numbers can be stored"),
        ([1], ["00" * 32], {"a": [np.array(["x"])]}, "plain numbers can be stored"),
        ([1, 2], ["00" * 32] * 2, {"a": [one, one.astype(np.float64)]}, "does not stack with"),
        ([1, 2], ["00" * 32] * 2, {"a": [one[:, None], one]}, "does not stack with"),
    ]
    for rows, hashes, arrays, message in cases:
        with pytest.raises(AnnotationError, match=message):
            store.write(rows, hashes, arrays)
    assert store.done() == set()


def test_keys_and_kinds_are_checked(data: PreparedDataset) -> None:
    with pytest.raises(AnnotationError, match=r"kind '\.\./x' is not a lower-case word"):
        AnnotationStore.open(data.path, "../x", KEY)
    with pytest.raises(AnnotationError, match="the key of 'reference' is not JSON"):
        AnnotationStore.open(data.path, "reference", {"dtype": np.float32})
    store = AnnotationStore.open(data.path, "reference", KEY)
    (Path(store.directory) / "key.json").write_text('{"model": "m9"}')
    with pytest.raises(AnnotationError, match="holds another key"):
        AnnotationStore.open(data.path, "reference", KEY)


WRITER = """
import sys
import numpy as np
from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.datasets import open_dataset
data = open_dataset(sys.argv[1])
store = AnnotationStore.open(data.path, "reference", {"model": "m1"})
print("ready", flush=True)
for row in sorted(set(range(len(data))) - store.done()):
    store.write([row], [data.group(row).content_hash()], {"logp": [np.full(200_000, row, np.float32)]})
"""


def test_killed_writers_lose_and_double_nothing(data: PreparedDataset) -> None:
    dice = random.Random(0)
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", WRITER, data.path], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(dice.uniform(0, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        AnnotationStore.open(data.path, "reference", {"model": "m1"}).read(data)
    subprocess.run([sys.executable, "-c", WRITER, data.path], check=True)
    read = AnnotationStore.open(data.path, "reference", {"model": "m1"}).read(data)
    assert sorted(read) == list(range(COUNT))
    assert all((arrays["logp"] == r).all() for r, arrays in read.items())

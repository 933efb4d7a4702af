"""Datasets and annotations on gs://, against an emulator."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_samples import picture, row, write_rows
from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.data import dataset as dataset_module
from mmrlhf_jax.data.annotations import AnnotationError, AnnotationStore, find
from mmrlhf_jax.data.cluster_sampling import Sampling
from mmrlhf_jax.data.dataset import DatasetError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareError, PrepareOptions, prepare
from mmrlhf_jax.data.write_back import write_back
from mmrlhf_jax.storage import StorageError

ROWS = [
    row(chosen="best", rejected="good"),
    row(id="several", image=["a.png", "b c#?%.png"]),
    row(id="clip", image=None, video="clip"),
    row(id="text", image=None),
]
MEDIA = {
    "a.png": picture(),
    "b c#?%.png": picture(size=(50, 20)),
    "clip/1.png": picture(),
    "clip/2.png": picture(size=(7, 9)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def options(gs: str, tmp_path: Path) -> Any:
    """Media in the bucket, and the dataset to be written there."""
    for name, data in MEDIA.items():
        (epath.Path(gs) / "media" / name).write_bytes(data)

    def make(rows: list[Any], **changes: Any) -> PrepareOptions:
        file = write_rows(tmp_path / "in.jsonl", rows)
        defaults = {"source": "mm_rlhf", "inputs": (file,), "media": f"{gs}/media", "output": f"{gs}/data/prepared"}
        return PrepareOptions(**{**defaults, **changes})

    return make


def names(directory: str) -> set[str]:
    return {file.name for file in storage.list_files(directory)}


def test_a_dataset_in_a_bucket_is_the_one_prepared_locally(options: Any, tmp_path: Path) -> None:
    report = prepare(options(ROWS))
    local = open_dataset(prepare(options(ROWS, output=str(tmp_path / "out"))) and tmp_path / "out")
    data = open_dataset(options(ROWS).output)
    assert (data.path, data.fingerprint) == (options(ROWS).output, report.fingerprint)
    assert [data.with_media(i) for i in range(4)] == [local.with_media(i) for i in range(4)]
    assert pickle.loads(pickle.dumps(data)).with_media(1) == local.with_media(1)
    assert not list(tmp_path.glob("**/.*.writing"))


def test_inputs_may_be_in_a_bucket(options: Any, gs: str) -> None:
    given = options(ROWS)
    (epath.Path(gs) / "in.jsonl").write_bytes(Path(given.inputs[0]).read_bytes())
    prepare(options(ROWS, inputs=(f"{gs}/in.jsonl",)))
    data = open_dataset(given.output)
    assert [str(data.group(i).origins[0]) for i in range(4)] == [f"{gs}/in.jsonl:{i + 1}" for i in range(4)]


def test_preparing_again_finds_it_done_and_other_inputs_are_refused(options: Any) -> None:
    assert not prepare(options(ROWS)).reused
    assert prepare(options(ROWS)).reused
    with pytest.raises(DatasetError, match="was prepared from other inputs"):
        prepare(options(ROWS[:2]))


def test_bad_pictures_cost_their_rows_only(options: Any, gs: str) -> None:
    media = epath.Path(gs) / "media"
    (media / "torn.png").write_bytes(MEDIA["a.png"][:60])
    (media / "empty.png").write_bytes(b"")
    bad = [row(id=name, image=f"{name}.png") for name in ("torn", "empty", "gone")]
    report = prepare(options([*ROWS, *bad, row(id="out", image="../in.jsonl")], max_rejected=0.6))
    assert len(open_dataset(options(ROWS).output)) == 4
    reasons = "\n".join(rejected.reason for rejected in report.rejected)
    for expected in (
        "'torn.png'",
        "'empty.png'",
        "'gone.png' is not under the media root gs://",
        "leaves the media root",
    ):
        assert expected in reasons


def test_a_picture_too_large_is_not_read_whole(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrlhf_jax.data.media.MAX_FILE_BYTES", len(MEDIA["a.png"]) - 1)
    with pytest.raises(PrepareError, match=r"'a.png' has more than .* bytes: shrink the picture"):
        prepare(options(ROWS[:1]))


def test_what_is_not_a_dataset_is_not_overwritten(options: Any) -> None:
    output = options(ROWS).output
    (epath.Path(output) / "thesis.txt").write_text("mine")
    with pytest.raises(DatasetError, match="exists and is not a prepared dataset"):
        prepare(options(ROWS))
    assert names(output) == {"thesis.txt"}
    with pytest.raises(DatasetError, match="is not a prepared dataset: make it with"):
        open_dataset(output)


@pytest.mark.parametrize("failing", [0, 3, 6])  # of seven files; the last one makes it a dataset
def test_half_an_upload_is_no_dataset_and_the_next_run_replaces_it(
    options: Any, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    put, count = storage._put, iter(range(7))

    def fail(*arguments: Any) -> None:
        if next(count) == failing:
            raise OSError("the network went away")
        put(*arguments)

    output = options(ROWS).output
    monkeypatch.setattr(storage, "_put", fail)
    with pytest.raises(OSError, match="the network went away"):
        prepare(options(ROWS))
    with pytest.raises(DatasetError, match="is not a prepared dataset"):
        open_dataset(output)
    monkeypatch.setattr(storage, "_put", put)
    prepare(options(ROWS))
    assert len(open_dataset(output)) == 4
    assert dataset_module.UPLOADING not in names(output)


def test_an_upload_that_arrives_short_is_not_finished(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put = storage._put

    def cut(file_system: Any, directory: str, file: Path) -> None:
        if "media" in file.name:
            file.write_bytes(b"")
            put(file_system, directory, file)
            file.write_bytes(b"as it was")
        else:
            put(file_system, directory, file)

    monkeypatch.setattr(storage, "_put", cut)
    with pytest.raises(StorageError, match="has 0 bytes after uploading 9: run the same command again"):
        prepare(options(ROWS))


def test_a_host_copies_once_and_copies_again_what_changed(options: Any, cache: Path) -> None:
    prepare(options(ROWS))
    output = options(ROWS).output
    open_dataset(output)
    (copy,) = [path for path in cache.iterdir() if path.is_dir()]
    before = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}
    assert not {name for name in before if "report" in name or "rejected" in name}
    open_dataset(output)
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} == before

    media = next(file for file in copy.iterdir() if "-media." in file.name)
    whole = media.read_bytes()
    media.write_bytes(whole[:100])  # as a full disk leaves it
    assert open_dataset(output).with_media(0).media[0].encoded == (MEDIA["a.png"],)
    assert media.read_bytes() == whole

    epath.Path(output).rmtree()
    prepare(options(ROWS))  # the same bytes, yet other objects
    open_dataset(output)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_a_disk_too_small_is_said_before_copying(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(options(ROWS))
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(StorageError, match="free: set MMRLHF_CACHE to a directory on a larger disk"):
        open_dataset(options(ROWS).output)


READER = """
import sys
from mmrlhf_jax.data.datasets import open_dataset
sys.stdin.readline()
data = open_dataset(sys.argv[1])
print(sum(len(media.encoded) for i in range(len(data)) for media in data.with_media(i).media))
"""

WRITER = """
import sys
import numpy as np
from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.datasets import open_dataset
data = open_dataset(sys.argv[1])
store = AnnotationStore.open(data.path, "reference", {"model": "m1"})
for r in range(int(sys.argv[2]), len(data), 2):
    store.write([r], [data.group(r).content_hash()], {"logp": [np.full(3, r, np.float32)]})
    print("wrote", r, flush=True)
    sys.stdin.readline()
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_of_a_host_open_it_at_the_same_time(options: Any) -> None:
    prepare(options(ROWS))
    readers = [start(READER, options(ROWS).output) for _ in range(2)]
    assert [reader.communicate("go\n", timeout=120)[0] for reader in readers] == ["5\n"] * 2


def test_processes_annotate_different_rows_and_see_each_other(options: Any) -> None:
    prepare(options(ROWS))
    data = open_dataset(options(ROWS).output)
    here = AnnotationStore.open(data.path, "reference", {"model": "m1"})
    assert here.done() == set()
    writers = [start(WRITER, data.path, str(first)) for first in (0, 1)]
    assert [writer.stdout.readline() for writer in writers if writer.stdout] == ["wrote 0\n", "wrote 1\n"]
    assert here.done() == {0, 1}
    with pytest.raises(AnnotationError, match="row 1 is stored already"):
        here.write([1], ["00" * 32], {"logp": [np.zeros(3)]})
    for writer in writers:
        writer.communicate("\n\n", timeout=120)
    read = here.read(data)
    assert {r: arrays["logp"].tolist() for r, arrays in read.items()} == {r: [r] * 3 for r in range(4)}
    assert [store.key for store in find(data.path, "reference")] == [{"model": "m1"}]
    assert names(os.fspath(here.directory)) == {"key.json", *(f"part-{r}-1.npz" for r in range(4))}


def test_another_process_never_sees_an_old_length(gs: str) -> None:
    file = epath.Path(gs) / "log"
    file.write_text("1")
    assert (list(file.parent.iterdir()), file.read_text()) == ([file], "1")
    program = f"from mmrlhf_jax import storage; storage.write_whole(storage.to_path({os.fspath(file)!r}), b'longer')"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (file.read_text(), file.stat().length) == ("longer", 6)


def test_lines_of_objects_can_be_bounded(gs: str) -> None:
    (epath.Path(gs) / "rows").write_bytes(b"a" * 10 + b"\nshort\n")
    with storage.open_read(f"{gs}/rows") as stream:
        assert [stream.readline(4) for _ in range(4)] == [b"aaaa", b"aaaa", b"aa\n", b"shor"]
        stream.seek(0)
        assert stream.read() == b"a" * 10 + b"\nshort\n"


def test_what_the_store_answers_is_an_error_of_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def answering(message: str) -> Any:
        def cat_file(name: str, start: int, end: int) -> bytes:
            raise RuntimeError(message)  # gcsfs's own HttpError is no OSError either

        return lambda path: (SimpleNamespace(cat_file=cat_file), path)

    monkeypatch.setattr(storage.fsspec.core, "url_to_fs", answering("Requested range not satisfiable, 416"))
    assert storage.read_bytes("gs://b/empty", 10) == b""
    monkeypatch.setattr(storage.fsspec.core, "url_to_fs", answering("Invalid Credentials, 401"))
    with pytest.raises(OSError, match="gs://b/secret: Invalid Credentials, 401"):
        storage.read_bytes("gs://b/secret", 10)


def test_a_path_nothing_can_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="nowhere://x is neither a local path nor gs://"):
        storage.to_path("nowhere://x")

    def no_gcsfs(path: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(storage.fsspec.core, "url_to_fs", no_gcsfs)
    with pytest.raises(
        StorageError, match=r"gs://b/x needs a package that is not installed: pip install 'mmrlhf-jax\[gcs\]'"
    ):
        storage.to_path("gs://b/x")


@pytest.mark.parametrize("form", ["trl", "sharegpt"])
def test_rows_are_written_to_a_bucket_and_read_from_it(options: Any, gs: str, tmp_path: Path, form: Any) -> None:
    lines = [ROWS[0], ROWS[1], ROWS[3]]
    prepare(options(lines))
    dataset, output = open_dataset(options(lines).output), f"{gs}/rows"
    assert not write_back(dataset, form, output).reused
    assert write_back(dataset, form, output).reused
    assert ".uploading" not in names(output)
    file = "train.parquet" if form == "trl" else "preferences.jsonl"
    media = None if form == "trl" else output
    again = options([], source=form, inputs=(f"{output}/{file}",), media=media, output=str(tmp_path / "again"))
    report = prepare(again)
    assert (report.pairs, report.rejected) == (3, ())
    for number, group in enumerate(open_dataset(str(tmp_path / "again")).groups()):
        assert [m.sha256 for m in group.media] == [m.sha256 for m in dataset.group(number).media]


def test_embeddings_may_be_in_a_bucket(options: Any, gs: str) -> None:
    array = io.BytesIO()
    np.save(array, np.array([0, 0, 0, 1]))
    (epath.Path(gs) / "e.npy").write_bytes(array.getvalue())
    (epath.Path(gs) / "ids.txt").write_text("q\nseveral\nclip\ntext\n")
    given = options(ROWS, sampling=Sampling(f"{gs}/e.npy", f"{gs}/ids.txt", 2))
    assert prepare(given).groups == 2
    assert "text" in [group.id for group in open_dataset(given.output).groups()]
    assert len((epath.Path(given.output) / "sample.jsonl").read_text().splitlines()) == 4

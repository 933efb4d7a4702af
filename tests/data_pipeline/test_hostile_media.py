"""Media and stored files of strangers. Found by reading or fuzzing; what `test_media` and `test_video` hold is not
repeated here."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_samples import picture, row, write_media, write_rows
from etils import epath
from PIL import Image

from mmrlhf_jax.data import media
from mmrlhf_jax.data.annotations import AnnotationError, AnnotationStore, find
from mmrlhf_jax.data.dataset import DatasetError, write_dataset
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.media import MediaError, MediaRoot, decode, picture_size, read_media
from mmrlhf_jax.data.mixture import MixtureError, open_mixture
from mmrlhf_jax.data.prepare import PrepareOptions, Proven, prepare, prove
from mmrlhf_jax.data.rewards import made_by, read_rewards
from mmrlhf_jax.groups import Media


@pytest.fixture
def root(tmp_path: Path) -> MediaRoot:
    return MediaRoot(str(write_media(tmp_path / "media", a=picture(), clip__1=picture(), clip__2=picture())))


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, of some bytes, stands in it again and again."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    starts = [found.start() for found in re.finditer(rb"\xff\xda", whole)]
    return whole[:-2] + whole[starts[-1] : -2] * (count - len(starts)) + whole[-2:]


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded() -> None:
    """Of 8000 x 8000 pixels, 100 kB of scans took 20 s."""
    assert decode(jpeg_of_scans(50)).shape == (64, 64, 3)
    for read in (picture_size, decode):
        with pytest.raises(MediaError, match="or more scans, more than 100: re-save the picture"):
            read(jpeg_of_scans(1_000))


def test_scans_are_counted_in_the_picture_and_not_in_what_stands_beside_it() -> None:
    noted = Image.Exif()
    noted[0x9286] = b"\xff\xda" * 5_000
    assert decode(picture(format="JPEG", exif=noted) + b"\xff\xda" * 5_000).shape == (30, 40, 3)


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 90 million pixels takes 1 GB while it is converted, and has a few kB."""
    monkeypatch.setattr(media, "LARGE_PIXELS", 100)
    free, real = [], media._rgb
    monkeypatch.setattr(media, "_rgb", lambda image: (free.append(not media._large.locked()), real(image))[1])
    threads = [threading.Thread(target=decode, args=(picture(size=size),)) for size in ((40, 30), (5, 5))]
    for thread in threads:
        thread.start()
        thread.join()
    assert free == [False, True]


@pytest.mark.parametrize("path", ["\ud800.png", "a\0.png", "x" * 300 + ".png", "a.png/" * 2_000])
def test_a_path_that_no_file_has_is_a_bad_row(root: MediaRoot, path: str) -> None:
    with pytest.raises(MediaError):
        read_media(Media("image", path), root)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "loop"])
def test_what_is_no_file_is_never_opened(root: MediaRoot, kind: str) -> None:
    path = Path(root.path) / "strange.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(MediaError):
        read_media(Media("image", "strange.png"), root)


def test_frames_of_a_directory_are_bounded_together(root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_MEDIA_BYTES", len(picture()) + 1)
    with pytest.raises(MediaError, match="'clip' has frames of more than"):
        read_media(Media("video", "clip"), root)


def test_pictures_of_a_group_are_bounded_together(
    root: MediaRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrlhf_jax.data.prepare.MAX_MEDIA_BYTES", 2 * len(picture()))
    file = write_rows(tmp_path / "in.jsonl", [row(), row(id="many", image=["a.png"] * 3)])
    report = prepare(PrepareOptions("mm_rlhf", (file,), str(tmp_path / "out"), media=root.path, max_rejected=0.5))
    assert report.groups == 1
    assert "its pictures have" in report.rejected[0].reason


def test_a_video_whose_index_names_places_that_no_file_has_is_refused(tmp_path: Path, root: MediaRoot) -> None:
    av = pytest.importorskip("av")
    file = Path(root.path) / "clip.avi"
    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for _ in range(5):
            out.mux(stream.encode(av.VideoFrame(32, 16, "yuv420p")))
        out.mux(stream.encode())
    whole = file.read_bytes()
    for at in range(0, 400, 4):
        file.write_bytes(whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :])
        result = prove(Media("video", "clip.avi"), root)
        assert isinstance(result, Proven) or "check its permissions" not in result


# Stored files.


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    file = write_rows(tmp_path / "in.jsonl", [row(image=None)])
    prepare(PrepareOptions("mm_rlhf", (file,), str(tmp_path / "data")))
    return tmp_path / "data"


def test_a_dataset_cannot_name_a_module_to_import(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    text = (stored / "features.json").read_text()
    (stored / "features.json").write_text(
        text.replace("tensorflow_datasets.core.features.text_feature.Text", "evil.Text")
    )
    with pytest.raises(DatasetError, match=r"is damaged \(a feature of the class 'evil.Text'\)"):
        open_dataset(stored)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("dataset_info.json", "{DATASET}-{SPLIT}", "../../{SPLIT}"),
        ("dataset_info.json", '"array_record"', '"tfrecord"'),
        ("dataset_info.json", '"splits"', '"split"'),
        ("dataset_info.json", "{", "["),
        ("metadata.json", "{", "\0"),
        ("features.json", "{", "["),
    ],
)
def test_a_dataset_that_describes_another_is_damaged(stored: Path, file: str, old: str, new: str) -> None:
    (stored / file).write_text((stored / file).read_text().replace(old, new))
    with pytest.raises(DatasetError, match="is damaged"):
        open_dataset(stored)


def test_a_damaged_shard_is_named(stored: Path) -> None:
    shard = next(stored.glob("*groups.array_record*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DatasetError, match="is damaged"):
        list(open_dataset(stored).groups())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"reason": null', '"reason": {"x": null}', "a text or a number is none"),
        ('"line": 1', '"line": "clip"', "a text or a number is none"),
        ('"text": "good"', r'"text": "\ud800"', "surrogates not allowed"),
        ('"text": "What?"', '"text": "What?", "media": 1', "media that stand in no turn"),
    ],
)
def test_a_record_that_is_no_group_is_named(stored: Path, old: str, new: str, said: str) -> None:
    """In shards that are whole: readers of a dataset call these texts and numbers."""
    (group,) = open_dataset(stored).groups()
    text = group.to_json()
    assert old in text
    written = write_dataset(
        epath.Path(stored.parent / "aside"),
        [SimpleNamespace(to_json=lambda: text.replace(old, new))],  # type: ignore[list-item]
        [0],
        lambda _: [],
        json.loads((stored / "metadata.json").read_text()),
        1,
    )
    with pytest.raises(DatasetError, match=rf"row 0 or one after it is damaged \(.*{said}"):
        list(open_dataset(written).groups())


@pytest.mark.parametrize("text", ["[]", '{"rows": "x"}', "\0", "[" * 10**5])
def test_a_damaged_report_is_named(stored: Path, text: str) -> None:
    (stored / "report.json").write_text(text)
    with pytest.raises(DatasetError, match=r"a report in .* is damaged"):
        prepare(PrepareOptions("mm_rlhf", (str(stored.parent / "in.jsonl"),), str(stored)))


def test_a_number_in_a_report_that_no_float_holds_is_damage(stored: Path) -> None:
    report = json.loads((stored / "report.json").read_text())
    (stored / "report.json").write_text(json.dumps(report | {"margins": [0, 10**400, 1]}))
    with pytest.raises(DatasetError, match=r"a report in .* is damaged"):
        prepare(PrepareOptions("mm_rlhf", (str(stored.parent / "in.jsonl"),), str(stored)))


def part_of(stored: Path) -> Path:
    data = open_dataset(stored)
    store = AnnotationStore.open(str(stored), "reward", {"critiques": "none"})
    store.write([0], [data.group(0).content_hash()], {"score": [np.zeros((2, 1), np.float32)]})
    return Path(store.directory) / "part-0-1.npz"


def rewritten(part: Path, member: str, data: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(part) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(part, "w", method) as archive:
        for name, content in {**members, member: data}.items():
            archive.writestr(name, content)


def npy(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "data", [npy("(10**12,)"), npy("(1000000000000,)"), npy("(2,)", "|O"), npy("()"), npy("(-1,)"), b""]
)
@pytest.mark.parametrize("member", ["rows.npy", "hashes.npy", "score.values.npy", "score.lengths.npy"])
def test_an_array_that_lies_about_its_size_or_kind_is_a_damaged_part(stored: Path, member: str, data: bytes) -> None:
    rewritten(part_of(stored), member, data)
    with pytest.raises(AnnotationError, match=r"part-0-1.npz is damaged"):
        find(str(stored), "reward")[0].done()


def test_a_compressed_part_is_not_unpacked(stored: Path) -> None:
    """40 GB of zeros are 40 MB."""
    rewritten(part_of(stored), "score.values.npy", npy("(1,)") + bytes(10**7), zipfile.ZIP_DEFLATED)
    with pytest.raises(AnnotationError, match="compressed, which no part is"):
        find(str(stored), "reward")[0].done()


def test_a_bare_array_is_no_part(stored: Path) -> None:
    part_of(stored).write_bytes(npy("(1,)") + bytes(4))
    with pytest.raises(AnnotationError, match="is damaged"):
        find(str(stored), "reward")[0].done()


def test_what_is_no_reward_is_named(stored: Path) -> None:
    part = part_of(stored)
    (store,) = find(str(stored), "reward")
    with pytest.raises(AnnotationError, match="row 0 is no reward"):
        read_rewards(store, open_dataset(stored))
    (part.parent / "made_by.json").write_text("[1]")
    with pytest.raises(AnnotationError, match=r"made_by.json is damaged"):
        made_by(store)
    (part.parent / "key.json").write_text("[" * 10**5)
    with pytest.raises(AnnotationError, match=r"key.json is damaged"):
        find(str(stored), "reward")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "file:///etc", "zz://b/o"])
def test_a_mixture_names_datasets_that_can_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "mix.json").write_text(json.dumps({"parts": [{"dataset": name}]}))

    def nothing(path: str) -> Any:
        raise AssertionError(path)

    with pytest.raises(MixtureError):
        open_mixture(str(tmp_path / "mix.json"), nothing)

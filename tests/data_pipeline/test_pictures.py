from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from data_samples import embedded, picture, row, sorted_out, write_parquet, write_rows
from etils import epath

from mmrlhf_jax.data.sources import pictures, read_source
from mmrlhf_jax.data.sources.pictures import PictureStore, picture_of
from mmrlhf_jax.data.sources.rows import RowError, SourceOptions
from mmrlhf_jax.groups import Media

PNG = picture()
TEXT = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{TEXT}"
URI_WITH_PARAMETER = f"data:image/png;charset=utf-8;base64,{TEXT}"


@pytest.fixture
def store(tmp_path: Path) -> PictureStore:
    return PictureStore(epath.Path(tmp_path / "store"))


@pytest.mark.parametrize(
    "value",
    [PNG, {"bytes": PNG, "path": "x.png"}, {"bytes": PNG, "path": None}, {"bytes": TEXT}, URI, URI_WITH_PARAMETER],
)
def test_a_picture_in_a_row_is_kept_under_the_name_of_its_content(store: PictureStore, value: Any) -> None:
    media = picture_of(value, "'image'", store)
    assert media == embedded(PNG)
    assert (store.directory / media.path).read_bytes() == PNG


@pytest.mark.parametrize("value", ["a/b.png", {"path": "a/b.png"}, {"bytes": None, "path": "a/b.png"}])
def test_a_path_is_a_path(store: PictureStore, value: Any) -> None:
    assert picture_of(value, "'image'", store) == Media("image", "a/b.png")
    assert not store.directory.exists()


def test_what_looks_like_base64_without_data_is_a_path(store: PictureStore) -> None:
    assert picture_of(TEXT, "'image'", store) == Media("image", TEXT)


def test_the_same_picture_is_kept_once(store: PictureStore) -> None:
    first, again, other = (picture_of(data, "'image'", store) for data in (PNG, URI, picture(size=(9, 9))))
    assert first == again != other
    assert len(list(store.directory.iterdir())) == 2


BAD = {
    "broken base64": ("data:image/png;base64,AB*=", "'image' is not base64"),
    "base64 with line breaks": ({"bytes": TEXT[:8] + "\n" + TEXT[8:]}, "'image'.bytes is not base64"),
    "cut base64": (URI[:-3], "'image' is not base64"),
    "text as data": ("data:text/plain;base64,QUJD", "'image' is a data URI, but not data:image/...;base64,..."),
    "data without base64": ("data:image/png,abc", "'image' is a data URI, but not"),
    "no data": ("data:image/png;base64,", "'image' is empty"),
    "no bytes": (b"", "'image' is empty"),
    "another object": ({"url": "http://x/y.png"}, "'image' is an object with url; a picture has 'bytes' or 'path'"),
    "an empty object": ({}, "'image'.path is null, a string was expected"),
    "bytes as a list": ({"bytes": [1, 2]}, "'image'.bytes is neither bytes nor base64"),
    "a number": (3, "'image' is a number, a string was expected"),
    "a name of ours": (embedded(PNG).path, "'image' starts with 'embedded:', which no path may"),
}


@pytest.mark.parametrize(("value", "reason"), BAD.values(), ids=BAD.keys())
def test_anything_else_is_refused(store: PictureStore, value: Any, reason: str) -> None:
    with pytest.raises(RowError) as failure:
        picture_of(value, "'image'", store)
    assert str(failure.value).startswith(reason)
    assert not store.directory.exists()


def test_an_oversized_picture_is_refused_before_it_is_decoded(
    store: PictureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", len(PNG))
    for value in (PNG, URI):
        assert picture_of(value, "'image'", store) == embedded(PNG)
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", len(PNG) - 1)
    with pytest.raises(RowError, match=rf"'image' has {len(PNG)} bytes, more than {len(PNG) - 1}: shrink the picture"):
        picture_of(PNG, "'image'", store)
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", len(PNG) // 2)
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    for value in (URI, {"bytes": TEXT}):
        with pytest.raises(RowError, match="shrink the picture"):
            picture_of(value, "'image'", store)


def test_without_a_store_the_row_is_rejected(tmp_path: Path) -> None:
    groups, rejected, _ = sorted_out(read_source("mm_rlhf", [write_rows(tmp_path / "in.jsonl", [row(image=URI)])]))
    assert groups == []
    assert rejected == {1: "'image' is an embedded picture, and there is no place to put it"}


def test_every_source_takes_pictures_from_rows(tmp_path: Path, store: PictureStore) -> None:
    struct = {"bytes": PNG, "path": "x.png"}
    named = {"image": "pic", "prompt": "q", "responses": "answers", "rank": "order"}
    cases = [
        ("mm_rlhf", row(image=struct), SourceOptions(store=store)),
        (
            "mapped",
            {"q": "?", "answers": ["x"], "order": "[1]", "pic": struct},
            SourceOptions(named, store=store),
        ),
    ]
    for source, line, options in cases:
        file = write_parquet(tmp_path / f"{source}.parquet", [line])
        (group,), rejected, _ = sorted_out(read_source(source, [file], options))
        assert rejected == {}
        assert group.media == (embedded(PNG),)

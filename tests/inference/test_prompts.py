"""Prompts of a file: what is read, what is refused and why, and that pictures are what they were."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from data_samples import picture, write_media, write_parquet, write_rows

from mmrlhf_jax.data.sources.rows import SourceError
from mmrlhf_jax.groups import Turn
from mmrlhf_jax.inference.prompts import Prompts, read_prompts

CAT = picture(size=(40, 30))


@pytest.fixture
def media(tmp_path: Path) -> str:
    root = write_media(tmp_path / "media", cat=CAT, dog=picture(size=(20, 30)))
    write_media(root / "clip", **{"1": picture(), "2": picture()})
    (root / "broken.png").write_bytes(CAT[: len(CAT) // 2])
    return str(root)


def read(tmp_path: Path, rows: list[Any], media: str | None = None) -> Prompts:
    return read_prompts(write_rows(tmp_path / "prompts.jsonl", rows), media, str(tmp_path / "folder"), frames=2)


def test_a_string_is_the_user_s_turn_without_its_markers(tmp_path: Path, media: str) -> None:
    prompts = read(tmp_path, [{"prompt": "<image>\nWhat about <image>?", "image": "cat.png"}], media)
    (group,) = prompts.groups
    assert group.prompt == (Turn("user", "What about <image>?"),)
    assert [(m.kind, m.path, m.sizes, m.encoded) for m in group.media] == [("image", "cat.png", ((40, 30),), ())]
    assert prompts.with_media(0).media[0].encoded == (CAT,)


def test_messages_place_their_media(tmp_path: Path, media: str) -> None:
    turns = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And now?"}]},
    ]
    (group,) = read(tmp_path, [{"prompt": turns, "image": ["cat.png", "dog.png"]}], media).groups
    assert group.prompt == (Turn("user", "What?", 1), Turn("assistant", "A cat."), Turn("user", "And now?", 1))


def test_pictures_may_stand_in_the_rows_of_jsonl_and_parquet(tmp_path: Path) -> None:
    data = "data:image/png;base64," + base64.b64encode(CAT).decode()
    prompts = read(tmp_path, [{"prompt": "What?", "image": data}])
    assert prompts.with_media(0).media[0].encoded == (CAT,)
    pytest.importorskip("pyarrow")
    file = write_parquet(tmp_path / "p.parquet", [{"prompt": "What?", "image": {"bytes": CAT, "path": "x.png"}}])
    prompts = read_prompts(file, None, str(tmp_path / "other"), frames=2)
    assert prompts.with_media(0).media[0].encoded == (CAT,)


def test_ids_are_the_lines_unless_given(tmp_path: Path) -> None:
    prompts = read(tmp_path, [{"prompt": "What?"}, "", {"id": 5, "prompt": "Why?"}, {"id": None, "prompt": "Who?"}])
    assert [group.id for group in prompts.groups] == ["1", "5", "4"]
    assert prompts.places == (1, 3, 4)


def test_other_columns_are_counted_and_left_unread(tmp_path: Path) -> None:
    prompts = read(tmp_path, [{"prompt": "What?", "label": 1}, {"prompt": "Why?", "label": 2, "a": None}])
    assert prompts.unread == (("a", 1), ("label", 2))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("[]", "row is a list"),
        ({"image": "cat.png"}, "column 'prompt' is missing; the row has image"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' is a number"),
        ({"prompt": "<image>What?"}, "starts with <image> but the row names no picture"),
        ({"prompt": []}, "does not end with a user turn"),
        ({"prompt": [{"role": "assistant", "content": "Yes."}]}, "does not end with a user turn"),
        ({"prompt": [{"role": "tool", "content": "Yes."}]}, "roles are system, user, assistant"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "is empty"),
        ({"prompt": "What?", "images": ["cat.png"]}, "'images' is not read: the column is 'image'"),
        ({"prompt": "What?", "image": "cat.png", "video": "clip"}, "both 'image' and 'video' are set"),
        ({"prompt": "What?", "image": "../secret.png"}, "leaves the media root"),
        ({"prompt": "What?", "image": "gone.png"}, "is not under the media root"),
        ({"prompt": "What?", "image": ["cat.png", "broken.png"]}, "'broken.png': picture cannot be decoded"),
        ({"prompt": "What?", "image": "data:image/png;base64,!"}, "is not base64"),
        ({"id": "good", "prompt": "What?"}, "id 'good' is that of line 1 too"),
        ({"id": 1.5, "prompt": "What?"}, "'id' is a number, a string was expected"),
    ],
)
def test_a_bad_row_costs_itself_alone(tmp_path: Path, media: str, row: Any, reason: str) -> None:
    prompts = read(tmp_path, [{"id": "good", "prompt": "What?", "image": "cat.png"}, row], media)
    assert [group.id for group in prompts.groups] == ["good"]
    (rejected,) = prompts.rejected
    assert rejected.origin.line == 2
    assert reason in rejected.reason


def test_rows_of_an_array_on_one_line_have_no_name(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text('[{"id": "a", "prompt": "What?"}, {"id": "b", "prompt": "Why?"}]')
    prompts = read_prompts(str(file), None, str(tmp_path), frames=2)
    assert len(prompts.groups) == 1
    assert "save the rows as JSON lines" in prompts.rejected[0].reason


def test_paths_and_their_root_go_together(tmp_path: Path, media: str) -> None:
    with pytest.raises(SourceError, match="give their root with --media"):
        read(tmp_path, [{"prompt": "What?", "image": "cat.png"}])
    with pytest.raises(SourceError, match="yet no row names a picture or video under it"):
        read(tmp_path, [{"prompt": "What?"}], media)
    with pytest.raises(SourceError, match="is not a directory"):
        read(tmp_path, [{"prompt": "What?", "image": "cat.png"}], f"{media}/cat.png")


def test_a_picture_that_changes_meanwhile_is_noticed(tmp_path: Path, media: str) -> None:
    prompts = read(tmp_path, [{"prompt": "What?", "image": "cat.png"}], media)
    Path(media, "cat.png").write_bytes(picture(size=(40, 31)))
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: 'cat.png' changed since the start"):
        prompts.with_media(0)


def test_the_fingerprint_is_of_what_is_asked(tmp_path: Path, media: str) -> None:
    rows = [{"prompt": "What?", "image": "cat.png"}, {"prompt": "Why?"}]
    before = read(tmp_path, rows, media).fingerprint()
    assert read(tmp_path, [{**rows[0], "label": 1}, rows[1]], media).fingerprint() == before
    assert read(tmp_path, rows[::-1], media).fingerprint() != before
    Path(media, "cat.png").write_bytes(picture(size=(40, 31)))
    assert read(tmp_path, rows, media).fingerprint() != before

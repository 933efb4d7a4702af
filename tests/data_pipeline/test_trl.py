"""Files as `datasets` writes them for TRL: an Image is struct<bytes, path>, message parts share their fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_samples import embedded, picture, sorted_out, write_parquet, write_rows
from etils import epath

from mmrlhf_jax.data.sources import read_source
from mmrlhf_jax.data.sources.conversation import MOVED
from mmrlhf_jax.data.sources.pictures import PictureStore
from mmrlhf_jax.data.sources.rows import SourceError, SourceOptions
from mmrlhf_jax.groups import Media, Pair, Turn

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CONTENT = pa.list_(pa.struct([("text", pa.string()), ("type", pa.string())]))
PARTS = pa.list_(pa.struct([("content", CONTENT), ("role", pa.string())]))
A, B = picture(), picture(size=(7, 9))


def user(text: str, *kinds: str) -> dict[str, Any]:
    return {"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def row(**fields: Any) -> dict[str, Any]:
    base = {"prompt": [user("What?", "image")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    return {key: value for key, value in {**base, "images": ["a.png"], **fields}.items() if value is not None}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(lines: list[Any], schema: Any = None, name: str = "in.jsonl", **options: Any) -> Any:
        file = tmp_path / name
        path = write_rows(file, lines) if schema is None else write_parquet(file, lines, schema)
        store = PictureStore(epath.Path(tmp_path / "store"))
        return sorted_out(read_source("trl", [path], SourceOptions(store=store, **options)))

    return read


def test_a_conversational_parquet_with_pictures(read: Any, tmp_path: Path) -> None:
    schema = pa.schema(
        [
            ("prompt", PARTS),
            ("chosen", PARTS),
            ("rejected", PARTS),
            ("images", pa.list_(IMAGE)),
            ("margin", pa.float32()),
        ]
    )
    a, b = ({"bytes": data, "path": name} for data, name in ((A, "a.png"), (B, None)))
    lines = [
        row(images=[a], margin=0.5),
        row(images=[b], margin=1.0),
        row(images=[a], margin=1.5, rejected=[assistant("worse")]),
        row(images=[a], margin=2.0, chosen=[assistant("bad")], rejected=[assistant("worse")]),
        row(images=[], margin=0.0, prompt=[user("No picture?")]),
    ]
    (group, other, text), rejected, remarks = read(lines, schema, "in.parquet", margin_column="margin")
    assert rejected == remarks == {}
    assert group.prompt == (Turn("user", "What?"),)
    assert group.media == (embedded(A),)
    assert (tmp_path / "store" / group.media[0].path).read_bytes() == A
    assert [(r.text, r.rank) for r in group.responses] == [("good", 0), ("bad", 1), ("worse", 2)]
    assert group.pairs == (Pair(0, 1, 0.5), Pair(0, 2, 1.5), Pair(1, 2, 2.0))
    assert [(o.file, o.line) for o in group.origins] == [(str(tmp_path / "in.parquet"), n) for n in (1, 3, 4)]
    assert (other.media, text.media) == ((embedded(B),), ())


def test_the_image_column_holds_one_picture(read: Any) -> None:
    text = pa.string()
    schema = pa.schema([("prompt", text), ("chosen", text), ("rejected", text), ("image", IMAGE)])
    lines = [
        {"prompt": "What?", "chosen": "good", "rejected": "bad", "image": {"bytes": A, "path": "a.png"}},
        {"prompt": "What?", "chosen": "good", "rejected": "bad", "image": {"bytes": None, "path": "a.png"}},
        {"prompt": "What?", "chosen": "good", "rejected": "bad", "image": None},
    ]
    groups, rejected, _ = read(lines, schema, "in.parquet")
    assert rejected == {}
    assert [group.media for group in groups] == [(embedded(A),), (Media("image", "a.png"),), ()]


def test_several_turns_keep_each_picture_in_its_turn(read: Any) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        user("First?", "image"),
        assistant("A cat."),
        user("Compare.", "image", "video"),
    ]
    (group,), rejected, remarks = read([row(prompt=turns, images=["a.png", "b.png"], videos=["c.mp4"])])
    assert rejected == remarks == {}
    assert group.prompt == (
        Turn("system", "Be brief."),
        Turn("user", "First?", 1),
        Turn("assistant", "A cat."),
        Turn("user", "Compare.", 2),
    )
    assert group.media == (Media("image", "a.png"), Media("image", "b.png"), Media("video", "c.mp4"))


def test_media_that_nothing_places_stand_before_the_first_user_turn(read: Any) -> None:
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (group,), _, _ = read([row(prompt=plain, images=["a.png", "b.png"])])
    assert [turn.media for turn in group.prompt] == [0, 0, 0]
    assert group.media_before() == (2, 0, 0)


def test_markers_in_a_string_place_media_only_where_the_row_has_some(read: Any) -> None:
    lines = [
        row(prompt="<image>\nWhat?"),
        row(prompt="What is <image> in HTML?", images=None),
        row(prompt=[{"role": "user", "content": "Which of <image>\nand <image>?"}], images=["a.png", "b.png"]),
    ]
    groups, rejected, remarks = read(lines)
    assert rejected == {}
    assert [g.prompt[0].text for g in groups] == ["What?", "What is <image> in HTML?", "Which of and ?"]
    assert remarks == {MOVED: 1}


def test_a_picture_after_text_of_its_turn_is_remarked(read: Any) -> None:
    parts = [{"type": "text", "text": "See"}, {"type": "image"}, {"type": "text", "text": "and say."}]
    (group,), _, remarks = read([row(prompt=[{"role": "user", "content": parts}])])
    assert group.prompt == (Turn("user", "See\nand say."),)
    assert remarks == {MOVED: 1}


def test_the_prompt_may_be_what_both_conversations_begin_with(read: Any) -> None:
    shared = [user("First?", "image"), assistant("A cat."), user("Sure?")]
    both = {"chosen": [*shared, assistant("yes")], "rejected": [*shared, assistant("no")]}
    lines = [row(prompt=None, **both), row(prompt="Sure?", **both), row(prompt=shared, rejected=[assistant("no")])]
    (group,), rejected, _ = read(lines)
    assert group.prompt == (Turn("user", "First?"), Turn("assistant", "A cat."), Turn("user", "Sure?"))
    assert [r.text for r in group.responses] == ["yes", "good", "no"]
    assert group.pairs == (Pair(0, 2), Pair(1, 2))
    assert list(rejected) == [2]
    assert rejected[2].startswith("duplicate of")


def test_a_json_array_reads_too(read: Any) -> None:
    (group,), _, _ = read([json.dumps([row()])], name="in.json")
    assert group.media == (Media("image", "a.png"),)


BAD = {
    "one answer": (row(rejected=None), "column 'rejected' is missing; the row has chosen, images, prompt"),
    "identical": (row(rejected=[assistant("good")]), "'chosen' and 'rejected' are identical"),
    "identical conversations": (
        row(prompt=None, chosen=[user("a"), assistant("b")], rejected=[user("a"), assistant("b")]),
        "'chosen' and 'rejected' are identical",
    ),
    "no prompt at all": (row(prompt=None, chosen="a", rejected="b"), "there is no 'prompt', nor are"),
    "nothing shared": (
        row(prompt=None, chosen=[user("a"), assistant("b")], rejected=[user("c"), assistant("d")]),
        "'chosen' must be one assistant message; after the prompt it has user, assistant",
    ),
    "parted early": (
        row(prompt=None, chosen=[user("a"), assistant("b")], rejected=[user("a")]),
        "'rejected' must be one assistant message; after the prompt it has nothing",
    ),
    "two answers": (
        row(chosen=[assistant("a"), assistant("b")]),
        "'chosen' must be one assistant message; after the prompt it has assistant, assistant",
    ),
    "answer of the user": (
        row(chosen=[user("a")]),
        "'chosen' must be one assistant message; after the prompt",
    ),
    "picture in the answer": (
        row(chosen=[{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]),
        "'chosen' holds a picture or video; they belong in the prompt",
    ),
    "empty answer": (row(chosen=[assistant(" ")]), "'chosen'[1].content[1].text is empty"),
    "no user turn": (row(prompt=[assistant("a")]), "the prompt does not end with a user turn"),
    "begun answer": (row(prompt=[user("a", "image"), assistant("b")]), "the prompt does not end with a user turn"),
    "empty prompt": (row(prompt=[]), "the prompt does not end with a user turn"),
    "late system": (
        row(prompt=[user("a"), {"role": "system", "content": "b"}, user("c")]),
        "a system turn stands after other turns",
    ),
    "tool": (row(prompt=[{"role": "tool", "content": "a"}]), "'prompt'[1].role is 'tool'; roles are system, user"),
    "tools": (row(tools=[{"name": "f"}]), "'tools' are set: conversations with tools are not read"),
    "tool call": (
        row(chosen=[{"role": "assistant", "content": "a", "tool_calls": [{}]}]),
        "'chosen'[1] calls tools: conversations with tools are not read",
    ),
    "no message": (row(prompt=["a"]), "'prompt'[1] is not a message with 'role' and 'content'"),
    "no content": (row(prompt=[{"role": "user"}]), "'prompt'[1].content is null, a string was expected"),
    "a number": (row(prompt=3), "'prompt' is a number, a string was expected"),
    "unknown part": (
        row(prompt=[{"role": "user", "content": [{"type": "audio"}]}]),
        "'prompt'[1].content[1].type is 'audio'; parts are text, image, video",
    ),
    "string part": (
        row(prompt=[{"role": "user", "content": ["a"]}]),
        "'prompt'[1].content[1] is not an object",
    ),
    "picture in the part": (
        row(prompt=[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]),
        "'prompt'[1].content[1] holds image; media belong in the columns beside the messages",
    ),
    "too few pictures": (row(images=[]), "the prompt places 1 images, the row lists 0"),
    "too many pictures": (row(images=["a.png", "b.png"]), "the prompt places 1 images, the row lists 2"),
    "video for a picture": (row(images=None, videos=["a.mp4"]), "the prompt places 1 images, the row lists 0"),
    "marker too many": (row(prompt="<image><image>What?"), "the prompt places 2 images, the row lists 1"),
    "picture of the system": (
        row(prompt=[{"role": "system", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, user("b")]),
        "a picture or video stands in a turn of the system; they belong in user turns",
    ),
    "image and images": (row(image="a.png"), "both 'images' and 'image' are set: keep one"),
    "null picture": (row(images=[None]), "'images' is null, a string was expected"),
    "frames as a list": (row(images=None, videos=[["1.png"]]), "'videos' is a list, a string was expected"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_costs_only_itself(read: Any, bad: Any, reason: str) -> None:
    groups, rejected, _ = read([row(prompt="before"), bad, row(prompt="after")])
    assert [group.prompt[0].text for group in groups] == ["before", "after"]
    assert list(rejected) == [2]
    assert rejected[2].startswith(reason)


def test_what_the_file_cannot_satisfy_is_refused(read: Any) -> None:
    with pytest.raises(SourceError, match="--map belongs to --source mapped and sharegpt; trl has fixed columns"):
        read([row()], mapping={"prompt": "q"})
    with pytest.raises(SourceError, match="--margin-column 'm' is in no row"):
        read([row()], margin_column="m")

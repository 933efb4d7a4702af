"""Rows as ms-swift's Custom-dataset.md describes them, and what ms-swift itself makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_samples import embedded, picture, sorted_out, write_parquet, write_rows
from etils import epath

from mmrlhf_jax.data.sources import read_source
from mmrlhf_jax.data.sources.conversation import EARLIER_TURNS, MOVED
from mmrlhf_jax.data.sources.pictures import PictureStore
from mmrlhf_jax.data.sources.rows import SourceError, SourceOptions
from mmrlhf_jax.groups import Media, Pair, Turn

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "data" / "ms_swift_golden.json").read_text())["rows"]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def row(**fields: Any) -> dict[str, Any]:
    base = {"messages": [user("<image>What?"), bot("good")], "rejected_response": "bad", "images": ["a.png"]}
    return {key: value for key, value in {**base, **fields}.items() if value is not None}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(lines: list[Any], name: str = "in.jsonl", **options: Any) -> Any:
        path = (write_parquet if name.endswith("parquet") else write_rows)(tmp_path / name, lines)
        store = PictureStore(epath.Path(tmp_path / "store"))
        return sorted_out(read_source("ms_swift", [path], SourceOptions(store=store, **options)))

    return read


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_rows_are_read_as_ms_swift_reads_them(read: Any, number: int) -> None:
    golden = GOLDEN[number]
    (group,), rejected, _ = read([golden["row"]])
    assert rejected == {}
    sides = {name: golden["read"][name] for name in ("chosen", "rejected")}
    for place, theirs in zip((0, 1), sides.values(), strict=True):
        *asked, answer = theirs["messages"]
        assert group.responses[place].text == answer["content"]
        turns = [(m["role"], re.sub("<image>|<video>", "", m["content"])) for m in asked]
        spoken = [(turn.role, turn.text) for turn in group.prompt]
        assert spoken == [("system", theirs["system"])] * (theirs["system"] is not None) + turns
        queues = {"image": iter(theirs["images"]), "video": iter(theirs["videos"])}
        kinds = [kind for m in asked for kind in re.findall("<(image|video)>", m["content"])]
        assert [(medium.kind, medium.path) for medium in group.media] == [(kind, next(queues[kind])) for kind in kinds]
        counts = [len(re.findall("<image>|<video>", m["content"])) for m in asked]
        assert [n for n, t in zip(group.media_before(), group.prompt, strict=True) if t.role != "system"] == counts
    assert group.pairs == (Pair(0, 1),)


def test_rows_of_the_same_prompt_and_media_become_one_ranked_group(read: Any) -> None:
    lines = [
        row(margin=1),
        row(images=["b.png"], margin=1),
        row(messages=[user("<image>What?"), bot("best")], rejected_response="good", margin=2),
    ]
    (group, other), rejected, remarks = read(lines, margin_column="margin")
    assert rejected == remarks == {}
    assert (group.prompt, group.media) == ((Turn("user", "What?"),), (Media("image", "a.png"),))
    assert [(r.text, r.rank) for r in group.responses] == [("best", 0), ("good", 1), ("bad", 2)]
    assert group.pairs == (Pair(0, 1, 2.0), Pair(1, 2, 1.0))
    assert other.media == (Media("image", "b.png"),)


def test_other_spellings(read: Any) -> None:
    said = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "good"}]
    asked = {"query": "Sure?", "response": "good", "history": [["What?", "Yes."]], "system": "Be brief."}
    lines = [
        row(conversations=said, messages=None, image="a.png", images=None),
        row(messages=None, images=None, **asked),
        row(system="not this one", messages=[system("Obey."), *row()["messages"]]),
        row(system="Obey."),
    ]
    groups, rejected, remarks = read(lines)
    assert (rejected, remarks) == ({4: groups_duplicate(groups[2].origins[0])}, {})
    assert [[(t.role, t.text) for t in group.prompt] for group in groups] == [
        [("user", "What?")],
        [("system", "Be brief."), ("user", "What?"), ("assistant", "Yes."), ("user", "Sure?")],
        [("system", "Obey."), ("user", "What?")],
    ]


def groups_duplicate(origin: Any) -> str:
    return f"duplicate of {origin}"


def test_without_a_rejected_answer_the_row_is_supervised(read: Any) -> None:
    more = [user("What?"), bot("A cat."), user("Sure?"), bot("Yes.")]
    groups, rejected, remarks = read([row(rejected_response=None), row(messages=more, rejected_response=None)])
    assert rejected == {}
    assert [([r.text for r in group.responses], group.pairs) for group in groups] == [(["good"], ()), (["Yes."], ())]
    assert remarks == {EARLIER_TURNS: 1}


def test_a_tag_after_text_is_remarked(read: Any) -> None:
    (group,), _, remarks = read([row(messages=[user("What?<image>"), bot("good")])])
    assert group.prompt == (Turn("user", "What?"),)
    assert remarks == {MOVED: 1}


def test_parquet_with_pictures_in_the_rows_and_columns_that_are_null(read: Any) -> None:
    a = picture()
    none = {"ref": None, "bbox": None}
    lines = [
        row(images=[{"bytes": a, "path": None}], tools=[], objects=none, rejected_response="bad"),
        row(images=[{"bytes": a, "path": "x"}], tools=[], objects=none, rejected_response="worse"),
    ]
    for line in lines:
        line["messages"] = [{**message, "loss": None} for message in line["messages"]]
    (group,), rejected, _ = read(lines, "in.parquet")
    assert rejected == {}
    assert group.media == (embedded(a),)
    assert {r.text for r in group.responses} == {"good", "bad", "worse"}


WHOLE = {"rejected_response": None, "rejected_images": ["a.png"]}
BAD = {
    "identical": (row(rejected_response="good"), "'chosen' and 'rejected' are identical"),
    "rejected twice": (row(rejected_messages=[]), "both 'rejected_response' and 'rejected_messages' are set: keep one"),
    "empty answer": (row(rejected_response=" "), "'rejected_response' is empty"),
    "a number": (row(rejected_response=3), "'rejected_response' is a number, a string was expected"),
    "a user in the answer": (row(rejected_response=[user("a"), bot("b")]), "'rejected_response' holds a user turn"),
    "two answers": (
        row(rejected_response=[bot("a"), bot("b")]),
        "'rejected_response' must be one assistant message; after the prompt it has assistant, assistant",
    ),
    "a tag in the answer": (row(rejected_response="<image>"), "'rejected_response' is empty"),
    "a picture in the answer": (
        row(rejected_response=[bot([{"type": "image", "image": "b.png"}, {"type": "text", "text": "a"}])]),
        "'rejected_response' holds a picture or video; they belong in the prompt",
    ),
    "no messages": (row(messages=None), "the row has no 'messages' and 'conversations' and 'query': one is needed"),
    "two conversations": (row(query="a"), "the row has both 'messages' and 'query': one is needed"),
    "messages and response": (row(response="a"), "both 'messages' and 'response' are set: keep one"),
    "history of one": (
        row(messages=None, query="a", response="b", history=[["c"]], images=None),
        "'history' is not a list of [query, response]",
    ),
    "messages as text": (row(messages="a"), "'messages' is not a list of messages"),
    "message as text": (row(messages=["a"]), "'messages'[1] is not a message with 'role' and 'content'"),
    "a role of its own": (
        row(messages=[user("<image>a"), {"role": "tool", "content": "x"}, bot("b")]),
        "'messages'[2].role is 'tool'; it may be user, human, assistant, gpt, bot, system",
    ),
    "a tool call": (
        row(messages=[user("<image>a"), {**bot("b"), "tool_calls": [{}]}]),
        "'messages'[2] calls tools: conversations with tools are not read",
    ),
    "two speakers": (
        row(messages=[{**user("a"), "from": "human"}, bot("b")]),
        "'messages'[1] has both 'role' and 'from': keep one",
    ),
    "a loss": (row(messages=[user("<image>a"), {**bot("b"), "loss": False}]), "'messages'[2].loss is set"),
    "a part of sound": (
        row(messages=[user([{"type": "audio", "audio": "a.wav"}]), bot("b")]),
        "'messages'[1].content[1].type is 'audio'; parts are text, image, video",
    ),
    "media in both places": (
        row(messages=[user([{"type": "image", "image": "a.png"}, {"type": "text", "text": "a"}]), bot("b")]),
        "images stand both in the messages and in 'images': keep one",
    ),
    "no user": (row(messages=[bot("a")]), "the conversation has no user turn"),
    "no answer": (row(messages=[user("<image>a")]), "what follows the last user turn must be one assistant message"),
    "tags too many": (row(messages=[user("<image><image>a"), bot("b")]), "the prompt places 2 images, the row lists 1"),
    "a tag of a past answer": (
        row(messages=[user("a"), bot("<image>b"), user("c"), bot("d")]),
        "a picture or video stands in a turn of the assistant; they belong in user turns",
    ),
    "a picture as a tag": (row(messages=[user("<img>a.png</img>What?"), bot("b")]), "'messages'[1] holds <img>PATH</"),
    "image twice": (row(image="b.png"), "the row has both 'images' and 'image': keep one"),
    "tools": (row(tools="[f]"), "'tools' is set: conversations with tools are not read"),
    "sound": (row(audios=["a.wav"]), "'audios' is set: conversations with sound are not read"),
    "boxes": (row(objects={"ref": ["a"], "bbox": [[1, 2]]}), "'objects' is set: boxes are not read"),
    "a label": (row(rejected_response=None, label=False), "'label' is set: a group compares answers"),
    "another question": (
        row(rejected_messages=[user("<image>Why?"), bot("bad")], **WHOLE),
        "'rejected_messages' ask something else than the chosen ones: a group has one prompt",
    ),
    "another picture": (
        row(rejected_messages=[user("<image>What?"), bot("bad")], **{**WHOLE, "rejected_images": ["b.png"]}),
        "'rejected_images' are not 'images': a group's answers are about the same pictures",
    ),
    "no second picture": (
        row(rejected_messages=[user("<image>What?"), bot("bad")], rejected_response=None),
        "'rejected_messages' come without 'rejected_images'",
    ),
    "system as a list": (row(system=["a"]), "'system' is a list, a string was expected"),
    "two users": (row(messages=[user("a"), user("<image>b"), bot("c")]), "user and assistant do not take turns"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_costs_only_itself(read: Any, bad: Any, reason: str) -> None:
    groups, rejected, _ = read([row(), bad, row(images=["b.png"])])
    assert [group.origins[0].line for group in groups] == [1, 3]
    assert list(rejected) == [2]
    assert rejected[2].startswith(reason)


def test_map_is_refused_and_the_margin_is_named(read: Any) -> None:
    with pytest.raises(SourceError, match="ms_swift has fixed columns"):
        read([row()], mapping={"messages": "m"})
    with pytest.raises(SourceError, match="--margin-column 'm' is in no row"):
        read([row()], margin_column="m")
    _, _, remarks = read([row(margin=1.0)])
    assert remarks == {"column 'margin' is not read": 1}

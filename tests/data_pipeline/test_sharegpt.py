"""Rows as LLaMA-Factory's data/README.md describes them, and its own demonstration files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import SHARED, embedded, picture, sorted_out, write_parquet, write_rows
from etils import epath

from mmrlhf_jax.data.sources import read_source
from mmrlhf_jax.data.sources.conversation import EARLIER_TURNS, MOVED
from mmrlhf_jax.data.sources.pictures import PictureStore
from mmrlhf_jax.data.sources.rows import SourceError, SourceOptions
from mmrlhf_jax.groups import Media, Pair, Turn


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def row(**fields: Any) -> dict[str, Any]:
    base = {"conversations": [human("<image>What?")], "chosen": gpt("good"), "rejected": gpt("bad")}
    return {key: value for key, value in {**base, "images": ["a.png"], **fields}.items() if value is not None}


def supervised(*messages: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {"conversations": list(messages), **fields}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(lines: list[Any], name: str = "in.jsonl", **options: Any) -> Any:
        path = (write_parquet if name.endswith("parquet") else write_rows)(tmp_path / name, lines)
        store = PictureStore(epath.Path(tmp_path / "store"))
        return sorted_out(read_source("sharegpt", [path], SourceOptions(store=store, **options)))

    return read


def test_rows_of_the_same_prompt_and_media_become_one_ranked_group(read: Any) -> None:
    lines = [row(id="q", m=1), row(images=["b.png"], m=1), row(chosen=gpt("best"), rejected=gpt("good"), m=2)]
    (group, other), rejected, remarks = read(lines, margin_column="m")
    assert rejected == remarks == {}
    assert (group.id, group.prompt, group.media) == ("q", (Turn("user", "What?"),), (Media("image", "a.png"),))
    assert [(r.text, r.rank) for r in group.responses] == [("best", 0), ("good", 1), ("bad", 2)]
    assert group.pairs == (Pair(0, 1, 2.0), Pair(1, 2, 1.0))
    assert other.media == (Media("image", "b.png"),)


def test_a_picture_stays_in_its_turn(read: Any) -> None:
    turns = [human("<image>First?"), gpt("A cat."), human("<video><image>\nCompare.")]
    lines = [row(conversations=turns, images=["a.png", "b.png"], videos=["c.mp4"], system="Be brief.")]
    (group,), rejected, remarks = read(lines)
    assert rejected == remarks == {}
    assert group.prompt == (
        Turn("system", "Be brief."),
        Turn("user", "First?", 1),
        Turn("assistant", "A cat."),
        Turn("user", "Compare.", 2),
    )
    assert group.media == (Media("image", "a.png"), Media("video", "c.mp4"), Media("image", "b.png"))


def test_a_marker_after_text_is_remarked(read: Any) -> None:
    groups, _, remarks = read([row(conversations=[human("What?<image>")]), row(conversations=[human(" <image> Who?")])])
    assert [g.prompt[0].text for g in groups] == ["What?", "  Who?"]
    assert remarks == {MOVED: 1}


def test_roles_have_two_spellings_and_the_first_message_may_be_the_system(read: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    openai = {"messages": messages, "chosen": {"role": "assistant", "content": "a"}, "rejected": gpt("b")}
    (group,), rejected, _ = read([openai | {"system": "not this one"}])
    assert rejected == {}
    assert group.prompt == (Turn("system", "Be brief."), Turn("user", "What?"))


def test_columns_and_tags_may_have_other_names(read: Any) -> None:
    def said(who: str, text: str) -> dict[str, str]:
        return {"who": who, "what": text}

    mapping = {"messages": "chat", "chosen": "better", "rejected": "worse", "images": "pics", "id": "key"}
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "bot", "system_tag": "boss"}
    line = {
        "chat": [said("boss", "Obey."), said("me", "<image>What?")],
        "better": said("bot", "a"),
        "worse": said("bot", "b"),
        "pics": ["a.png"],
        "key": 7,
    }
    groups, rejected, remarks = read([line, {**line, "better": said("gpt", "a")}], mapping=mapping | tags)
    assert (groups[0].id, groups[0].media) == ("7", (Media("image", "a.png"),))
    assert groups[0].prompt == (Turn("system", "Obey."), Turn("user", "What?"))
    assert rejected == {2: "'chosen'.who is 'gpt'; it may be boss, me, bot"}
    assert remarks == {}


def test_a_preference_or_an_id_that_map_names_is_in_every_row(read: Any) -> None:
    mapping = {"chosen": "chosen", "rejected": "rejected", "id": "id", "images": "images"}
    lines = [
        row(id=1),
        row(rejected=None, chosen=None, id=2),
        row(),
        row(id=4, images=None, conversations=[human("a")]),
    ]
    groups, rejected, _ = read(lines, mapping=mapping)
    assert [group.id for group in groups] == ["1", "4"]
    assert rejected == {2: "chosen=chosen is missing", 3: "id=id is missing"}


def test_without_a_preference_the_last_answer_is_the_response(read: Any) -> None:
    one = supervised(human("<image>What?"), gpt("A cat."), images=["a.png"])
    more = supervised(human("What?"), gpt("A cat."), human("Sure?"), gpt("Yes."))
    groups, rejected, remarks = read([one, {**one, "id": "again"}, more, supervised(human("What?"), gpt("A dog."))])
    assert [([t.text for t in g.prompt], [r.text for r in g.responses], g.pairs) for g in groups] == [
        (["What?"], ["A cat."], ()),
        (["What?", "A cat.", "Sure?"], ["Yes."], ()),
        (["What?"], ["A dog."], ()),
    ]
    assert list(rejected) == [2]
    assert rejected[2].startswith("duplicate of")
    assert remarks == {EARLIER_TURNS: 1}


def test_answers_that_nobody_compared_stay_apart(read: Any) -> None:
    groups, _, _ = read([supervised(human("What?"), gpt(answer)) for answer in ("a", "b")])
    assert [len(group.responses) for group in groups] == [1, 1]


def test_parquet_with_pictures_in_the_rows(read: Any) -> None:
    a, b = picture(), picture(size=(7, 9))
    lines = [row(images=[{"bytes": a, "path": None}]), row(images=[{"bytes": b, "path": "b.png"}])]
    groups, rejected, _ = read(lines, "in.parquet")
    assert rejected == {}
    assert [group.media for group in groups] == [(embedded(a),), (embedded(b),)]
    (binary,), _, _ = read([row(images=[a])], "in.parquet")
    assert binary.media == (embedded(a),)


BAD = {
    "one alone": (row(rejected=None), "the row has 'chosen' alone: a preference needs 'chosen' and 'rejected'"),
    "identical": (row(rejected=gpt("good")), "'chosen' and 'rejected' are identical"),
    "answer as a string": (row(chosen="good"), "'chosen' is not a message with 'from' or 'role'"),
    "answer of the user": (
        row(chosen=human("x")),
        "'chosen' must be one assistant message; after the prompt it",
    ),
    "empty answer": (row(chosen=gpt(" ")), "'chosen'.value is empty"),
    "marker in the answer": (row(chosen=gpt("see <image>")), "'chosen' holds a picture or video; they belong in the"),
    "no messages": (row(conversations=None), "the row has no 'conversations' and 'messages': one is needed"),
    "both messages": (row(messages=[human("a")]), "the row has both 'conversations' and 'messages': one is needed"),
    "messages as text": (row(conversations="a"), "'conversations' is not a list of messages"),
    "empty messages": (row(conversations=[]), "'conversations' is not a list of messages"),
    "message as text": (row(conversations=["a"]), "'conversations'[1] is not a message with 'from' or 'role'"),
    "no speaker": (row(conversations=[{"value": "a"}]), "'conversations'[1] has no 'from' and 'role': one is needed"),
    "two speakers": (
        row(conversations=[{"from": "human", "role": "user", "value": "a"}]),
        "'conversations'[1] has both 'from' and 'role': one is needed",
    ),
    "tool result": (
        row(conversations=[human("a"), {"from": "function_call", "value": "f"}, {"from": "observation", "value": "b"}]),
        "'conversations'[2].from is 'function_call'; it may be system, human, user, gpt, assistant",
    ),
    "tools": (row(tools="[f]"), "'tools' are set: conversations with tools are not read"),
    "audio": (row(audios=["a.wav"]), "'audios' are set: conversations with audios are not read"),
    "tool call": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{}]}]},
        "'messages'[2] calls tools: conversations with tools are not read",
    ),
    "two users": (row(conversations=[human("a"), human("<image>b")]), "user and assistant do not take turns, the user"),
    "assistant first": (row(conversations=[gpt("a"), human("b")]), "user and assistant do not take turns, the user"),
    "prompt answered": (row(conversations=[human("<image>a"), gpt("b")]), "the prompt does not end with a user turn"),
    "no answer": (supervised(human("a")), "there is neither 'chosen' nor 'rejected', and the last message is not of"),
    "marker too few": (row(conversations=[human("What?")]), "the prompt places 0 images, the row lists 1"),
    "marker too many": (row(conversations=[human("<image><image>a")]), "the prompt places 2 images, the row lists 1"),
    "video missing": (row(conversations=[human("<image><video>a")]), "the prompt places 1 videos, the row lists 0"),
    "marker in an answer": (
        row(conversations=[human("a"), gpt("<image>b"), human("c")]),
        "a picture or video stands in a turn of the assistant; they belong in user turns",
    ),
    "marker alone": (row(conversations=[human("<image>")]), "'conversations'[1].value is empty"),
    "number as text": (row(conversations=[{"from": "human", "value": 3}]), "'conversations'[1].value is a number"),
    "system as a list": (row(system=["a"]), "'system' is a list, a string was expected"),
    "frames as a list": (
        row(conversations=[human("<video>a")], images=None, videos=[["1.png"]]),
        "'videos' is a list, a string was expected",
    ),
}


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_costs_only_itself(read: Any, bad: Any, reason: str) -> None:
    groups, rejected, _ = read([row(id="before"), bad, row(id="after", images=["b.png"])])
    assert [group.id for group in groups] == ["before", "after"]
    assert list(rejected) == [2]
    assert rejected[2].startswith(reason)


def test_a_map_that_cannot_be_right_is_refused(read: Any) -> None:
    with pytest.raises(SourceError, match="--map does not know prompt; it knows messages, chosen, rejected, images"):
        read([row()], mapping={"prompt": "q"})
    with pytest.raises(SourceError, match="--map images 'pics' is in no row; columns are chosen, conversations"):
        read([row()], mapping={"images": "pics"})


def test_llama_factory_s_demonstration_files_read_whole() -> None:
    folder = SHARED / "data" / "sharegpt_demo"
    if not folder.exists():
        pytest.skip("needs sharegpt_demo/ in the shared folder beside the repository")
    for name, kind in (("mllm_demo.json", "image"), ("mllm_video_demo.json", "video")):
        raw = json.loads((folder / name).read_text())
        groups, rejected, remarks = sorted_out(read_source("sharegpt", [str(folder / name)]))
        assert rejected == {}
        assert len(groups) == len(raw)
        assert [[m.path for m in g.media] for g in groups] == [line.get(f"{kind}s", []) for line in raw]
        assert [g.responses[0].text for g in groups] == [line["messages"][-1]["content"] for line in raw]
        assert remarks.get(EARLIER_TURNS, 0) == sum(len(line["messages"]) > 2 for line in raw)
        if kind == "image":  # "<image>Who are they?", ..., "What are they doing?<image>"
            assert groups[0].media_before() == (1, 0, 1)
            assert remarks[MOVED] == sum(line["messages"][2]["content"].endswith("<image>") for line in raw)

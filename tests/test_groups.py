from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from mmrlhf_jax.groups import Group, Media, Origin, Pair, Response, Turn

TURNS = (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
GROUP = Group(
    id="q",
    prompt=TURNS,
    media=(Media("image", "a.png", ((4, 3),), "one"), Media("video", "clip", ((4, 3), (4, 3)), "two")),
    responses=(Response("x"), Response("y", 1, 0.5, "worse")),
    pairs=(Pair(0, 1, 2.0),),
    origins=(Origin("in.jsonl", 7),),
)


def placed(*counts: int) -> Group:
    turns = (dataclasses.replace(turn, media=count) for turn, count in zip(TURNS, counts, strict=True))
    return dataclasses.replace(GROUP, prompt=tuple(turns))


def test_media_stand_before_the_first_user_turn_unless_turns_say_otherwise() -> None:
    assert GROUP.media_before() == (0, 2, 0, 0)
    assert placed(0, 1, 0, 1).media_before() == (0, 1, 0, 1)
    assert dataclasses.replace(GROUP, media=()).media_before() == (0, 0, 0, 0)


@pytest.mark.parametrize("group", [GROUP, placed(0, 1, 0, 1)])
def test_a_group_comes_back_from_json(group: Group) -> None:
    assert Group.from_json(group.to_json()) == group


def test_groups_that_say_nothing_are_stored_and_named_as_before_they_could() -> None:
    turns = json.loads(GROUP.to_json())["prompt"]
    assert turns == [{"role": turn.role, "text": turn.text} for turn in TURNS]
    content = {
        "prompt": [["system", "s"], ["user", "a"], ["assistant", "b"], ["user", "c"]],
        "media": [["image", "one"], ["video", "two"]],
        "responses": ["x", "y"],
    }
    assert GROUP.content_hash() == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def test_the_content_hash_knows_where_media_stand() -> None:
    assert placed(0, 2, 0, 0).content_hash() == GROUP.content_hash()
    assert len({g.content_hash() for g in (GROUP, placed(0, 1, 0, 1), placed(0, 0, 0, 2))}) == 3

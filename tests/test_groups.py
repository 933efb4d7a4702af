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


RATED = dataclasses.replace(
    GROUP, responses=(Response("x", ratings=(("brief", 0.5), ("kind", 2.0))), Response("y", 1)), facts=("A cat.",)
)


@pytest.mark.parametrize("group", [GROUP, placed(0, 1, 0, 1), RATED])
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


def test_ratings_and_facts_are_stored_where_there_are_some_and_change_no_log_prob() -> None:
    assert not {"facts", "ratings"} & {name for part in (GROUP.to_json(),) for name in json.loads(part)}
    assert all("ratings" not in response for response in json.loads(GROUP.to_json())["responses"])
    bare = dataclasses.replace(RATED, facts=(), responses=(Response("x"), Response("y", 1)))
    assert (
        RATED.content_hash() == bare.content_hash() != RATED.content_hash(facts=True) != bare.content_hash(facts=True)
    )


def test_the_content_hash_knows_where_media_stand() -> None:
    assert placed(0, 2, 0, 0).content_hash() == GROUP.content_hash()
    assert len({g.content_hash() for g in (GROUP, placed(0, 1, 0, 1), placed(0, 0, 0, 2))}) == 3

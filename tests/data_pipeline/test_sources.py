from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import SHARED, row, sorted_out, write_rows

from mmrlhf_jax.data.ranking import pairs_of
from mmrlhf_jax.data.sources import read_source, rows
from mmrlhf_jax.data.sources.rows import SourceError, SourceOptions
from mmrlhf_jax.groups import Group, Media, Pair


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(lines: list[Any], *, name: str = "in.jsonl", source: str = "mm_rlhf", **options: Any) -> Any:
        return sorted_out(read_source(source, [write_rows(tmp_path / name, lines)], SourceOptions(**options)))

    return read


def test_the_real_rewardbench_is_46_groups_whose_ranks_give_its_170_pairs() -> None:
    file = SHARED / "data" / "mm_reward_bench.jsonl"
    if not file.exists():
        pytest.skip("needs mm_reward_bench.jsonl in the shared folder beside the repository")
    items = list(read_source("mm_rlhf", [str(file)]))
    assert len(items) == 46
    assert all(isinstance(item, Group) for item in items)
    found = set()
    for group in items:
        for i, j in pairs_of([r.rank for r in group.responses]):
            found.add((group.id, group.responses[i].text, group.responses[j].text))
        assert all(response.reason for response in group.responses)
    raw = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(raw) == 170
    assert found == {(r["id"], r["chosen"], r["rejected"]) for r in raw}


# MM-RLHF rows.


def test_rows_of_one_query_become_one_ranked_group_wherever_they_stand(read: Any) -> None:
    lines = [
        row(chosen="b", rejected="c", chosen_reason="better", rejected_reason="worse"),
        row(id="other"),
        row(chosen="a", rejected="c"),
        row(chosen="a", rejected="b", chosen_reason="best"),
    ]
    (group, other), rejected, _ = read(lines)
    assert [(r.text, r.rank, r.reason) for r in group.responses] == [
        ("a", 0, "best"),
        ("b", 1, "better"),
        ("c", 2, "worse"),
    ]
    assert group.pairs == (Pair(0, 1), Pair(0, 2), Pair(1, 2))
    assert [origin.line for origin in group.origins] == [1, 3, 4]
    assert other.id == "other"
    assert rejected == {}


def test_the_key_of_a_group_is_id_prompt_and_media(read: Any) -> None:
    groups, _, _ = read([row(), row(prompt="Why?"), row(image="b.png"), row(image=None), row(id="r")])
    assert len(groups) == 5


def test_media_are_a_picture_several_a_video_or_none(read: Any) -> None:
    lines = [row(), row(image=["a.png", "b.png"]), row(image=None, video="clip"), row(image=None)]
    groups, _, _ = read(lines)
    assert [group.media for group in groups] == [
        (Media("image", "a.png"),),
        (Media("image", "a.png"), Media("image", "b.png")),
        (Media("video", "clip"),),
        (),
    ]


def test_markers_before_the_prompt_are_removed_elsewhere_they_are_text(read: Any) -> None:
    lines = [
        row(prompt="<image>\nWhat?"),
        row(prompt="<image>Is <image> a tag?"),
        row(prompt="<image><image>\nWhich?", image=["a.png", "b.png"]),
    ]
    groups, _, _ = read(lines)
    assert [group.prompt[0].text for group in groups] == ["What?", "Is <image> a tag?", "Which?"]


def test_a_margin_column_gives_each_pair_its_margin(read: Any) -> None:
    lines = [row(margin=1.5), row(chosen="good", rejected="worse", margin=2), row(chosen="bad", rejected="worse")]
    (group,), rejected, _ = read(lines, margin_column="margin")
    assert group.pairs == (Pair(0, 1, 1.5), Pair(0, 2, 2.0))
    assert rejected == {3: "margin column 'margin' is missing"}


def test_an_unknown_margin_column_names_the_columns_there_are(read: Any) -> None:
    with pytest.raises(SourceError, match="'margn' is in no row; columns are chosen, id, image, prompt, rejected, s"):
        read([row(s=1)], margin_column="margn")


def test_unknown_columns_are_counted_once(read: Any) -> None:
    _, rejected, remarks = read([row(ls_factor=1, extra="x"), row(chosen="best", ls_factor=2)])
    assert rejected == {}
    assert remarks == {"column 'ls_factor' is not read": 2, "column 'extra' is not read": 1}


def test_a_second_reason_for_a_response_is_remarked(read: Any) -> None:
    lines = [row(chosen_reason="one"), row(rejected="worse", chosen_reason="two")]
    (group,), _, remarks = read(lines)
    assert group.responses[0].reason == "one"
    assert remarks == {"another reason for a response that has one already; the first is kept": 1}


def test_a_tie_joins_both_responses_without_a_pair(read: Any) -> None:
    lines = [row(chosen="a", rejected="c"), row(chosen="b", rejected="c"), row(chosen="b", rejected="a", is_tie=True)]
    (group,), _, _ = read(lines)
    assert [(r.text, r.rank) for r in group.responses] == [("a", 0), ("b", 0), ("c", 1)]
    assert group.pairs == (Pair(0, 2), Pair(1, 2))
    assert group.ties == ((0, 1),)
    assert Group.from_json(group.to_json()) == group


def test_a_tie_is_kept_where_the_rest_was_not_compared(read: Any) -> None:
    (alone,), _, _ = read([row(chosen="a", rejected="b", is_tie=True)])
    assert (alone.pairs, alone.ties) == ((), ((0, 1),))
    (half,), _, _ = read([row(chosen="b", rejected="c"), row(chosen="b", rejected="a", is_tie=True)])
    assert [half.responses[k].text for k in half.ties[0]] == ["b", "a"]
    assert len(half.pairs) == 1  # nobody said that a is better than c
    (bare,), _, _ = read([row(chosen="a", rejected="b"), row(chosen="a", rejected="c")])
    assert bare.ties == ()
    assert '"ties"' not in bare.to_json()  # stored as before it existed


def test_rows_that_contradict_each_other_are_all_rejected_and_nobody_else(read: Any) -> None:
    cycle = [row(chosen=a, rejected=b) for a, b in (("a", "b"), ("b", "c"), ("c", "a"))]
    (good,), rejected, _ = read([*cycle, row(id="good")])
    assert good.id == "good"
    assert sorted(rejected) == [1, 2, 3]
    assert all("contradict each other" in reason and "in.jsonl:3" in reason for reason in rejected.values())
    tie = [row(), row(is_tie=True)]
    assert sorted(read(tie)[1]) == [1, 2]


def test_duplicate_rows_are_dropped_and_listed(read: Any, tmp_path: Path) -> None:
    (group,), rejected, _ = read([row(), row(chosen_reason="now with a reason"), row()])
    assert group.pairs == (Pair(0, 1),)
    assert rejected == {2: f"duplicate of {tmp_path}/in.jsonl:1", 3: f"duplicate of {tmp_path}/in.jsonl:1"}


def test_two_margins_for_one_pair_reject_the_group_each_row_once(read: Any) -> None:
    lines = [row(m=1), row(m=1), row(m=2), row(id="good", m=1)]
    groups, rejected, _ = read(lines, margin_column="m")
    assert [group.id for group in groups] == ["good"]
    assert sorted(rejected) == [1, 2, 3]
    assert "two margins for one pair" in rejected[2]


BAD_ROWS = {
    "empty response": (row(chosen=" \n"), "'chosen' is empty"),
    "empty rejected": (row(rejected=""), "'rejected' is empty"),
    "empty prompt": (row(prompt="<image>\n"), "'prompt' is empty"),
    "identical": (row(rejected="good"), "'chosen' and 'rejected' are identical"),
    "missing column": (row(rejected=None), "column 'rejected' is missing; the row has chosen, id, image, prompt"),
    "both media": (row(video="clip"), "both 'image' and 'video' are set: keep one"),
    "no pictures": (row(image=[]), "'image' is an empty list: name a picture or leave it out"),
    "empty path": (row(image=""), "'image' is empty"),
    "picture is a number": (row(image=3), "'image' is a number, a string was expected"),
    "marker without picture": (row(image=None, prompt="<image>\nx"), "'prompt' starts with <image> but the row names"),
    "response is a list": (row(chosen=["a"]), "'chosen' is a list, a string was expected"),
    "tie is text": (row(is_tie="no"), "'is_tie' is not a boolean"),
    "boolean id": (row(id=True), "'id' is a boolean, a string was expected"),
    "reason is a number": (row(chosen_reason=5), "'chosen_reason' is a number, a string was expected"),
    "invalid JSON": ('{"id": ', "invalid JSON: Expecting value at column 8"),
    "not an object": ("[1, 2]", "row is a list, an object was expected"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8 at byte 8"),
    "NaN": ('{"id": NaN}', "NaN is not JSON"),
    "same key twice": ('{"id": "a", "id": "b"}', "key 'id' appears twice"),
    "NUL": (row(prompt="a\0b"), "NUL character in prompt"),
    "lone surrogate": (row(chosen="\ud800"), "lone surrogate in chosen"),
    "too deep": ("[" * 200_000, "invalid JSON: nested too deeply"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_costs_only_itself(read: Any, bad: Any, reason: str) -> None:
    groups, rejected, _ = read([row(id="before"), bad, "", row(id="after")])
    assert [group.id for group in groups] == ["before", "after"]
    assert list(rejected) == [2]
    assert rejected[2].startswith(reason)


@pytest.mark.parametrize(
    ("margin", "reason"),
    [("true", "is a boolean"), ('"1"', "is a string"), ("null", "is null"), ("1e999", "is not finite"), ("NaN", "NaN")],
)
def test_a_margin_is_a_finite_number(read: Any, margin: str, reason: str) -> None:
    bad = json.dumps(row())[:-1] + f', "m": {margin}}}'
    groups, rejected, _ = read([row(id="good", m=1), bad], margin_column="m")
    assert len(groups) == 1
    assert reason in rejected[2]


def test_an_oversized_row_is_passed_over(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 200)
    (group,), rejected, _ = read([row(prompt="x" * 3_000_000), row()])
    assert group.origins[0].line == 2
    assert rejected == {1: "row is over 200 bytes: large pictures belong in files"}


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(read: Any) -> None:
    groups, rejected, _ = read([b"\xef\xbb\xbf" + json.dumps(row()).encode() + b"\r"])
    assert len(groups) == 1
    assert rejected == {}


def test_a_json_array_reads_like_lines(read: Any) -> None:
    good, bad = json.dumps(row(), indent=1), json.dumps(row(chosen="", id="é"))
    (group,), rejected, _ = read([f"[\n{good},\n{bad},\n[]]\n"], name="in.json")
    assert group.origins[0].line == 2
    assert rejected == {9: "'chosen' is empty", 10: "row is a list, an object was expected"}


@pytest.mark.parametrize("text", ["[{}, {]", "[{} {}]", "[{}", "[{}] {}"])
def test_a_broken_json_array_is_refused_whole(read: Any, text: str) -> None:
    with pytest.raises(SourceError, match="save the rows as JSON lines"):
        read([text], name="in.json")


def test_files_and_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone.jsonl does not exist: correct --input"):
        list(read_source("mm_rlhf", [str(tmp_path / "gone.jsonl")]))
    with pytest.raises(SourceError, match="is a directory: name the files in it"):
        list(read_source("mm_rlhf", [str(tmp_path)]))
    with pytest.raises(SourceError, match="unknown source 'x': choose one of mapped, mm_rlhf"):
        read_source("x", [])


def test_options_of_another_source_are_refused(read: Any) -> None:
    with pytest.raises(SourceError, match="--map belongs to --source mapped"):
        read([row()], mapping={"prompt": "q"})
    with pytest.raises(SourceError, match="--margin-column belongs to --source mm_rlhf"):
        read([row()], source="mapped", mapping={"prompt": "q", "responses": "r"}, margin_column="m")


# Fields named by the user.

FLAT = {"prompt": "q", "responses": "answers", "rank": "order", "reason": "why", "image": "pic"}


def flat(**fields: Any) -> dict[str, Any]:
    return {
        "q": "What?",
        "answers": ["x", "y", "z"],
        "order": [2, 1, 2],
        "why": ["a", "b", None],
        "pic": None,
        **fields,
    }


def responses(group: Group) -> list[tuple[str, int, str | None]]:
    return [(r.text, r.rank, r.reason) for r in group.responses]


def test_lists_beside_the_responses(read: Any, tmp_path: Path) -> None:
    (group,), _, _ = read([flat()], source="mapped", mapping=FLAT)
    assert responses(group) == [("y", 0, "b"), ("x", 1, "a"), ("z", 1, None)]
    assert group.pairs == (Pair(0, 1), Pair(0, 2))
    assert group.id == f"{tmp_path}/in.jsonl:1"


def test_values_inside_each_response(read: Any) -> None:
    line = {
        "meta": {"q": "What?", "key": 7},
        "answers": [{"t": {"en": "x"}, "s": 1.5, "r": 2}, {"t": {"en": "y"}, "s": 2, "r": 1}],
        "order": "[2>1]",
    }
    inside = {"prompt": "meta.q", "id": "meta.key", "responses": "answers", "text": "t.en", "score": "s", "rank": "r"}
    (group,), _, _ = read([line], source="mapped", mapping=inside)
    assert [(r.text, r.rank, r.score) for r in group.responses] == [("y", 0, 2.0), ("x", 1, 1.5)]
    assert group.id == "7"
    (same,), _, _ = read([line], source="mapped", mapping={**inside, "rank": "/order"})
    assert same.responses == group.responses


def test_responses_by_name(read: Any) -> None:
    line = {"q": "What?", "answers": {"gpt": "x", "qwen": "y"}, "order": {"qwen": 1, "gpt": 2}, "pic": "a.png"}
    (group,), _, _ = read([line], source="mapped", mapping={k: v for k, v in FLAT.items() if k != "reason"})
    assert responses(group) == [("y", 0, None), ("x", 1, None)]
    assert group.media == (Media("image", "a.png"),)


@pytest.mark.parametrize(
    ("order", "ranks"),
    [("[1>2=3]", [0, 1, 1]), ("2 > 3 > 1", [2, 0, 1]), ("[1=2=3]", [0, 0, 0]), ([1.5, 3, 1.5], [0, 1, 0])],
)
def test_ranks_are_numbers_or_a_rank_string(read: Any, order: Any, ranks: list[int]) -> None:
    (group,), _, _ = read([flat(order=order)], source="mapped", mapping=FLAT)
    rank_of = {r.text: r.rank for r in group.responses}
    assert [rank_of[text] for text in "xyz"] == ranks


def test_a_single_response_is_a_group_without_pairs(read: Any) -> None:
    mapping = {"prompt": "q", "responses": "answers"}
    (group,), rejected, _ = read([{"q": "What?", "answers": ["only"]}], source="mapped", mapping=mapping)
    assert responses(group) == [("only", 0, None)]
    assert group.pairs == ()
    assert rejected == {}


def test_without_ranks_no_response_is_preferred(read: Any) -> None:
    (group,), _, _ = read([flat()], source="mapped", mapping={"prompt": "q", "responses": "answers"})
    assert group.pairs == ()


def test_either_picture_or_video_may_be_absent_where_both_are_mapped(read: Any) -> None:
    mapping = {"prompt": "q", "responses": "answers", "image": "pic", "video": "clip"}
    lines = [{"q": "a", "answers": ["x"], "pic": "a.png"}, {"q": "b", "answers": ["x"], "clip": "c"}]
    groups, rejected, _ = read([*lines, {"q": "c", "answers": ["x"]}], source="mapped", mapping=mapping)
    assert [group.media[0].kind for group in groups] == ["image", "video"]
    assert rejected == {3: "image=pic is missing"}


def test_the_same_response_twice_is_one_if_nothing_speaks_against_it(read: Any) -> None:
    twice = {"answers": ["x", "x", "y"]}
    groups, rejected, _ = read(
        [flat(**twice, order=[1, 1, 2]), flat(**twice, order=[1, 2, 3])], source="mapped", mapping=FLAT
    )
    assert responses(groups[0]) == [("x", 0, "a"), ("y", 1, None)]
    assert rejected == {2: "response 2 repeats an earlier one with another rank, score or rating"}


def test_repeated_queries_are_duplicates(read: Any, tmp_path: Path) -> None:
    groups, rejected, _ = read([flat(), flat(), flat(order=[1, 2, 3])], source="mapped", mapping=FLAT)
    assert len(groups) == 2
    assert rejected == {2: f"duplicate of {tmp_path}/in.jsonl:1"}


BAD_MAPPED = {
    "absent later": ({"q": "What?", "answers": ["x"]}, "image=pic is missing"),
    "empty response": (flat(answers=["x", "", "z"]), "response 2 is empty"),
    "no responses": (flat(answers=[]), "responses is not a list (or object) of at least one response"),
    "rank of nobody": (flat(order="[1>2>4]"), "rank '[1>2>4]' does not name each of the 3 responses once"),
    "rank is prose": (flat(order="x is best"), "rank 'x is best' is not of the form [1>2=3>4]"),
    "ranks too few": (flat(order=[1, 2]), "rank has 2 values, there are 3 responses"),
    "rank null": (flat(order=None), "rank of response 1 is null, a number was expected"),
    "reasons are text": (flat(why="because"), "reason is not a list, there are 3 responses"),
}


RATED = {**FLAT, "ratings": "rated", "facts": "known"}


def test_ratings_are_those_there_are_and_facts_a_text_or_several(read: Any) -> None:
    rated = [{"brief": 0.5, "kind": None}, None, {"kind": 2, "brief": 1}]
    lines = [flat(rated=rated, known="A cat."), flat(q="b", rated=[{}] * 3, known=["one", "two"])]
    groups, _, _ = read([*lines, flat(q="c", rated=[{}] * 3, known=None)], source="mapped", mapping=RATED)
    assert {r.text: r.ratings for r in groups[0].responses} == {
        "x": (("brief", 0.5),), "y": (), "z": (("brief", 1.0), ("kind", 2.0))
    }  # fmt: skip
    assert [group.facts for group in groups] == [("A cat.",), ("one", "two"), ()]
    inside = {"prompt": "q", "responses": "answers", "text": "t", "ratings": "by.us"}
    line = {"q": "?", "answers": [{"t": "x", "by": {"us": {"kind": 1}}}, {"t": "y", "by": {"us": None}}]}
    (group,), _, _ = read([line], source="mapped", mapping=inside)
    assert [r.ratings for r in group.responses] == [(("kind", 1.0),), ()]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rated": [1, 2, 3]}, "ratings of response 1: an object attribute -> number was expected"),
        ({"rated": [{"kind": "very"}, {}, {}]}, "ratings of response 1: 'kind' is a string, a number was expected"),
        ({"rated": [{"kind": True}, {}, {}]}, "ratings of response 1: 'kind' is a boolean, a number was expected"),
        ({"rated": [{}, {}]}, "ratings has 2 values, there are 3 responses"),
        ({"rated": [{str(n): n for n in range(65)}, {}, {}]}, "65 attributes, more than 64"),
        ({"known": ["a", ""]}, "fact 2 is empty"),
        ({"known": {"a": 1}}, "fact 1 is an object, a string was expected"),
        ({"known": ["a"] * 257}, "257 facts, more than 256: keep fewer"),
        ({"answers": ["x", "x", "y"], "rated": [{"kind": 1}, {"kind": 2}, {}], "order": [1, 1, 2]}, "or rating"),
    ],
)
def test_bad_ratings_and_facts_cost_their_row_only(read: Any, fields: dict[str, Any], reason: str) -> None:
    good = flat(rated=[{}, {}, {}], known=None)
    groups, rejected, _ = read([good, {**good, **fields}], source="mapped", mapping=RATED)
    assert len(groups) == 1
    assert rejected.keys() == {2}
    assert reason in rejected[2]


@pytest.mark.parametrize(("bad", "reason"), BAD_MAPPED.values(), ids=BAD_MAPPED.keys())
def test_a_bad_mapped_row_costs_only_itself(read: Any, bad: Any, reason: str) -> None:
    groups, rejected, _ = read([flat(), bad, flat(q="other")], source="mapped", mapping=FLAT)
    assert len(groups) == 2
    assert rejected == {2: reason}


def test_a_map_that_cannot_be_right_is_refused_at_once(read: Any) -> None:
    cases = [
        ({**FLAT, "reason": "whi"}, "reason=whi is missing; it has q, answers, order, why, pic: correct --map"),
        ({**FLAT, "prompt": "q.text"}, "prompt=q.text is missing"),
        ({**FLAT, "title": "q"}, "--map does not know title; it knows prompt, responses, id"),
        ({"prompt": "q"}, "--source mapped needs --map responses=FIELD"),
    ]
    for mapping, message in cases:
        with pytest.raises(SourceError, match=message.replace(".", r"\.")):
            read([flat()], source="mapped", mapping=mapping)
    with pytest.raises(SourceError, match=r"so --map needs text=FIELD; it has q, answers, answers\[\]\.t"):
        read([{"q": "x", "answers": [{"t": "y"}]}], source="mapped", mapping={"prompt": "q", "responses": "answers"})

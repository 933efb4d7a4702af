"""What becomes of sampled answers: what is compared, counted, and written for launch/prepare.py."""

import dataclasses

import pytest

from mmrlhf_jax.command import CommandError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.rounds.attributes import of_program, of_world
from mmrlhf_jax.rounds.candidates import (
    MAPPING,
    Candidates,
    Counted,
    Tally,
    best_rows,
    candidates_of,
    preference_rows,
    read_scored,
    steer_rows,
)
from mmrlhf_jax.rounds.prompts import Prompt, read_prompt_file, shares, write_lines
from mmrlhf_jax.rounds.ranking import all_pairs

PROMPTS = {name: Prompt(name, f"What is {name}?") for name in ("a", "b", "c", "d")}


def answered(name, *texts):
    said = [{"text": text.removesuffix("..."), "tokens": 3, "ended": not text.endswith("...")} for text in texts]
    return {"id": name, "line": 1, "prompt": f"What is {name}?", "responses": said}


def scored(name, **scores):
    attributes = tuple({"wrong": -score} for score in scores.values())
    return Candidates(PROMPTS[name], tuple(scores), attributes, tuple(scores.values()))


def test_answers_that_are_cut_off_blank_unreadable_or_repeated_are_not_compared():
    tally = Tally()
    said = [answered("a", "one", "two", "one", "thr...", " ", "a\0b", "\ud800"), answered("b", "x...")]
    assert candidates_of(PROMPTS, said, tally) == [Candidates(PROMPTS["a"], ("one", "two"), ({}, {}))]
    assert tally.counted == Counted(prompts=2, answers=8, cut=2, blank=1, unreadable=2, repeated=1)


def test_pairs_carry_their_gap_and_every_prompt_is_counted():
    tally = Tally()
    every = [scored("a", x=1.0, y=3.0, z=0.0), scored("b", x=1.0, y=1.0), scored("c", x=1.0, y=1.5), scored("d", x=0.0)]
    rows = list(preference_rows(every, all_pairs, 1.0, tally))
    assert [(row["id"], row["chosen"], row["rejected"], row["margin"]) for row in rows] == [
        ("a", "x", "z", 1.0), ("a", "y", "x", 2.0), ("a", "y", "z", 3.0)
    ]  # fmt: skip
    assert tally.counted == Counted(used=1, pairs=3, tied=1, near=1, alone=1)


def test_a_partial_order_survives_prepare(tmp_path):
    """0 beats 2 and says nothing of 1; in the next group everything is ranked."""
    every = [scored("a", x=1.2, y=0.6, z=0.0), scored("b", p=0.0, q=2.0, r=4.0)]
    write_lines(tmp_path / "ranked.jsonl", preference_rows(every, all_pairs, 1.0, Tally()))
    prepare(
        PrepareOptions(
            source="mm_rlhf",
            inputs=(str(tmp_path / "ranked.jsonl"),),
            output=str(tmp_path / "data"),
            media=None,
            source_options=SourceOptions(margin_column="margin"),
        )
    )
    first, second = open_dataset(str(tmp_path / "data")).groups()
    texts = [response.text for response in first.responses]
    assert [(texts[p.chosen], texts[p.rejected], p.margin) for p in first.pairs] == [("x", "z", 1.2)]
    assert [(r.text, r.rank) for r in second.responses] == [("r", 0), ("q", 1), ("p", 2)]
    assert [(p.chosen, p.rejected, p.margin) for p in second.pairs] == [(0, 1, 2.0), (0, 2, 4.0), (1, 2, 2.0)]


def test_rejection_sampling_keeps_one_answer_that_prepare_reads(tmp_path):
    write_lines(tmp_path / "ranked.jsonl", best_rows([scored("a", x=1.0, y=3.0), scored("d", x=0.0)], Tally()))
    mapping = dict(pair.split("=") for pair in MAPPING)
    options = PrepareOptions(
        source="mapped", inputs=(str(tmp_path / "ranked.jsonl"),), output=str(tmp_path / "data"), media=None,
        source_options=SourceOptions(mapping),
    )  # fmt: skip
    prepare(options)
    groups = open_dataset(str(tmp_path / "data")).groups()
    assert [(group.id, [r.text for r in group.responses]) for group in groups] == [("a", ["y"]), ("d", ["x"])]


def test_steered_prompts_say_each_answers_own_levels():
    rows = list(steer_rows([scored("a", x=0.0, y=-4.0), scored("b", z=-1.0)], ["wrong"], Tally()))
    assert [(row["id"], row["prompt"], row["responses"]) for row in rows] == [
        ("a#0", "What is a? wrong 0", ["x"]), ("a#1", "What is a? wrong 4", ["y"]), ("b#0", "What is b? wrong 1", ["z"])
    ]  # fmt: skip


def test_scored_lines_come_back():
    each = scored("a", x=1.0, y=3.0)
    assert read_scored([each.to_json()]) == [each]


def test_attributes_of_a_board_are_counted():
    row = {"id": "a", "question": "Which digits are in row 1?", "board": [[3, None, 7], [1, 1, 1], [2, 2, 2]]}
    each = Candidates(Prompt("a", row["question"]), ("3 empty 7.", "3 0 7.", "3."), ({}, {}, {}))
    assert of_world([each], {"a": row}) == [(
        {"supported": 3, "claims": 3, "wrong": 0}, {"supported": 2, "claims": 3, "wrong": 1},
        {"supported": 1, "claims": 1, "wrong": 2},
    )]  # fmt: skip


def test_a_program_that_says_something_else_is_refused(tmp_path):
    each = scored("a", x=1.0, y=3.0)
    file = tmp_path / "out.jsonl"
    write_lines(file, [{"attributes": [{"polite": 1}, {"polite": 0.5}]}])
    assert of_program([each], file) == [({"polite": 1.0}, {"polite": 0.5})]
    for bad in ([{"polite": 1}], [{"polite": True}, {}], [{"polite": float("nan")}, {}], "x"):
        write_lines(file, [{"attributes": bad}])
        with pytest.raises(CommandError, match=r"out.jsonl:1: 'attributes' must be a list of 2 objects"):
            of_program([each], file)
    write_lines(file, [])
    with pytest.raises(CommandError, match="has 0 lines for the 1"):
        of_program([each], file)


def test_each_prompt_is_asked_in_one_round_and_more_rounds_change_none():
    prompts = [Prompt(str(i), "?") for i in range(10)]
    three = shares(prompts, 3, None, seed=0)
    assert [len(share) for share in three] == [3, 3, 3]
    assert len({prompt.id for share in three for prompt in share}) == 9
    assert shares(prompts, 2, 2, seed=0) == shares(prompts, 5, 2, seed=0)[:2]
    assert shares(prompts, 3, 3, seed=0) == three
    assert shares(prompts, 3, None, seed=1) != three
    with pytest.raises(CommandError, match="6 rounds of 2 prompts need 12, there are 10"):
        shares(prompts, 6, 2, seed=0)


def test_prompt_files_are_refused_by_line(tmp_path):
    rows = [{"prompt": "Why?"}, {"id": "x", "prompt": "How?", "image": "a.png"}, {"id": "x", "prompt": "?"},
            {"id": "y", "prompt": [{"role": "user", "content": "?"}]}]  # fmt: skip
    write_lines(tmp_path / "p.jsonl", rows)
    with pytest.raises(CommandError) as caught:
        read_prompt_file(str(tmp_path / "p.jsonl"))
    assert "2 rows cannot be asked" in str(caught.value)
    assert "p.jsonl:3: id 'x' stands on an earlier line" in str(caught.value)
    assert "p.jsonl:4: 'prompt' is no string" in str(caught.value)
    write_lines(tmp_path / "p.jsonl", [*rows[:2], {"id": "z", "prompt": "What?", "images": ["a.png"]}])
    with pytest.raises(CommandError, match=r"p.jsonl:3: 'images' is not read; name it 'image'"):
        read_prompt_file(str(tmp_path / "p.jsonl"))
    write_lines(tmp_path / "p.jsonl", rows[:2])
    assert read_prompt_file(str(tmp_path / "p.jsonl")) == [Prompt("1", "Why?"), Prompt("x", "How?", "a.png")]


def test_counts_add_up_field_by_field():
    one = Counted(*range(len(dataclasses.fields(Counted))))
    assert one + one == Counted(*(2 * i for i in range(len(dataclasses.fields(Counted)))))

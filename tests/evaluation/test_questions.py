"""Questions and the answers to them: which belong together, which rows are refused, which figures are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from answered import judged, no_store, questions_of
from data_samples import write_rows

from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.pope import BENCHMARK
from mmrlhf_jax.evaluation.questions import Answer, by_category, read_answers, read_questions, records_of

NO_IDS = r"names no ids and has 1 rows for 2 questions: give each its 'id'"


@pytest.fixture
def questions(tmp_path: Path) -> Any:
    rows = [{"question_id": i, "image": "a.jpg", "text": f"Is it {i}?", "label": "yes"} for i in (1, 2)]
    return questions_of(BENCHMARK, tmp_path, rows, "coco_pope_random.jsonl")


@pytest.fixture
def answers(tmp_path: Path, questions: Any) -> Any:
    def read(*rows: Any, **more: Any) -> list[tuple[Answer, ...]]:
        return read_answers(write_rows(tmp_path / "answers.jsonl", list(rows)), questions, **more)

    return read


@pytest.mark.parametrize("names", [("random-1", "random-2"), (1, 2), ("1", 2)])
def test_answers_belong_to_the_question_whose_id_they_name(names, answers):
    first, second = names
    found = answers({"question_id": second, "answer": "no"}, {"id": first, "text": "yes"})
    assert [given[0].text for given in found] == ["yes", "no"]


def test_without_ids_they_stand_in_order(answers):
    assert [one[0].text for one in answers({"answer": "yes"}, {"question": "Is it 2?", "answer": "no"})] == [
        "yes",
        "no",
    ]


def test_the_lines_of_generate_are_read(answers):
    line = {"line": 1, "prompt": "Is it 1?\nBe brief.", "responses": [{"text": "a", "tokens": 1, "ended": True}]}
    other = {"responses": [{"text": "b", "ended": False, "score": 1.5}, {"text": "c", "ended": True, "score": -1}]}
    assert answers(line | {"id": "1"}, other | {"id": "2"}) == [
        (Answer("a", True),),
        (Answer("b", False, 1.5), Answer("c", True, -1)),
    ]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"answer": "yes"}], NO_IDS),
        ([{"id": 1, "answer": "a"}], r"random.jsonl:2: has no answer"),
        (
            [{"id": 1, "answer": "a"}, {"id": 1, "answer": "b"}],
            r"answers.jsonl:2: question 'random-1' is answered twice",
        ),
        ([{"id": 3, "answer": "a"}], r"answers.jsonl:1: id 3 is that of no question"),
        ([{"id": 1, "answer": "a"}, {"answer": "b"}], r"answers.jsonl:2: the row has neither 'id' nor"),
        ([{"id": 1, "answer": 5}], r"answers.jsonl:1: 'answer' is not a string"),
        ([{"id": 1}], r"answers.jsonl:1: the row has none of 'responses', 'answer'"),
        ([{"id": 1, "responses": []}], r"answers.jsonl:1: 'responses' is not a list of objects"),
        ([{"id": 1, "responses": [{"text": "a", "score": "x"}]}], r"'score' is a string, a number was expected"),
        ([{"id": 1, "question": "Is it 2?", "answer": "a"}], r"it answers 'Is it 2\?', question 'random-1' is"),
        (["{", {"id": 2, "answer": "a"}], r"answers.jsonl:1: invalid JSON"),
    ],
)
def test_answers_that_do_not_fit_are_refused_by_line(rows, reason, answers):
    with pytest.raises(BenchmarkError, match=reason):
        answers(*rows)


def test_answers_to_rows_that_were_left_out_are_passed_over(answers):
    rows = [{"id": i, "answer": "a"} for i in (1, 2, 3)]
    assert len(answers(*rows, left_out=1)) == 2
    with pytest.raises(BenchmarkError, match="id 4 is that of no question"):
        answers(*rows, {"id": 4, "answer": "a"}, left_out=1)


def test_bad_rows_are_all_listed_or_skipped_where_asked(tmp_path: Path):
    rows = [
        {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"},
        "{",
        {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"},
        {"question_id": 2, "image": "a.jpg", "text": "Is it?"},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)

    def check(row: Any) -> Any:
        return BENCHMARK.check(row, no_store)

    with pytest.raises(BenchmarkError) as error:
        read_questions([file], check, skip_bad=False)
    lines = str(error.value).split("\n")
    assert [line.split(": ")[0].rsplit(":")[-1] for line in lines[1:]] == ["2", "3", "4"]
    assert f"id '1' is that of {file}:1 too" in lines[2]
    questions, bad = read_questions([file], check, skip_bad=True)
    assert ([each.id for each in questions], [one.origin.line for one in bad]) == (["1"], [2, 3, 4])
    with pytest.raises(BenchmarkError, match="1 row cannot"):
        read_questions([write_rows(tmp_path / "none.jsonl", ["{"])], check, skip_bad=True)


def test_the_scores_of_a_reward_model_come_along(questions):
    """(1.5 - 1) / 2; a section of which one score is not known has none."""
    scored = [(Answer("yes", score=1.5),), (Answer("yes", score=-1.0),)]
    found = by_category(records_of(BENCHMARK, questions, scored, [(), ()]), lambda rows: {})
    assert found["overall"]["reward"] == 0.25
    assert by_category(judged(BENCHMARK, questions, ["yes", "no"]), lambda rows: {})["overall"]["reward"] is None


def test_a_section_for_every_row_is_refused():
    records = [{"category": str(number)} for number in range(201)]
    with pytest.raises(BenchmarkError, match="the rows name 201 categories"):
        by_category(records, lambda rows: {})


def test_a_picture_by_url_is_sought_by_its_name_and_nothing_is_downloaded(tmp_path: Path):
    rows = [{"question_id": 1, "image": "https://host/x/b.jpg?s=1", "text": "Is it?", "label": "no"}]
    assert questions_of(BENCHMARK, tmp_path, rows)[0].media[0].path == "b.jpg"
    rows[0]["image"] = "https://host/"
    with pytest.raises(BenchmarkError, match="'image' is a URL that names no file"):
        questions_of(BENCHMARK, tmp_path, rows)

"""POPE: the released reading of answers, and its figures by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from answered import judged, no_store, questions_of

from mmrlhf_jax.data.sources.rows import read_rows
from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.pope import BENCHMARK, check, said


def row(number: int, label: str, **more: Any) -> dict[str, Any]:
    return {"question_id": number, "image": "a.jpg", "text": "Is there a dog in the image?", "label": label, **more}


@pytest.mark.parametrize(
    ("answer", "reading"),
    [
        ("No, there is no dog.", "no"),
        ("There is not a dog in it", "no"),
        ("Yes. But no cat.", "yes"),  # only the first sentence counts
        ("Yes, no doubt", "no"),
        ("NO", "yes"),  # the quirks: case, signs other than commas, and line breaks
        ('"no"', "yes"),
        ("It is\nno dog", "yes"),
        ("no!", "yes"),
        ("", "yes"),
        (". no", "yes"),
    ],
)
def test_an_answer_is_read_as_the_released_script_reads_it(answer, reading):
    assert said(answer) == reading


def test_figures_by_hand(tmp_path: Path):
    """Said yes yes yes no no of labels yes yes no yes no: 2 hits, 1 false alarm, 1 miss, 1 right no.

    accuracy 3/5; precision 2/3; recall 2/3; F1 = 2 (2/3)(2/3) / (4/3) = 2/3; yes rate 3/5; "Maybe" is unclear.
    """
    labels = ["yes", "Yes", "no", "yes", "no"]
    questions = questions_of(BENCHMARK, tmp_path, [row(i, label) for i, label in enumerate(labels)])
    found = BENCHMARK.measure(judged(BENCHMARK, questions, ["Yes", "Yes.", "Maybe", "No", "There is not"]))
    assert found["overall"] == {
        "rows": 5,
        "unclear": 1,
        "accuracy": 3 / 5,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": pytest.approx(2 / 3),
        "yes_rate": 3 / 5,
        "reward": None,
    }


def test_without_a_yes_there_is_no_precision(tmp_path: Path):
    questions = questions_of(BENCHMARK, tmp_path, [row(1, "yes"), row(2, "no")])
    found = BENCHMARK.measure(judged(BENCHMARK, questions, ["no", "no"]))["overall"]
    assert (found["precision"], found["recall"], found["f1"], found["accuracy"]) == (None, 0, None, 1 / 2)


def test_the_category_is_the_columns_else_the_files_and_the_same_number_may_stand_in_each(tmp_path: Path):
    popular = questions_of(BENCHMARK, tmp_path, [row(1, "yes")], "coco_pope_popular.jsonl")
    hub = {"question_id": 1, "image": "a.jpg", "question": "Is it?", "answer": "no", "category": "adversarial"}
    adversarial = questions_of(BENCHMARK, tmp_path, [hub], "test.jsonl")
    assert [(each.category, each.id) for each in (*popular, *adversarial)] == [
        ("popular", "popular-1"),
        ("adversarial", "adversarial-1"),
    ]
    assert adversarial[0].facts["label"] == "no"


def test_a_label_that_is_neither_is_refused_by_line(tmp_path: Path):
    with pytest.raises(BenchmarkError, match=r"rows.jsonl:2: 'label' is 'maybe', yes or no was expected"):
        questions_of(BENCHMARK, tmp_path, [row(1, "yes"), row(2, "maybe")])


def test_a_row_is_asked_as_it_stands(tmp_path: Path):
    (question,) = questions_of(BENCHMARK, tmp_path, [row(1, "yes")])
    assert (question.prompt, question.media[0].path) == ("Is there a dog in the image?", "a.jpg")
    (again,) = read_rows([str(tmp_path / "rows.jsonl")])
    assert check(again, no_store) == question

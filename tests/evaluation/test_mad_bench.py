"""MAD-Bench: replies read as the released script reads them, both of its denominators, and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from answered import judged, questions_of

from mmrlhf_jax.evaluation.mad_bench import REMEDY, asks, benchmark, denies, graded
from mmrlhf_jax.evaluation.questions import Answer

ROW = {"image": "http://images.cocodataset.org/val2017/000000398742.jpg", "instruction": "What color is the cat?"}


def rows(*categories: str) -> list[dict[str, str]]:
    return [{**ROW, "category": category} for category in categories]


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Correct. It says so.", True),
        (" The answer is correct.", True),
        ("Incorrect", False),
        ("The answer is incorrect. It", False),
        ("correct", None),
        ("I think Correct", None),
    ],
)
def test_a_grade_is_how_a_reply_begins(reply, right):
    assert graded(reply) is right


def test_accuracy_over_all_rows_and_over_the_judged(tmp_path: Path):
    """Right, wrong, not understood, right: 2/4 of all, 2/3 of the judged; of scenes 1/2 and 1/1."""
    bench = benchmark()
    categories = ["count_of_object", "count_of_object", "scene_understanding", "scene_understanding"]
    questions = questions_of(bench, tmp_path, rows(*categories))
    records = judged(bench, questions, ["a"] * 4, [["Correct"], ["Incorrect"], ["Hm"], ["Correct"]])
    found = bench.measure(records)
    assert (found["overall"]["accuracy"], found["overall"]["accuracy_judged"]) == (2 / 4, 2 / 3)
    assert (found["scene_understanding"]["accuracy"], found["scene_understanding"]["accuracy_judged"]) == (1 / 2, 1)
    assert found["overall"]["unjudged"] == 1
    assert bench.remarks(records) == ["1 replies say neither Correct nor Incorrect"]


def test_the_remedy_stands_before_the_question_and_the_judge_does_not_see_it(tmp_path: Path):
    (question,) = questions_of(benchmark(remedy=True), tmp_path, rows("object_attribute"))
    assert question.prompt == f"{REMEDY}\nWhat color is the cat?"
    (ask,) = asks(question, Answer("Black."))
    assert REMEDY not in ask.prompt
    assert "gives an object a property" in ask.prompt
    assert question.media[0].path == "000000398742.jpg"


@pytest.mark.parametrize(
    ("answer", "denied"),
    [
        ("There is no cat in it.", True),
        ("It isn\u2019t a cat.", True),
        ("The picture shows a dog. A cat is not seen.", True),
        ("The cat is black. It sits. It does not move.", False),  # the third sentence
        ("The cat is black.", False),
    ],
)
def test_the_rule_looks_for_a_denial_at_the_beginning(answer, denied):
    assert denies(answer) is denied


def test_without_a_judge_there_are_figures_by_the_rule_only_where_it_is_asked_for(tmp_path: Path):
    for rule, accuracy in ((False, None), (True, 1)):
        bench = benchmark(rule=rule)
        records = judged(bench, questions_of(bench, tmp_path, rows("count_of_object")), ["There is no cat."])
        assert bench.measure(records)["overall"]["accuracy"] == accuracy
        assert "no judge" in bench.remarks(records)[0]

"""MMHal-Bench: ratings read from replies, and figures by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from answered import judged, questions_of

from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.mmhal_bench import BENCHMARK, asks, informativeness, rating
from mmrlhf_jax.evaluation.questions import Answer


def row(kind: str = "counting", **more: Any) -> dict[str, Any]:
    base = {"image_src": "https://farm/x/1.jpg", "question": "How many?", "gt_answer": "Two cats."}
    return base | {"question_type": kind, "image_content": ["cat", "sofa"]} | more


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("Good.\nRating: 5", 5),
        ("RATING: 0, hallucinated", 0),
        ("Rating: 3. So my rating: 3", 3),
        ("Rating: 3 or rating: 4", None),
        ("Rating: 7", None),
        ("Rating: 10", None),  # no 1
        ("Rating: 4.5", None),
        ("Rating 4", None),
        ("six", None),
    ],
)
def test_a_rating_is_the_only_one_of_a_reply(reply, read):
    assert rating(reply) == read


def test_figures_by_hand(tmp_path: Path):
    """Ratings 6, 2, none, 3: mean 11/3, one of three below 3, informativeness (100 + 66.7 + 0) / 3 = 55.6 percent."""
    questions = questions_of(BENCHMARK, tmp_path, [row(), row(), row("holistic"), row("holistic")])
    replies = [["Rating: 6"], ["Rating: 2"], ["nonsense"], ["Rating: 3"]]
    records = judged(BENCHMARK, questions, ["a", "b", "c", "d"], replies)
    found = BENCHMARK.measure(records)
    assert found["overall"] == {
        "rows": 4,
        "unjudged": 1,
        "score": pytest.approx(11 / 3),
        "hallucination_rate": 1 / 3,
        "informativeness": pytest.approx(500 / 9),
        "reward": None,
    }
    assert (found["counting"]["score"], found["holistic"]["score"]) == (4, 3)
    assert BENCHMARK.remarks(records) == [
        "1 replies hold no rating and count nowhere; the released script makes each a 0"
    ]


def test_informativeness_counts_from_zero_on_both_sides_of_three():
    assert [round(informativeness(k)) for k in range(7)] == [0, 33, 67, 0, 33, 67, 100]


def test_without_a_judge_nothing_is_rated(tmp_path: Path):
    records = judged(BENCHMARK, questions_of(BENCHMARK, tmp_path, [row()]), ["a"])
    assert BENCHMARK.measure(records)["overall"]["score"] is None
    assert "no judge was asked" in BENCHMARK.remarks(records)[0]


def test_the_judge_is_told_what_the_picture_shows_and_the_picture_is_found_by_its_urls_name(tmp_path: Path):
    (question,) = questions_of(BENCHMARK, tmp_path, [row()])
    (ask,) = asks(question, Answer("Three dogs. Rating: 6"))
    for text in ("cat, sofa", "How many?", "Two cats.", "Three dogs."):
        assert text in ask.prompt
    assert question.media[0].path == "1.jpg"


def test_a_row_without_its_facts_is_refused(tmp_path: Path):
    with pytest.raises(BenchmarkError, match=r"rows.jsonl:1: column 'gt_answer' is missing"):
        questions_of(BENCHMARK, tmp_path, [row(gt_answer=None)])

"""How the careless see, answer and rank."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from mmrlhf_jax.data.digit_boards.answerers import Carelessness, annotated_ranks, answers, perceive, ranks
from mmrlhf_jax.data.digit_boards.measures import refused, score
from mmrlhf_jax.data.digit_boards.questions import Question

BOARD = ((3, None, 7), (None, None, 4), (0, 1, 2))
CLIP = (((3, None), (None, 4)), ((3, 5), (None, 4)))
QUESTIONS = [
    Question("board"),
    Question("row", 2),
    Question("row", 5),
    Question("empty"),
    Question("choice", 1, 2, (3, 0, None, 7)),
    Question("writer", 1),
    Question("behind"),
]


def test_careless_eyes_fill_empty_cells_with_zeros() -> None:
    assert perceive(BOARD, 1.0, 0.0, random.Random(0)) == ((3, 0, 7), (0, 0, 4), (0, 1, 2))
    assert perceive(BOARD, 0.0, 0.0, random.Random(0)) == BOARD
    misread = perceive(BOARD, 0.0, 1.0, random.Random(0))
    pairs = list(zip(itertools.chain(*BOARD), itertools.chain(*misread), strict=True))
    assert all((seen == true) == (true is None) for true, seen in pairs)


@pytest.mark.parametrize("board", [BOARD, ((None,) * 3,) * 3, ((1, 2, 3),) * 3])
@pytest.mark.parametrize("question", QUESTIONS)
def test_five_different_answers_even_where_little_can_be_mistaken(board: tuple, question: Question) -> None:
    mean = dataclasses.replace(Carelessness(), refuse=0.0)
    assert len(set(answers((board,), question, 5, mean, random.Random(0)))) == 5


def test_more_answers_than_there_are_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(ValueError, match="in 11 ways only, not 12"):  # four options, their letters, three refusals
        answers((BOARD,), QUESTIONS[4], 12, Carelessness(), random.Random(0))


@pytest.mark.parametrize("question", [Question("last"), Question("cell", 1, 2)])
def test_clips_are_answered_too(question: Question) -> None:
    assert len(set(answers(CLIP, question, 5, Carelessness(), random.Random(0)))) == 5


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_of_graded_quality(question: Question) -> None:
    rng = random.Random(1)
    said = [text for _ in range(20) for text in answers((BOARD,), question, 3, Carelessness(), rng)]
    scores = {score((BOARD,), question.text, text) for text in said}
    assert len(scores) >= 3
    assert score((BOARD,), question.text, question.answer((BOARD,))) in scores


def test_refusals_are_rare_where_nothing_calls_for_them() -> None:
    rng = random.Random(2)

    def share(question: Question) -> float:
        said = [text for _ in range(200) for text in answers((BOARD,), question, 2, Carelessness(), rng)]
        return sum(refused(question.text, text) for text in said) / len(said)

    assert 0 < share(Question("board")) < 0.06
    assert 0.2 < share(Question("behind")) < 0.8


def test_equal_scores_share_a_rank() -> None:
    assert ranks([7.0, 9.0, 7.0, 2.0]) == [2, 1, 2, 3]


def test_an_annotator_without_noise_ranks_by_score() -> None:
    assert annotated_ranks([7.0, 9.0, 7.0, 2.0], 0.0, random.Random(0)) == [2, 1, 2, 3]


@pytest.mark.parametrize("difference", [0.0, 0.5, 1.0, 2.0])
def test_an_annotator_confuses_two_answers_as_bradley_terry_says(difference: float) -> None:
    rng, draws, noise = random.Random(3), 20_000, 0.5
    for others in ([], [4.0, 9.0]):  # whatever else is ranked beside them
        ranked = [annotated_ranks([5.0, 5.0 + difference, *others], noise, rng) for _ in range(draws)]
        wrong = sum(worse < better for worse, better, *_ in ranked) / draws
        assert wrong == pytest.approx(1 / (1 + math.exp(difference / noise)), abs=0.015)

"""What is right to say of boards and clips, and how whatever else is said is counted."""

from __future__ import annotations

import pytest

from mmrlhf_jax.data.digit_boards.measures import (
    claims,
    critique_correctness,
    facts,
    faults,
    measure,
    ratings,
    reason,
    refused,
    score,
    wrong_claims,
)
from mmrlhf_jax.data.digit_boards.questions import Question

BOARD = (((3, None, 7), (None, None, 4), (0, 1, 2)),)
CLIP = (((3, None), (None, 4)), ((3, 5), (None, 4)), ((3, 5), (8, 4)))
LIST, ROW, EMPTIES = (
    "List the digits row by row.",
    "Which digits are in row 2?",
    "How many cells of each row are empty?",
)
CHOICE = "What is in row 1, column 2? A 3, B 0, C empty, D 7."
ABSENT, WRITER, BEHIND = "Which digits are in row 5?", "Who wrote the digits in row 1?", "What is behind the board?"
LAST, CELL = "List the digits of the last frame row by row.", "What does each frame show in row 1, column 2?"


@pytest.mark.parametrize(
    ("scene", "question", "task", "right"),
    [
        (BOARD, LIST, "board", "3 empty 7, empty empty 4, 0 1 2."),
        (BOARD, ROW, "row", "empty empty 4."),
        (BOARD, EMPTIES, "empty", "1 2 0."),
        (BOARD, CHOICE, "choice", "empty, C."),
        (BOARD, ABSENT, "unanswerable", "cannot tell: no row 5."),
        (BOARD, WRITER, "unanswerable", "cannot tell: no names."),
        (BOARD, BEHIND, "unanswerable", "cannot tell: not shown."),
        (CLIP, LAST, "video", "3 5, 8 4."),
        (CLIP, CELL, "video", "empty 5 5."),
    ],
)
def test_the_right_answer_has_no_wrong_claim(scene: tuple, question: str, task: str, right: str) -> None:
    parsed = Question.parse(question)
    assert parsed.text == question
    assert parsed.task(scene) == task
    assert parsed.answer(scene) == right
    assert wrong_claims(scene, question, right)[0] == 0
    found = faults(scene, question, right)
    assert (found.wrong, found.missing, found.claims) == ((), (), wrong_claims(scene, question, right)[1])
    assert refused(question, right) == (task == "unanswerable")


@pytest.mark.parametrize(
    ("question", "answer", "correctness", "completeness", "brevity"),
    [
        (LIST, "3 empty 7, empty empty 4, 0 1 2.", 1, 1, 1 / 9),
        (ROW, "empty 0 4.", 2 / 3, 1, 1 / 3),
        (ROW, "empty.", 1, 1 / 3, 1),
        (ROW, "empty empty 4 4.", 3 / 4, 1, 1 / 4),
        (ROW, "", 0, 0, 1),
        (ABSENT, "cannot tell.", 1, None, 1),
        (WRITER, "cannot tell: not shown.", 1 / 2, None, 1 / 2),
    ],
)
def test_answers_are_rated_in_what_is_counted(question, answer, correctness, completeness, brevity) -> None:
    found = ratings(BOARD, question, answer)
    assert found.get("completeness") == completeness
    assert (found["correctness"], found["brevity"]) == pytest.approx((correctness, brevity))


def test_facts_say_what_is_shown_a_text_a_picture() -> None:
    assert facts(BOARD) == ["3 empty 7, empty empty 4, 0 1 2."]
    assert facts(CLIP) == ["Frame 1: 3 empty, empty 4.", "Frame 2: 3 5, empty 4.", "Frame 3: 3 5, 8 4."]


@pytest.mark.parametrize(
    ("question", "answer", "wrong", "total"),
    [
        (LIST, "3 0 7, empty empty 4, 0 1 2.", 1, 9),  # an invented digit
        (LIST, "8 0 7, 0 0 4, empty 1 2.", 5, 9),
        (LIST, "3 empty 7 empty empty 4 0 1 2", 0, 9),  # punctuation claims nothing
        (LIST, "3 empty 7, empty empty 4, 0 1.", 1, 9),  # a claim is missing
        (LIST, "3 empty 7, empty empty 4, 0 1 2 2.", 1, 10),  # one too many
        (LIST, "", 9, 9),
        (LIST, "cannot tell: not shown.", 9, 9),  # what is refused is missing
        (ROW, "I cannot tell.", 3, 3),
        (ROW, "empty, empty and 4", 2, 4),
        (EMPTIES, "1 2 1.", 1, 3),
        (EMPTIES, "one 2 0.", 1, 3),
        (CHOICE, "empty.", 1, 2),
        (CHOICE, "0, B.", 2, 2),
        (CHOICE, "0, C.", 1, 2),
        (ABSENT, "0 0 0.", 3, 3),
        (ABSENT, "cannot tell.", 1, 2),
        (ABSENT, "cannot tell: no row 4.", 1, 2),
        (WRITER, "Anna.", 2, 2),
    ],
)
def test_wrong_claims_are_counted_on_any_text(question: str, answer: str, wrong: int, total: int) -> None:
    assert wrong_claims(BOARD, question, answer) == (wrong, total)
    assert score(BOARD, question, answer) == total - wrong


@pytest.mark.parametrize(
    ("question", "answer", "wrong", "missing"),
    [
        (LIST, "3 0 7, empty empty 5, 0 1 2.", [("0", "empty"), ("5", "4")], []),
        (ROW, "empty empty 4 4 <b>.", [("4", "nothing"), ("<b>", "nothing")], []),  # too many: wrong where they stand
        (ROW, "empty", [], ["empty", "4"]),
        (ABSENT, "cannot tell: no names.", [("no names", "no row 5")], []),
        (ABSENT, "0 0.", [("0", "cannot tell"), ("0", "no row 5")], []),
    ],
)
def test_wrong_claims_are_found_where_they_stand(
    question: str, answer: str, wrong: list[tuple[str, str]], missing: list[str]
) -> None:
    found = faults(BOARD, question, answer)
    assert [(answer[start:end], right) for start, end, right in found.wrong] == wrong
    assert list(found.missing) == missing
    assert (len(wrong) + len(missing), found.claims) == wrong_claims(BOARD, question, answer)


@pytest.mark.parametrize(
    ("question", "answer", "critique"),
    [
        (LIST, "3 0 7, empty empty 4, 0 1 2.", "right empty right, right right right, right right right. 1 wrong."),
        (LIST, "3 empty 7, empty empty 4, 0 1.", "right right right, right right right, right right 2. 1 wrong."),
        (ROW, "empty 0 4 5.", "right empty right surplus. 2 wrong."),
        (ROW, "", "empty empty 4. 3 wrong."),
        (EMPTIES, "1 2 1.", "right right 0. 1 wrong."),
        (EMPTIES, "1 2 0.", "right right right. 0 wrong."),
        (CHOICE, "empty, B.", "right, C. 1 wrong."),
        (ABSENT, "0 0 0.", "cannot tell: no row 5 surplus. 3 wrong."),
        (ABSENT, "cannot tell.", "right: no row 5. 1 wrong."),
        (ROW, "cannot tell.", "empty empty 4. 3 wrong."),
    ],
)
def test_a_reason_corrects_each_wrong_claim_and_counts_them(question: str, answer: str, critique: str) -> None:
    assert reason(BOARD, question, answer) == critique
    wrong, total = wrong_claims(BOARD, question, answer)
    assert critique.endswith(f". {wrong} wrong.")
    assert critique_correctness(BOARD, question, answer, critique) == (total + 1, total + 1)


@pytest.mark.parametrize(
    ("critique", "right", "total"),
    [
        ("empty right right. 1 wrong", 4, 4),
        ("right right right. 1 wrong.", 3, 4),  # the error is counted and not named
        ("empty right right. 2 wrong.", 3, 4),
        ("empty right right.", 3, 4),  # never counted
        ("1 wrong.", 1, 4),
        ("", 0, 4),
        ("empty empty 4. 1 wrong.", 2, 4),  # corrections of what was right
        ("empty right right right. 1 wrong.", 4, 5),
        ("All of it is wrong.", 0, 4),
        ("wrong", 0, 4),
    ],
)
def test_a_critique_is_judged_statement_by_statement(critique: str, right: int, total: int) -> None:
    assert critique_correctness(BOARD, ROW, "0 empty 4.", critique) == (right, total)


def test_claims_are_words_and_a_refusal_is_one() -> None:
    assert claims(ROW, " empty  3,4.\n") == ("empty", "3", "4")
    assert claims(ROW, "cannot tell: no row 12.") == ("cannot tell", "no row 12")
    with pytest.raises(ValueError, match="no question about a digit board"):
        claims("What is this?", "3")


@pytest.mark.parametrize("text", ["What is in row 1, column 2? A 3, B 0.", "Which digits are in row x?", LIST + " "])
def test_a_question_that_is_not_quite_one_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no question about a digit board"):
        Question.parse(text)


def test_rates_are_shares_of_claims_and_of_questions() -> None:
    found = measure(
        [
            (BOARD, ROW, "empty 0 4."),  # 1 of 3
            (BOARD, CHOICE, "cannot tell: not shown."),  # 2 of 2, and refused for nothing
            (BOARD, ABSENT, "cannot tell: no row 5."),
            (BOARD, WRITER, "Anna."),  # 2 of 2
            (CLIP, LAST, "3 5, 8 4."),
        ]
    )
    assert found.hallucination == {
        "all": 5 / 13, "row": 1 / 3, "choice": 1.0, "unanswerable": 2 / 4, "video": 0.0,
    }  # fmt: skip
    assert found.refusal == 1 / 2
    assert found.over_refusal == 1 / 3
    assert (found.length, found.answers) == ((3 + 2 + 2 + 1 + 4) / 5, 5)


def test_what_was_not_asked_has_no_rate() -> None:
    found = measure([(BOARD, ROW, "empty empty 4.")])
    assert (found.refusal, found.over_refusal) == (None, 0.0)
    assert set(found.hallucination) == {"all", "row"}

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.sources.digit_boards import (
    CELL,
    MAPPING,
    SPLITS,
    Question,
    WorldConfig,
    answers,
    board_of,
    claims,
    critique_correctness,
    digits,
    perceive,
    ranks,
    read_questions,
    reason,
    score,
    write_world,
    wrong_claims,
)
from mmrlhf_jax.data.sources.rows import SourceOptions

BOARD = ((3, None, 7), (None, None, 4), (0, 1, 2))
LIST, ROW, EMPTIES = (
    "List the digits row by row.",
    "Which digits are in row 2?",
    "How many cells of each row are empty?",
)
SMALL = WorldConfig(train_boards=12, held_out_boards=5, seed=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    directory = tmp_path_factory.mktemp("digit_boards") / "world"
    assert write_world(directory, SMALL)
    return directory


@pytest.mark.parametrize(
    ("question", "right"),
    [(LIST, "3 empty 7, empty empty 4, 0 1 2."), (ROW, "empty empty 4."), (EMPTIES, "1 2 0.")],
)
def test_the_right_answer_has_no_wrong_claim(question: str, right: str) -> None:
    assert Question.parse(question).text == question
    assert Question.parse(question).answer(BOARD) == right
    assert wrong_claims(BOARD, question, right)[0] == 0


@pytest.mark.parametrize(
    ("question", "answer", "wrong", "total"),
    [
        (LIST, "3 0 7, empty empty 4, 0 1 2.", 1, 9),  # an invented digit
        (LIST, "8 0 7, 0 0 4, empty 1 2.", 5, 9),
        (LIST, "3 empty 7 empty empty 4 0 1 2", 0, 9),  # punctuation claims nothing
        (LIST, "3 empty 7, empty empty 4, 0 1.", 1, 9),  # a claim is missing
        (LIST, "3 empty 7, empty empty 4, 0 1 2 2.", 1, 10),  # one too many
        (LIST, "", 9, 9),
        (ROW, "I cannot tell.", 3, 3),
        (ROW, "empty, empty and 4", 2, 4),
        (EMPTIES, "1 2 1.", 1, 3),
        (EMPTIES, "one 2 0.", 1, 3),
    ],
)
def test_wrong_claims_are_counted_on_any_text(question: str, answer: str, wrong: int, total: int) -> None:
    assert wrong_claims(BOARD, question, answer) == (wrong, total)
    assert score(BOARD, question, answer) == total - wrong


@pytest.mark.parametrize(
    ("question", "answer", "critique"),
    [
        (LIST, "3 0 7, empty empty 4, 0 1 2.", "right empty right, right right right, right right right. 1 wrong."),
        (LIST, "3 empty 7, empty empty 4, 0 1.", "right right right, right right right, right right 2. 1 wrong."),
        (ROW, "empty 0 4 5.", "right empty right surplus. 2 wrong."),
        (ROW, "", "empty empty 4. 3 wrong."),
        (EMPTIES, "1 2 1.", "right right 0. 1 wrong."),
        (EMPTIES, "1 2 0.", "right right right. 0 wrong."),
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


def test_claims_are_words() -> None:
    assert claims(ROW, " empty  3,4.\n") == ("empty", "3", "4")
    with pytest.raises(ValueError, match="no question about a digit board"):
        claims("What is this?", "3")


def test_equal_scores_share_a_rank() -> None:
    assert ranks([7.0, 9.0, 7.0, 2.0]) == [2, 1, 2, 3]


def test_careless_eyes_fill_empty_cells_with_zeros() -> None:
    assert perceive(BOARD, 1.0, 0.0, random.Random(0)) == ((3, 0, 7), (0, 0, 4), (0, 1, 2))
    assert perceive(BOARD, 0.0, 0.0, random.Random(0)) == BOARD
    misread = perceive(BOARD, 0.0, 1.0, random.Random(0))
    pairs = list(zip(itertools.chain(*BOARD), itertools.chain(*misread), strict=True))
    assert all((seen == true) == (true is None) for true, seen in pairs)


@pytest.mark.parametrize("board", [((None,) * 3,) * 3, ((1, 2, 3),) * 3])
def test_four_different_answers_even_where_little_can_be_mistaken(board: tuple) -> None:
    for question in (LIST, ROW, EMPTIES):
        assert len(set(answers(board, Question.parse(question), SMALL, random.Random(0)))) == 4


def test_no_digit_image_is_in_both_splits() -> None:
    pytest.importorskip("sklearn")
    train, held_out = digits(SMALL)
    assert all(len(pictures[digit]) >= 30 for pictures in (train, held_out) for digit in range(10))
    assert sum(len(p) for p in train.values()) + sum(len(p) for p in held_out.values()) == 1797
    names = [{image.tobytes() for own in pictures.values() for image in own} for pictures in (train, held_out)]
    assert not names[0] & names[1]


def test_boards_show_the_digits_of_their_split(world: Path) -> None:
    for split, pictures in zip(SPLITS, digits(SMALL), strict=True):
        for row in read_questions(world, split):
            pixels = np.asarray(Image.open(world / "media" / row["image"]))[..., 0]
            assert pixels.shape == (3 * CELL, 3 * CELL)
            for (y, x), cell in np.ndenumerate(np.array(board_of(row), object)):
                shown = pixels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
                assert not shown.any() if cell is None else any((shown == own).all() for own in pictures[cell])


def test_the_world_goes_through_prepare_with_ranks_and_margins_in_claims(world: Path, tmp_path: Path) -> None:
    for split, boards in zip(SPLITS, (12, 5), strict=True):
        options = PrepareOptions(
            source="mapped",
            inputs=(str(world / f"{split}.jsonl"),),
            output=str(tmp_path / split),
            media=str(world / "media"),
            source_options=SourceOptions(dict(pair.split("=") for pair in MAPPING)),
        )
        assert prepare(options).groups == 2 * boards
        rows = {row["id"]: row for row in read_questions(world, split)}
        for group in open_dataset(str(tmp_path / split)).groups():
            board, question = board_of(rows[group.id]), group.prompt[0].text
            right = [score(board, question, response.text) for response in group.responses]
            assert [response.score for response in group.responses] == right == sorted(right, reverse=True)
            for response in group.responses:
                assert response.reason == reason(board, question, response.text)
            expected = {(i, j): right[i] - right[j] for i in range(4) for j in range(4) if right[i] > right[j]}
            found = {(p.chosen, p.rejected): group.margin(p) for p in group.pairs}
            assert found == expected


def test_the_same_configuration_makes_the_same_world_once(world: Path, tmp_path: Path) -> None:
    assert not write_world(world, SMALL)
    assert write_world(tmp_path / "again", SMALL)
    for split in SPLITS:
        assert (tmp_path / "again" / f"{split}.jsonl").read_text() == (world / f"{split}.jsonl").read_text()
    with pytest.raises(ValueError, match="something other than this world"):
        write_world(world, WorldConfig(train_boards=12, held_out_boards=5, seed=4))


def test_a_world_of_an_earlier_version_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text(json.dumps(dataclasses.asdict(SMALL), indent=2) + "\n")
    with pytest.raises(ValueError, match="something other than this world"):
        write_world(tmp_path, SMALL)


def test_without_scikit_learn_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'mmrlhf-jax\[quickstart\]'"):
        write_world(tmp_path / "world", SMALL)
    assert not (tmp_path / "world").exists()

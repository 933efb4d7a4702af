"""The quickstart's world: boards of real handwritten digits, questions about them, answers of known quality.

A board is a square of cells, each empty or holding one digit of scikit-learn's bundled `load_digits` (8 x 8 pixels,
https://archive.ics.uci.edu/dataset/80). Four answerers look at it, each careless in its own degree: they take empty
cells for zeros, a habit they share, and misread digits, each in its own way. What an answerer then says follows exactly
from the board it saw, so that the wrong claims of its answer can be counted against the true one. Nothing is judged.
Every answer comes with a reason, the critique of somebody who sees the true board: claim by claim it is right or
corrected, then the wrong ones are counted.

`write_world` writes files for `launch/prepare.py`; the functions above it score any text, a model's included:

    DIRECTORY/world.json                     what the world was made from
    DIRECTORY/{train,held_out}.jsonl         one question a line; read with --source mapped --map and `MAPPING`
    DIRECTORY/media/{train,held_out}/*.png

Held-out boards are made of digit images that no training board shows.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

CELL = 8  # pixels
EMPTY = "empty"
RESPONSES = 4
SPLITS = ("train", "held_out")
MAPPING = (
    "id=id", "image=image", "prompt=question", "responses=answers", "rank=rank", "score=score", "reason=reasons",
)  # fmt: skip
RIGHT, WRONG, SURPLUS = "right", "wrong", "surplus"
WORLD_VERSION = 2  # raise it whenever the same configuration would make other files

Cell = int | None
Board = tuple[tuple[Cell, ...], ...]
Pictures = Mapping[int, Sequence[np.ndarray]]
CELLS: tuple[Cell, ...] = (None, *range(10))
Kind = Literal["board", "row", "empty"]

_QUESTIONS: dict[Kind, str] = {
    "board": "List the digits row by row.",
    "row": "Which digits are in row {place}?",
    "empty": "How many cells of each row are empty?",
}
_ROW = re.compile(r"Which digits are in row (\d+)\?")
_WORD = re.compile(r"[^\s,.]+")


@dataclass(frozen=True)
class WorldConfig:
    """What a world is made from; the same configuration makes the same files."""

    train_boards: int = 1500
    held_out_boards: int = 100
    side: int = 3
    """rows and columns of a board"""
    empty: float = 0.4
    """share of cells without a digit"""
    held_out_digits: float = 0.25
    """share of the 1,797 digit images that only held-out boards show"""
    habit: float = 0.75
    """how often an answerer of mean carelessness takes an empty cell for a zero"""
    misread: float = 0.1
    """how often it takes a digit for another or overlooks it, each being as likely"""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train_boards < 1 or self.held_out_boards < 1 or self.side < 2:
            raise ValueError("a world needs at least one board in each split, and boards of at least 2 x 2 cells")
        for name in ("empty", "held_out_digits", "habit", "misread"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share between 0 and 1")


@dataclass(frozen=True)
class Question:
    """What is asked; `place` is a row, counted from 1; 0 where all of them are meant."""

    kind: Kind
    place: int = 0

    @property
    def text(self) -> str:
        return _QUESTIONS[self.kind].format(place=self.place)

    @classmethod
    def parse(cls, text: str) -> Question:
        """Inverse of `text`. Raises ValueError for a question of another world."""
        if found := _ROW.fullmatch(text):
            return cls("row", int(found[1]))
        for kind in ("board", "empty"):
            if text == _QUESTIONS[kind]:
                return cls(kind)
        raise ValueError(f"{text!r} is no question about a digit board")

    def answer(self, board: Board) -> str:
        """What is right to say of `board`, or of the board somebody believes to see."""
        match self.kind:
            case "board":
                rows = board
            case "row":
                rows = (board[self.place - 1],)
            case "empty":
                rows = (tuple(row.count(None) for row in board),)
        return ", ".join(" ".join(EMPTY if cell is None else str(cell) for cell in row) for row in rows) + "."


def claims(question: str, answer: str) -> tuple[str, ...]:
    """The claims of an answer in free text, in order: its words, commas and full stops apart.

    The n-th claim speaks of the n-th cell (or row) that was asked for. Raises ValueError for a question of another
    world.
    """
    Question.parse(question)
    return tuple(_WORD.findall(answer))


def wrong_claims(board: Board, question: str, answer: str) -> tuple[int, int]:
    """(wrong, total) claims of an answer in free text.

    Whatever is not the right claim at its place is wrong: another digit, a claim that is missing, one too many, a word
    that claims nothing. `total` is the number of claims asked for, or made where there are more; so silence is all
    wrong, and neither short nor long answers can buy a lower share of wrong claims.
    """
    right = claims(question, Question.parse(question).answer(board))
    both = list(zip_longest(right, claims(question, answer)))
    return sum(one != other for one, other in both), len(both)


def score(board: Board, question: str, answer: str) -> float:
    """The known quality of an answer: how many of its claims are right. A margin is then a difference in claims."""
    wrong, total = wrong_claims(board, question, answer)
    return float(total - wrong)


def reason(board: Board, question: str, answer: str) -> str:
    """A critique of an answer in free text: claim by claim, laid out like the right answer, then how many are wrong.

    `right` stands for a claim that is right; what should have been claimed for one that is wrong or missing; `surplus`
    for one too many. "3 0 7." against 3 empty 7 is "right empty right. 1 wrong."
    """
    verdicts = _verdicts(board, question, answer)
    remaining = iter(verdicts)
    right = Question.parse(question).answer(board)
    walked = _WORD.sub(lambda _: next(remaining), right).removesuffix(".")
    return f"{' '.join([walked, *remaining])}. {_count(verdicts)} {WRONG}."


def critique_correctness(board: Board, question: str, answer: str, critique: str) -> tuple[int, int]:
    """(right, total) statements of a critique in free text: a verdict on every claim, and the count it ends in.

    A verdict is right where it is the one `reason` gives. A verdict or count that is missing is wrong, so is a verdict
    too many; `total` counts those that are due, or made where there are more.
    """
    verdicts = _verdicts(board, question, answer)
    stated, count = _statements(critique)
    both = list(zip_longest(verdicts, stated))
    return sum(due == made for due, made in both) + (count == _count(verdicts)), len(both) + 1


def stated_count(critique: str) -> str | None:
    """How many wrong claims a critique ends in, as it says it; None where it does not end in a count."""
    return _statements(critique)[1]


def _statements(critique: str) -> tuple[list[str], str | None]:
    """The verdicts, and the count before a closing `wrong`."""
    words = _WORD.findall(critique)
    return (words[:-2], words[-2]) if len(words) > 1 and words[-1] == WRONG else (words, None)


def _count(verdicts: Sequence[str]) -> str:
    return str(sum(verdict != RIGHT for verdict in verdicts))


def _verdicts(board: Board, question: str, answer: str) -> list[str]:
    """What is to be said of each claim of an answer, and of each it lacks."""
    right = claims(question, Question.parse(question).answer(board))
    return [
        SURPLUS if due is None else RIGHT if due == made else due
        for due, made in zip_longest(right, claims(question, answer))
    ]


def perceive(board: Board, habit: float, misread: float, rng: random.Random) -> Board:
    """The board somebody believes to see: empty cells as zeros, digits as others or overlooked, with these
    probabilities."""

    def see(cell: Cell) -> Cell:
        if cell is None:
            return 0 if rng.random() < habit else None
        return rng.choice([other for other in CELLS if other != cell]) if rng.random() < misread else cell

    return tuple(tuple(see(cell) for cell in row) for row in board)


def answers(board: Board, question: Question, config: WorldConfig, rng: random.Random) -> list[str]:
    """Four different answers, each by somebody whose carelessness is drawn from 0.5 to 1.5 times the mean."""
    said: dict[str, None] = {}
    while len(said) < RESPONSES:
        carelessness = rng.uniform(0.5, 1.5)
        seen = perceive(board, min(1.0, carelessness * config.habit), carelessness * config.misread, rng)
        said[question.answer(seen)] = None
    return list(said)


def ranks(scores: Sequence[float]) -> list[int]:
    """1 for the best, equal scores tied, no gaps."""
    levels = sorted(set(scores), reverse=True)
    return [1 + levels.index(value) for value in scores]


def board_of(row: dict[str, Any]) -> Board:
    """The true board of a line that `write_world` wrote."""
    return tuple(tuple(cells) for cells in row["board"])


def read_questions(directory: Path, split: str) -> list[dict[str, Any]]:
    """The lines of one split: `id`, `image`, `question`, `answers`, `rank`, `score`, `reasons`, `board`."""
    return [json.loads(line) for line in (directory / f"{split}.jsonl").read_text().splitlines()]


def write_world(directory: Path, config: WorldConfig) -> bool:
    """Makes the world in `directory`; False where it is there already.

    Raises ValueError when scikit-learn is missing or the directory holds another world.
    """
    stated = json.dumps({"version": WORLD_VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"
    if directory.exists():
        if not (directory / "world.json").exists() or (directory / "world.json").read_text() != stated:
            raise ValueError(f"{directory} holds something other than this world: name another directory")
        return False
    aside = directory.with_name(f".{directory.name}.writing")  # a world appears only when whole
    shutil.rmtree(aside, ignore_errors=True)
    for split, count, pictures in zip(
        SPLITS, (config.train_boards, config.held_out_boards), digits(config), strict=True
    ):
        media = aside / "media" / split
        media.mkdir(parents=True)
        rows = _rows(split, count, pictures, media, config)
        (aside / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (aside / "world.json").write_text(stated)
    aside.rename(directory)
    return True


def digits(config: WorldConfig) -> tuple[Pictures, Pictures]:
    """The digit images u8 [8, 8] of training and of held-out boards, by digit; no image is in both.

    Raises ValueError when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed: pip install 'mmrlhf-jax[quickstart]'"
        ) from error
    found = load_digits()
    pixels = np.minimum(found.images * 16, 255).astype(np.uint8)  # 17 levels of ink
    order = np.random.default_rng(config.seed).permutation(len(pixels))
    held_out, train = np.split(order, [round(len(order) * config.held_out_digits)])

    def by_digit(own: np.ndarray) -> Pictures:
        return {digit: [pixels[i] for i in own if found.target[i] == digit] for digit in range(10)}

    return by_digit(train), by_digit(held_out)


def _rows(split: str, count: int, pictures: Pictures, media: Path, config: WorldConfig) -> Iterator[dict[str, Any]]:
    """Two questions about each of `count` boards; their pictures are written on the way."""
    rng = random.Random(f"{split} {config.seed}")
    for number in range(count):
        board = tuple(
            tuple(None if rng.random() < config.empty else rng.randrange(10) for _ in range(config.side))
            for _ in range(config.side)
        )
        name = f"{number:05d}.png"
        _picture(board, pictures, rng).save(media / name)
        part = rng.choice([*(Question("row", place) for place in range(1, config.side + 1)), Question("empty")])
        for question in (Question("board"), part):
            said = answers(board, question, config, rng)
            scores = [score(board, question.text, text) for text in said]
            yield {
                "id": f"{split}-{number:05d}-{question.kind}",
                "image": f"{split}/{name}",
                "question": question.text,
                "answers": said,
                "rank": ranks(scores),
                "score": scores,
                "reasons": [reason(board, question.text, text) for text in said],
                "board": board,
            }


def _picture(board: Board, pictures: Pictures, rng: random.Random) -> Image.Image:
    """White ink on black, one handwritten digit a cell."""
    blank = np.zeros((CELL, CELL), np.uint8)
    cells = [[blank if cell is None else rng.choice(pictures[cell]) for cell in row] for row in board]
    return Image.fromarray(np.block(cells)).convert("RGB")

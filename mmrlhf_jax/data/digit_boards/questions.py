"""What is asked about a scene, and what is right to say of it.

Tasks as in MM-RLHF: a long description (`board`), short answers (`row`, `empty`), `choice` among four options,
questions that no picture answers (`unanswerable`: a row that is not there, who wrote it, what is behind it), where a
refusal with its reason is right, and `video`: the last frame, or one cell from frame to frame.

An answer is a series of claims, words mostly; a refusal and its reason are a claim each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mmrlhf_jax.data.digit_boards.boards import Board, Cell, Scene

EMPTY = "empty"
REFUSAL = "cannot tell"
NO_NAMES, NOT_SHOWN = "no names", "not shown"

Kind = Literal["board", "row", "empty", "choice", "writer", "behind", "last", "cell"]
Task = Literal["board", "row", "empty", "choice", "unanswerable", "video"]
TASKS: tuple[Task, ...] = ("board", "row", "empty", "choice", "unanswerable", "video")
LETTERS = "ABCD"

_QUESTIONS: dict[Kind, str] = {
    "board": "List the digits row by row.",
    "row": "Which digits are in row {place}?",
    "empty": "How many cells of each row are empty?",
    "choice": "What is in row {place}, column {column}? {options}.",
    "writer": "Who wrote the digits in row {place}?",
    "behind": "What is behind the board?",
    "last": "List the digits of the last frame row by row.",
    "cell": "What does each frame show in row {place}, column {column}?",
}
_TASK_OF: dict[Kind, Task] = {
    "board": "board", "row": "row", "empty": "empty", "choice": "choice", "writer": "unanswerable",
    "behind": "unanswerable", "last": "video", "cell": "video",
}  # fmt: skip
_OPTIONS = ", ".join(rf"{letter} (?:\d|{EMPTY})" for letter in LETTERS)
_FIELDS = {
    r"\{place\}": r"(?P<place>\d+)",
    r"\{column\}": r"(?P<column>\d+)",
    r"\{options\}": f"(?P<options>{_OPTIONS})",
}


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for hole, group in _FIELDS.items():
        pattern = pattern.replace(hole, group)
    return re.compile(pattern)


_PATTERNS = {kind: _pattern(template) for kind, template in _QUESTIONS.items()}


@dataclass(frozen=True)
class Question:
    """What is asked; `place` is a row and `column` a column, counted from 1; 0 where all of them are meant. `options`
    are the four cells to choose from, A to D."""

    kind: Kind
    place: int = 0
    column: int = 0
    options: tuple[Cell, ...] = ()

    @property
    def text(self) -> str:
        options = ", ".join(f"{letter} {word(cell)}" for letter, cell in zip(LETTERS, self.options, strict=False))
        return _QUESTIONS[self.kind].format(place=self.place, column=self.column, options=options)

    @classmethod
    def parse(cls, text: str) -> Question:
        """Inverse of `text`. Raises ValueError for a question of another world."""
        for kind, pattern in _PATTERNS.items():
            if found := pattern.fullmatch(text):
                named = found.groupdict()
                options = [each.split()[1] for each in named.get("options", "").split(",") if each]
                return cls(
                    kind,
                    int(named.get("place", 0)),
                    int(named.get("column", 0)),
                    tuple(None if each == EMPTY else int(each) for each in options),
                )
        raise ValueError(f"{text!r} is no question about a digit board")

    def task(self, scene: Scene) -> Task:
        """Which task the question is, asked about `scene`."""
        return _TASK_OF[self.kind] if self._refusal(scene) is None else "unanswerable"

    def answer(self, scene: Scene) -> str:
        """What is right to say of `scene`, or of the scene somebody believes to see."""
        if (reason := self._refusal(scene)) is not None:
            return refusal(reason)
        board = scene[-1]
        rows: Board
        match self.kind:
            case "row":
                rows = (board[self.place - 1],)
            case "empty":
                rows = (tuple(row.count(None) for row in board),)
            case "cell":
                rows = (tuple(frame[self.place - 1][self.column - 1] for frame in scene),)
            case "choice":
                return self.chosen(board[self.place - 1][self.column - 1])
            case _:
                rows = board
        return said(rows)

    def chosen(self, cell: Cell) -> str:
        """The option that shows `cell`, what it says and its letter; where none does, people take the first."""
        number = self.options.index(cell) if cell in self.options else 0
        return f"{word(self.options[number])}, {LETTERS[number]}."

    def _refusal(self, scene: Scene) -> str | None:
        """Why the question cannot be answered, where it cannot."""
        match self.kind:
            case "writer":
                return NO_NAMES
            case "behind":
                return NOT_SHOWN
            case "row" if self.place > len(scene[-1]):
                return f"no row {self.place}"
        return None


def word(cell: Cell) -> str:
    return EMPTY if cell is None else str(cell)


def said(rows: Board) -> str:
    """Cells in words, row by row."""
    return ", ".join(" ".join(map(word, row)) for row in rows) + "."


def refusal(reason: str) -> str:
    return f"{REFUSAL}: {reason}."

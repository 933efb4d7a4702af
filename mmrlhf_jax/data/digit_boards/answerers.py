"""Careless people: what they see, what they say, and how they rank what others said.

All take empty cells for zeros, a habit they share, and misread digits, each in its own way. What an answerer then says
follows exactly from the scene it saw, so that the wrong claims can be counted against the true one. Asked what cannot
be told, the same habit makes them say something; now and then they refuse where there was no need.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmrlhf_jax.data.digit_boards.boards import CELLS, Board, Cell, Scene
from mmrlhf_jax.data.digit_boards.measures import claims
from mmrlhf_jax.data.digit_boards.questions import NO_NAMES, NOT_SHOWN, REFUSAL, Question, refusal, said

INVENTED = {"writer": ("Anna", "Ben", "Clara", "David"), "behind": ("wall", "table", "window", "door")}
MOST_ASKED = 100_000  # five different answers take a few hundred at the most


@dataclass(frozen=True)
class Carelessness:
    """Of a mean answerer; each one's own is 0.5 to 1.5 times that."""

    habit: float = 0.75
    """how often it takes an empty cell for a zero, or makes something up where nothing can be told"""
    misread: float = 0.1
    """how often it takes a digit for another or overlooks it, each being as likely; or gives a wrong reason, or takes
    any of four options"""
    refuse: float = 0.02
    """how often it refuses to answer what can be answered"""
    terse: float = 0.3
    """how often it leaves out the end of a refusal (the reason) or of a choice (its letter)"""


def perceive(board: Board, habit: float, misread: float, rng: random.Random) -> Board:
    """The board somebody believes to see: empty cells as zeros, digits as others or overlooked, with these
    probabilities."""

    def see(cell: Cell) -> Cell:
        if cell is None:
            return 0 if rng.random() < habit else None
        return rng.choice([other for other in CELLS if other != cell]) if rng.random() < misread else cell

    return tuple(tuple(see(cell) for cell in row) for row in board)


def answers(scene: Scene, question: Question, count: int, mean: Carelessness, rng: random.Random) -> list[str]:
    """`count` different answers, each by somebody else.

    Raises ValueError where so many people do not come up with so many.
    """
    found: dict[str, None] = {}
    for _ in range(MOST_ASKED):
        found[_answer(scene, question, mean, rng)] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"{MOST_ASKED} people answered {question.text!r} in {len(found)} ways only, not {count}")


def ranks(scores: Sequence[float]) -> list[int]:
    """1 for the best, equal scores tied, no gaps."""
    levels = sorted(set(scores), reverse=True)
    return [1 + levels.index(value) for value in scores]


def annotated_ranks(scores: Sequence[float], noise: float, rng: random.Random) -> list[int]:
    """The ranking of an annotator who is wrong more often the closer two answers are.

    Of two answers the one with the lower score comes out above the other with probability
    sigmoid(-(difference) / noise): Plackett-Luce, whose pairs are Bradley-Terry's, made by adding Gumbel noise of that
    scale to each score. Equal scores fall either way. Without noise it is `ranks`.
    """
    if not noise:
        return ranks(scores)
    return ranks([value - noise * math.log(-math.log(1 - rng.random())) for value in scores])


def _answer(scene: Scene, question: Question, mean: Carelessness, rng: random.Random) -> str:
    own = rng.uniform(0.5, 1.5)
    habit, misread = min(1.0, own * mean.habit), own * mean.misread
    unanswerable = question.task(scene) == "unanswerable"
    if unanswerable and rng.random() < habit:
        return _made_up(scene, question, habit, misread, rng)
    if unanswerable:
        return _refusal(question.answer(scene), mean, misread, rng)
    if mean.refuse and rng.random() < own * mean.refuse:
        return _refusal(refusal(NOT_SHOWN), mean, misread, rng)
    answer = question.answer(tuple(perceive(board, habit, misread, rng) for board in scene))
    return _choice(question, answer, mean, misread, rng) if question.kind == "choice" else answer


def _made_up(scene: Scene, question: Question, habit: float, misread: float, rng: random.Random) -> str:
    """A row that is not there is taken for an empty one; of other things the first that comes to mind."""
    if question.kind == "row":
        nothing: Board = ((None,) * len(scene[-1][0]),)
        return said(perceive(nothing, habit, misread, rng))
    invented = INVENTED[question.kind]
    return f"{invented[0] if rng.random() < habit else rng.choice(invented[1:])}."


def _refusal(answer: str, mean: Carelessness, misread: float, rng: random.Random) -> str:
    if rng.random() < mean.terse:
        return f"{REFUSAL}."
    return refusal(rng.choice([NO_NAMES, NOT_SHOWN])) if rng.random() < misread else answer


def _choice(question: Question, answer: str, mean: Carelessness, misread: float, rng: random.Random) -> str:
    """Even who sees well may take the wrong option."""
    if rng.random() < misread:
        answer = question.chosen(rng.choice(question.options))
    return f"{claims(question.text, answer)[0]}." if rng.random() < mean.terse else answer

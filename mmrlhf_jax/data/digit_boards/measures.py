"""What is wrong in a text about a scene: counted against the truth, never judged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from mmrlhf_jax.data.digit_boards.boards import Scene
from mmrlhf_jax.data.digit_boards.questions import NO_NAMES, NOT_SHOWN, REFUSAL, TASKS, Question, said

RIGHT, WRONG, SURPLUS = "right", "wrong", "surplus"

_CLAIM = re.compile(rf"{REFUSAL}|no row \d+|{NO_NAMES}|{NOT_SHOWN}|[^\s,.:]+")


def claims(question: str, answer: str) -> tuple[str, ...]:
    """The claims of an answer in free text, in order: its words, punctuation apart; a refusal and its reason are one
    each.

    The n-th claim speaks of the n-th cell (or row, or frame) that was asked for. Raises ValueError for a question of
    another world.
    """
    Question.parse(question)
    return tuple(_CLAIM.findall(answer))


def wrong_claims(scene: Scene, question: str, answer: str) -> tuple[int, int]:
    """(wrong, total) claims of an answer in free text.

    Whatever is not the right claim at its place is wrong: another digit, a claim that is missing, one too many, a word
    that claims nothing. `total` is the number of claims asked for, or made where there are more; so silence is all
    wrong, and neither short nor long answers can buy a lower share of wrong claims.
    """
    right = claims(question, Question.parse(question).answer(scene))
    both = list(zip_longest(right, claims(question, answer)))
    return sum(one != other for one, other in both), len(both)


@dataclass(frozen=True)
class Faults:
    """What is wrong of an answer in free text. `wrong`: (start, end, what is right) of each wrong claim, characters
    [start, end), in order; `missing`: what is right of those not made; `claims` as `wrong_claims` counts them all."""

    wrong: tuple[tuple[int, int, str], ...]
    missing: tuple[str, ...]
    claims: int


def faults(scene: Scene, question: str, answer: str) -> Faults:
    """Claim by claim, as `wrong_claims` counts them."""
    right = claims(question, Question.parse(question).answer(scene))
    both = list(zip_longest(right, _CLAIM.finditer(answer)))
    wrong = tuple((*made.span(), due or "nothing") for due, made in both if made is not None and made[0] != due)
    return Faults(wrong, tuple(due for due, made in both if made is None and due is not None), len(both))


def score(scene: Scene, question: str, answer: str) -> float:
    """The known quality of an answer: how many of its claims are right. A margin is then a difference in claims."""
    wrong, total = wrong_claims(scene, question, answer)
    return float(total - wrong)


def ratings(scene: Scene, question: str, answer: str) -> dict[str, float]:
    """An answer in several attributes, each in [0, 1], counted as claims are:

    correctness   the share of its claims that are right at their place
    completeness  the share of what was asked for that it makes a claim about, right or wrong; left out where nothing
                  can be told, since a refusal covers nothing
    brevity       one over the number of its claims
    """
    asked = Question.parse(question)
    due, made = claims(question, asked.answer(scene)), claims(question, answer)
    right = sum(one == other for one, other in zip(due, made, strict=False))
    found = {"correctness": right / max(1, len(made)), "brevity": 1 / max(1, len(made))}
    if asked.task(scene) != "unanswerable":
        found["completeness"] = min(1.0, len(made) / len(due))
    return found


def facts(scene: Scene) -> list[str]:
    """What is true of a scene, a text a picture, as somebody who sees it would caption it."""
    frames = [said(board) for board in scene]
    return [f"Frame {n}: {text}" for n, text in enumerate(frames, 1)] if len(frames) > 1 else frames


def refused(question: str, answer: str) -> bool:
    """Whether an answer in free text says that it cannot tell."""
    return REFUSAL in claims(question, answer)


def reason(scene: Scene, question: str, answer: str) -> str:
    """A critique of an answer in free text: claim by claim, laid out like the right answer, then how many are wrong.

    `right` stands for a claim that is right; what should have been claimed for one that is wrong or missing; `surplus`
    for one too many. "3 0 7." against 3 empty 7 is "right empty right. 1 wrong."
    """
    verdicts = _verdicts(scene, question, answer)
    remaining = iter(verdicts)
    right = Question.parse(question).answer(scene)
    walked = _CLAIM.sub(lambda _: next(remaining), right).removesuffix(".")
    return f"{' '.join([walked, *remaining])}. {_count(verdicts)} {WRONG}."


def critique_correctness(scene: Scene, question: str, answer: str, critique: str) -> tuple[int, int]:
    """(right, total) statements of a critique in free text: a verdict on every claim, and the count it ends in.

    A verdict is right where it is the one `reason` gives. A verdict or count that is missing is wrong, so is a verdict
    too many; `total` counts those that are due, or made where there are more.
    """
    verdicts = _verdicts(scene, question, answer)
    stated, count = _statements(critique)
    both = list(zip_longest(verdicts, stated))
    return sum(due == made for due, made in both) + (count == _count(verdicts)), len(both) + 1


def stated_count(critique: str) -> str | None:
    """How many wrong claims a critique ends in, as it says it; None where it does not end in a count."""
    return _statements(critique)[1]


@dataclass(frozen=True)
class Measured:
    """Of answers to questions of several tasks. A share of nothing is left out, or None."""

    hallucination: dict[str, float]
    """share of wrong claims: "all", then by task"""
    refusal: float | None
    """share of the unanswerable questions that were refused"""
    over_refusal: float | None
    """share of the answerable ones that were"""
    length: float
    """claims an answer"""
    answers: int


def measure(said: Iterable[tuple[Scene, str, str]]) -> Measured:
    """Everything that is counted of (scene, question, answer)."""
    counts: dict[str, list[int]] = {name: [0, 0] for name in ("all", *TASKS)}
    refusals: dict[bool, list[bool]] = {True: [], False: []}
    made = 0
    for scene, question, answer in said:
        task = Question.parse(question).task(scene)
        wrong, total = wrong_claims(scene, question, answer)
        for count in (counts["all"], counts[task]):
            count[0] += wrong
            count[1] += total
        refusals[task != "unanswerable"].append(refused(question, answer))
        made += len(claims(question, answer))
    answers = sum(map(len, refusals.values()))
    return Measured(
        hallucination={name: wrong / total for name, (wrong, total) in counts.items() if total},
        refusal=_share(refusals[False]),
        over_refusal=_share(refusals[True]),
        length=made / answers,
        answers=answers,
    )


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _statements(critique: str) -> tuple[list[str], str | None]:
    """The verdicts, and the count before a closing `wrong`."""
    words = _CLAIM.findall(critique)
    return (words[:-2], words[-2]) if len(words) > 1 and words[-1] == WRONG else (words, None)


def _count(verdicts: Sequence[str]) -> str:
    return str(sum(verdict != RIGHT for verdict in verdicts))


def _verdicts(scene: Scene, question: str, answer: str) -> list[str]:
    """What is to be said of each claim of an answer, and of each it lacks."""
    right = claims(question, Question.parse(question).answer(scene))
    return [
        SURPLUS if due is None else RIGHT if due == made else due
        for due, made in zip_longest(right, claims(question, answer))
    ]

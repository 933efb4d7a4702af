"""A reward by rule for a conversation whose answers hang together: are they right, and do they agree with each other?

A rule is a JSON file. It names the questions a conversation asks, in order, what can be answered to each, and which
answers go together, as a table of whole conversations ("*" = anything):

    {"questions": [{"yes": ["yes", "there is a cell"], "no": ["no"]}, {"round": ["round"], "none": ["nothing"]}],
     "combinations": [["yes", "round"], ["no", "none"]]}

An answer is read as the option of whose phrases it holds some (whole words, capitals apart; of overlapping phrases the
longest). One that holds phrases of several options, or of none, is not read.

Source: Dr-LLaVA, https://arxiv.org/abs/2405.19567: a term for each answer and one for each two that follow each other,
which are consistent where a row of the table holds both. The medicine, and a penalty on length that the released code
takes of the wrong text, are left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmrlhf_jax import storage
from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.rewards import GroupReward, content_of
from mmrlhf_jax.groups import Group

UNREAD = -1  # an answer that is none of its question's options; a truth that nobody states
ANYTHING = "*"
MOST_OPTIONS, MOST_ROWS, MOST_BYTES = 256, 10_000, 1 << 20
_FIELDS = {"questions", "combinations", "weights", "truth"}


class RuleError(ValueError):
    """A rule file that makes no sense, or a group that a rule cannot judge."""


@dataclass(frozen=True)
class Weights:
    """What each part of the reward counts."""

    right: float = 1.0
    """an answer that is the true one, where truth is known"""
    wrong: float = 0.0
    """another one"""
    unread: float = -0.5
    """an answer that is none of the options"""
    consistent: float = 1.0
    """two answers in a row that go together"""
    inconsistent: float = 0.0
    """two that do not, or of which one is not read"""


def symbolic_consistency(
    answer: np.ndarray, truth: np.ndarray, valid: np.ndarray, weights: Weights | None = None
) -> np.ndarray:
    """The reward f64 [...] of conversations of Q answers.

    Args:
      answer: i [..., Q], which of A options was answered; UNREAD = none of them.
      truth: i [..., Q], which would be right; UNREAD = not known, and then only an unread answer counts.
      valid: bool [Q - 1, A, A], [q, a, b]: answer a to question q and b to the next go together.
    """
    weights = weights or Weights()
    read = answer != UNREAD
    judged = np.where(truth == UNREAD, 0.0, np.where(answer == truth, weights.right, weights.wrong))
    each = np.where(read, judged, weights.unread).sum(axis=-1)
    first, second = answer[..., :-1], answer[..., 1:]
    together = valid[np.arange(first.shape[-1]), np.maximum(first, 0), np.maximum(second, 0)]
    agree = together & read[..., :-1] & read[..., 1:]
    return each + np.where(agree, weights.consistent, weights.inconsistent).sum(axis=-1)


@dataclass(frozen=True)
class ConsistencyRule:
    """A rule as its file states it: `questions` option -> phrases, and rows of `combinations`, an option a question."""

    questions: tuple[Mapping[str, tuple[str, ...]], ...]
    combinations: tuple[tuple[str, ...], ...]
    weights: Weights = Weights()
    truth: bool = False
    """a group's facts are the right answers, one a question, read as answers are"""

    @cached_property
    def valid(self) -> np.ndarray:
        """bool [Q - 1, A, A]: which answers go together, A the most options of a question."""
        most = max(map(len, self.questions))
        valid = np.zeros((len(self.questions) - 1, most, most), bool)
        for row in self.combinations:
            for q in range(len(valid)):
                valid[np.ix_([q], self._places(q, row[q]), self._places(q + 1, row[q + 1]))] = True
        return valid

    def _places(self, q: int, option: str) -> list[int]:
        options = list(self.questions[q])
        return list(range(len(options))) if option == ANYTHING else [options.index(option)]

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], dict[str, int]]]:
        patterns = []
        for options in self.questions:
            option_of = {phrase.lower(): place for place, phrases in enumerate(options.values()) for phrase in phrases}
            longest_first = sorted(option_of, key=len, reverse=True)
            patterns.append((re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"), option_of))
        return patterns

    def read(self, q: int, text: str) -> int:
        """Which option of question `q` a text holds, or UNREAD."""
        pattern, option_of = self._patterns[q]
        found = {option_of[phrase] for phrase in pattern.findall(text.lower())}
        return found.pop() if len(found) == 1 else UNREAD

    def judge(self, group: Group) -> GroupReward:
        """The reward of each response, as the last answer of its conversation.

        Raises RuleError naming the group's origin, where the conversation has more answers than the rule has questions,
        or lacks facts that are to be its truth.
        """
        said = [turn.text for turn in group.prompt if turn.role == "assistant"]
        count = len(said) + 1
        if count > len(self.questions):
            raise RuleError(f"{_where(group)}: {count} answers, and the rule has {len(self.questions)} questions")
        before = [self.read(q, text) for q, text in enumerate(said)]
        answers = np.array([[*before, self.read(count - 1, response.text)] for response in group.responses])
        scores = symbolic_consistency(answers, self._truth(group, count), self.valid[: count - 1], self.weights)
        k = len(group.responses)
        return GroupReward(scores.astype(np.float32)[:, None], (("",),) * k, np.ones((k, 1), bool))

    def _truth(self, group: Group, count: int) -> np.ndarray:
        if not self.truth:
            return np.full(count, UNREAD)
        if len(group.facts) < count:
            raise RuleError(
                f"{_where(group)}: {len(group.facts)} facts for {count} answers, and the rule takes them for the "
                "truth: prepare with --source mapped --map facts=FIELD, a list with the right answer to every question"
            )
        truth = np.array([self.read(q, fact) for q, fact in enumerate(group.facts[:count])])
        if (unread := np.flatnonzero(truth == UNREAD)).size:
            q = int(unread[0])
            raise RuleError(
                f"{_where(group)}: fact {q + 1}, {group.facts[q][:80]!r}, is none of the options of question {q + 1}"
            )
        return truth


def _where(group: Group) -> str:
    return str(group.origins[0]) if group.origins else group.id


def read_rule(path: str) -> tuple[ConsistencyRule, str]:
    """A rule file, and the sha256 that names it. Raises RuleError saying what is wrong with it."""
    file = storage.to_path(path)
    if not file.exists():
        raise RuleError(f"{path}: no such rule file")
    if file.stat().length > MOST_BYTES:
        raise RuleError(f"{path}: {file.stat().length} bytes, more than {MOST_BYTES}")
    data = file.read_bytes()
    try:
        rule = _rule_of(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise RuleError(f"{path}: {error}") from error
    return rule, hashlib.sha256(data).hexdigest()


def _rule_of(raw: Any) -> ConsistencyRule:
    if not isinstance(raw, dict) or not {"questions", "combinations"} <= raw.keys() <= _FIELDS:
        raise ValueError(
            f"a rule is an object with questions and combinations, and nothing but {', '.join(sorted(_FIELDS))}"
        )
    questions = tuple(_options(q, options) for q, options in enumerate(_list(raw["questions"], "questions"), 1))
    rows = _list(raw["combinations"], "combinations")
    if not questions or not rows or len(rows) > MOST_ROWS:
        raise ValueError(f"a rule has questions, and 1 to {MOST_ROWS} combinations")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(questions):
            raise ValueError(f"combination {number} is no list of {len(questions)} answers")
        for q, option in enumerate(row, 1):
            if option != ANYTHING and option not in questions[q - 1]:
                raise ValueError(f"combination {number}: {option!r} is no option of question {q}, nor {ANYTHING!r}")
    if type(truth := raw.get("truth", False)) is not bool:
        raise ValueError("truth is true or false")
    weights = Weights(**raw.get("weights", {}))
    for name, value in vars(weights).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"weight {name} is no finite number")
    if not truth and {"right", "wrong"} & raw.get("weights", {}).keys():
        raise ValueError("weights right and wrong are read with truth only: set truth to true")
    return ConsistencyRule(questions, tuple(map(tuple, rows)), weights, truth)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    return value


def _options(q: int, options: Any) -> dict[str, tuple[str, ...]]:
    """Raises ValueError where two options share a phrase, or there is not one for each."""
    if not isinstance(options, dict) or not 2 <= len(options) <= MOST_OPTIONS:
        raise ValueError(f"question {q} is no object of 2 to {MOST_OPTIONS} options")
    phrases = [phrase for each in options.values() for phrase in _list(each, f"question {q}: an option's phrases")]
    if not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases) or not all(options.values()):
        raise ValueError(f"question {q}: every option has phrases, and they are texts")
    if ANYTHING in options:
        raise ValueError(f"question {q}: {ANYTHING!r} stands for every option and names none")
    if len({phrase.lower() for phrase in phrases}) < len(phrases):
        raise ValueError(f"question {q}: a phrase stands under two options, or twice")
    return {option: tuple(each) for option, each in options.items()}


def write_scores_by_rule(
    part: PreparedDataset, groups: Sequence[Group], rows: Collection[int], rule: ConsistencyRule, store: AnnotationStore
) -> int:
    """Stores the reward of each of `rows` that has none yet, all or none; returns how many. Raises RuleError."""
    todo = sorted(set(rows) - store.done())
    rewards = [rule.judge(groups[row]).arrays() for row in todo]
    if todo:
        hashes = [content_of(groups[row], store.key["critiques"], rule.truth) for row in todo]
        store.write(todo, hashes, {name: [each[name] for each in rewards] for name in rewards[0]})
    return len(todo)

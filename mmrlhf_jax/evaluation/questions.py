"""Benchmarks of what a model answers: their questions, the answers to them, and figures of the two.

A benchmark is an `AnswerBenchmark`: how a row becomes a `Question`, what is asked of a judge if one is used, what an
answer is found to be (its `verdict`), and what all verdicts come to. Answers are those of launch/generate.py, or of any
file with one answer a row:

    id, or question_id     of the question; where no row has one, rows stand in the order of the questions
    responses, or answer, text, caption, output, model_answer
                           responses: a list of {text, ended, score} as launch/generate.py writes them; else a string
    question, or prompt    if there, that of the question it answers

A row that cannot be used costs the figures, not silently itself: all bad rows are listed, and nothing is measured
unless the user leaves them out (`skip_bad`), which the figures then say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from mmrlhf_jax.data.sources.pictures import Store, picture_of
from mmrlhf_jax.data.sources.rows import Rejected, Row, RowError, id_of, number_of, read_rows
from mmrlhf_jax.evaluation.comparisons import BenchmarkError, answer_of, refuse
from mmrlhf_jax.evaluation.judges import Ask, Reply
from mmrlhf_jax.evaluation.results import Measured
from mmrlhf_jax.groups import Media, Origin

Record = dict[str, Any]
"""A row of rows.jsonl: id, line, category, answers, what the verdict says, score where answers have one."""

MOST_CATEGORIES = 200
ANSWER_COLUMNS = ("answer", "text", "caption", "output", "model_answer")


@dataclass(frozen=True, slots=True)
class Question:
    """One row; `facts` are what its answer is judged by. Where `id` says more than the row, `name` in them is the row's
    own; `asked` is the question where `prompt` says more."""

    origin: Origin
    id: str
    category: str
    prompt: str
    media: tuple[Media, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """`ended` is False where its length was cut off, None where nobody said; `score` is a reward model's."""

    text: str
    ended: bool | None = None
    score: float | None = None


def nothing_to_remark(_: Sequence[Record]) -> list[str]:
    return []


@dataclass(frozen=True)
class AnswerBenchmark:
    """`counts` and `metrics` (name -> heading) are what its sections hold, in order.

    check     makes a question of a row, or raises RowError
    verdict   what the first answer of a question is (of `diversity`, all), with the judge's replies; () without a judge
    measure   section -> figures, of all records
    asks      what a judge is asked about an answer; None: no judge has anything to say here
    """

    name: str
    title: str
    counts: Sequence[str]
    metrics: Mapping[str, str]
    check: Callable[[Row, Store], Question]
    verdict: Callable[[Question, Sequence[Answer], Sequence[Reply]], Record]
    measure: Callable[[Sequence[Record]], Measured]
    asks: Callable[[Question, Answer], tuple[Ask, ...]] | None = None
    remarks: Callable[[Sequence[Record]], list[str]] = nothing_to_remark


# --- reading ----------------------------------------------------------------------------------------------------------


def read_questions(
    files: Sequence[str], check: Callable[[Row], Question], *, skip_bad: bool
) -> tuple[tuple[Question, ...], tuple[Rejected, ...]]:
    """Every question of the files, in order, and the rows that are none.

    Raises:
        SourceError: a file cannot be read.
        BenchmarkError: there is no question, or a row cannot be used and is not to be skipped.
    """
    questions: dict[str, Question] = {}
    bad: list[Rejected] = []
    for row in read_rows(files):
        if isinstance(row, Rejected):
            bad.append(row)
            continue
        try:
            question = check(row)
            if question.id in questions:
                raise RowError(f"id {question.id!r} is that of {questions[question.id].origin} too")
        except RowError as error:
            bad.append(Rejected(row.origin, str(error)))
            continue
        questions[question.id] = question
    if not skip_bad or not questions:
        refuse(bad, "mend the file, or measure the others with --skip-bad")
    if not questions:
        raise BenchmarkError(f"{', '.join(files)} holds no rows: correct --input")
    return tuple(questions.values()), tuple(bad)


def read_answers(file: str, questions: Sequence[Question], *, left_out: int = 0) -> list[tuple[Answer, ...]]:
    """The answers to each question, in the order of the questions; `left_out` rows of the input are none, and their
    answers are passed over.

    Raises:
        SourceError: the file cannot be read.
        BenchmarkError: a row cannot be used, answers no question or one that is answered already, or a question has no
            answer. Answers of another file are not taken for those of this one.
    """
    rows = list(read_rows([file]))
    good = [row for row in rows if isinstance(row, Row)]
    bad = [row for row in rows if isinstance(row, Rejected)]
    named = _by_name(questions)
    in_order = not bad and not any(_id(row) is not None for row in good)
    if in_order and (left_out or len(good) != len(questions)):
        raise BenchmarkError(
            f"{file} names no ids and has {len(good)} rows for {len(questions)} questions: give each its 'id'"
        )
    found: dict[str, tuple[Answer, ...]] = {}
    for place, row in enumerate(good):
        try:
            question = questions[place] if in_order else _asked(row, named)
            if question is None and left_out:
                left_out -= 1
                continue
            if question is None:
                raise RowError(f"id {_id(row)!r} is that of no question")
            if question.id in found:
                raise RowError(f"question {question.id!r} is answered twice")
            _check_question(row, question)
            found[question.id] = _answers(row)
        except RowError as error:
            bad.append(Rejected(row.origin, str(error)))
    missing = [Rejected(each.origin, "has no answer") for each in questions if each.id not in found]
    refuse([*bad, *(missing if not bad else ())], f"mend {file}, or correct --answers")
    return [found[question.id] for question in questions]


def _id(row: Row) -> Any:
    return row.fields.get("id") if row.fields.get("id") is not None else row.fields.get("question_id")


def _by_name(questions: Sequence[Question]) -> dict[str, Question]:
    """By id, and by the name a row itself has where only one has it."""
    count = Counter(question.facts.get("name", question.id) for question in questions)
    short = {name: each for each in questions if count[name := each.facts.get("name", each.id)] == 1}
    return short | {question.id: question for question in questions}


def _asked(row: Row, named: Mapping[str, Question]) -> Question | None:
    if _id(row) is None:
        raise RowError("the row has neither 'id' nor 'question_id', which other rows have")
    return named.get(id_of(_id(row), "'id'"))


def _check_question(row: Row, question: Question) -> None:
    said = row.fields.get("question", row.fields.get("prompt"))
    # a conversation is launch/generate.py's; a suffix or remedy was added to what the file asks
    if isinstance(said, str) and question.facts.get("asked", question.prompt).strip() not in said:
        raise RowError(f"it answers {said[:80]!r}, question {question.id!r} is {question.prompt[:80]!r}")


def _answers(row: Row) -> tuple[Answer, ...]:
    fields = row.fields
    if (responses := fields.get("responses")) is not None:
        if not isinstance(responses, list) or not responses or not all(isinstance(one, dict) for one in responses):
            raise RowError("'responses' is not a list of objects with 'text'")
        return tuple(_answer(one) for one in responses)
    column = next((name for name in ANSWER_COLUMNS if fields.get(name) is not None), None)
    if column is None:
        raise RowError(f"the row has none of 'responses', {', '.join(map(repr, ANSWER_COLUMNS))}")
    return (Answer(answer_of(fields[column], repr(column)), score=_score(fields.get("score"))),)


def _answer(response: Mapping[str, Any]) -> Answer:
    ended = response.get("ended")
    if ended is not None and not isinstance(ended, bool):
        raise RowError("'ended' is neither true nor false")
    return Answer(answer_of(response.get("text"), "'responses': 'text'"), ended, _score(response.get("score")))


def _score(value: Any) -> float | None:
    return None if value is None else number_of(value, "'score'")


# --- fields -----------------------------------------------------------------------------------------------------------


def column_of(row: Row, *names: str) -> Any:
    """The first of these columns that is there. Raises RowError where none is."""
    name = next((name for name in names if row.fields.get(name) is not None), None)
    if name is None:
        raise RowError(
            f"column {' or '.join(map(repr, names))} is missing; the row has {', '.join(sorted(row.fields)) or 'none'}"
        )
    return row.fields[name]


def name_of(row: Row) -> str:
    """The row's `id` or `question_id`; where it has none, its line."""
    return str(row.origin.line) if _id(row) is None else id_of(_id(row), "'id'")


def picture_named(value: Any, where: str, store: Store) -> Media:
    """A picture of a row; of a URL its last part, to be found under the media root: nothing is downloaded."""
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        name = PurePosixPath(urlsplit(value).path).name
        if not name:
            raise RowError(f"{where} is a URL that names no file")
        return Media("image", name)
    return picture_of(value, where, store)


def texts_of(value: Any, where: str) -> tuple[str, ...]:
    """A list of strings; null is none."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise RowError(f"{where} is not a list of strings")
    return tuple(value)


# --- figures ----------------------------------------------------------------------------------------------------------


def records_of(
    benchmark: AnswerBenchmark,
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    replies: Sequence[Sequence[Reply]],
) -> list[Record]:
    """What rows.jsonl says of each question."""
    records = []
    for question, given, said in zip(questions, answers, replies, strict=True):
        record: Record = {
            "id": question.id,
            "line": question.origin.line,
            "category": question.category,
            "answers": [answer.text for answer in given],
        }
        if given[0].score is not None:
            record["score"] = given[0].score
        if said:
            record["replies"] = [reply.text if reply.text is not None else {"none": reply.reason} for reply in said]
        records.append(record | benchmark.verdict(question, given, said))
    return records


def by_category(records: Sequence[Record], figures: Callable[[Sequence[Record]], Mapping[str, Any]]) -> Measured:
    """`figures` of each category, in order of appearance, and of all rows (`overall`); where every answer of a section
    has a reward model's score, also their mean (`reward`). Raises BenchmarkError for too many to be categories."""
    sections: dict[str, list[Record]] = {}
    for record in records:
        sections.setdefault(record["category"], []).append(record)
    if len(sections) > MOST_CATEGORIES:
        raise BenchmarkError(f"the rows name {len(sections)} categories: is that column one of categories?")
    named = {**{name: rows for name, rows in sections.items() if name != "overall"}, "overall": list(records)}
    return {
        name: {"rows": len(rows), **figures(rows), "reward": mean([row.get("score") for row in rows])}
        for name, rows in named.items()
    }


def mean(values: Sequence[Any]) -> float | None:
    """None where there is none, or one is None: nothing to divide by, or not all are known."""
    if not values or any(value is None for value in values):
        return None
    return math.fsum(values) / len(values)


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None

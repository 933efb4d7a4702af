"""Rows, answers and verdicts of benchmarks of answers, for their tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_samples import write_rows

from mmrlhf_jax.evaluation.judges import Reply
from mmrlhf_jax.evaluation.questions import Answer, AnswerBenchmark, Question, Record, read_questions, records_of
from mmrlhf_jax.groups import Media


def no_store(encoded: bytes) -> Media:
    raise AssertionError("no picture stands in these rows")


def questions_of(benchmark: AnswerBenchmark, folder: Path, rows: Sequence[Any], name: str = "rows.jsonl") -> Any:
    file = write_rows(folder / name, list(rows))
    questions, _ = read_questions([file], lambda row: benchmark.check(row, no_store), skip_bad=False)
    return questions


def judged(
    benchmark: AnswerBenchmark, questions: Sequence[Question], answers: Sequence[Any], replies: Sequence[Any] = ()
) -> list[Record]:
    """Records of answers (a text, or several), with replies (texts, None: unusable) to each, if any."""
    given = [tuple(Answer(text) for text in ([one] if isinstance(one, str) else one)) for one in answers]
    said = [tuple(Reply(text) for text in one) for one in replies] or [() for _ in questions]
    return records_of(benchmark, questions, given, said)

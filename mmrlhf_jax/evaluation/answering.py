"""A benchmark of answers from beginning to end: read the questions, have them answered, judge, measure, write.

    OUTPUT/answers.jsonl     a model's answers, and a reward model's scores of them (`model_answers`)
    OUTPUT/replies/          a judge's replies by content
    OUTPUT/rejected.jsonl    rows that were left out (--skip-bad)
    OUTPUT/results.json, rows.jsonl   see `results`

Each step keeps what it has done; the same command again goes on with the next. Answers come from the engine that
launch/generate.py uses. One process, with all its devices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mmrlhf_jax import storage
from mmrlhf_jax.command import CommandError
from mmrlhf_jax.data.report import rejected_to_json
from mmrlhf_jax.data.sources.pictures import Store
from mmrlhf_jax.data.sources.rows import Rejected
from mmrlhf_jax.evaluation import final_answer
from mmrlhf_jax.evaluation.answer_arguments import FILES, OF, AnswerArguments, FinalAnswer, files_of, judge_of, options
from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.judges import Reply, replies_of
from mmrlhf_jax.evaluation.model_answers import answer
from mmrlhf_jax.evaluation.questions import (
    Answer,
    AnswerBenchmark,
    Question,
    Record,
    read_answers,
    read_questions,
    records_of,
)
from mmrlhf_jax.evaluation.results import Columns, Measured, find_done, table, write
from mmrlhf_jax.groups import Media
from mmrlhf_jax.inference.prompts import picture_store
from mmrlhf_jax.lease import lease
from mmrlhf_jax.training.model import absolute
from mmrlhf_jax.training.runtime import stop_signals

REJECTED, REPLIES = "rejected.jsonl", "replies"

Stop = Callable[[], bool]


def run(arguments: AnswerArguments) -> None:
    """Everything after the command line has been checked. Raises CommandError, ValueError."""
    benchmark = OF[type(arguments)](arguments)
    settings = _settings(arguments, benchmark)
    if (found := find_done(arguments.output, settings)) is not None and arguments.model is None:
        show_done(arguments.output, benchmark, found)
        _guard(arguments, found["systems"])
        return
    with tempfile.TemporaryDirectory(prefix="mmrlhf-evaluate-") as folder, stop_signals() as asked:
        store: Store = _forget if arguments.model is None else picture_store(folder)
        questions, rejected = read_questions(
            list(files_of(arguments)), partial(_check, benchmark, arguments.suffix, store), skip_bad=arguments.skip_bad
        )
        with lease(storage.to_path(arguments.output) / "lease.json", arguments.output):
            _answer_and_finish(arguments, benchmark, settings, questions, rejected, folder, asked.is_set)


def _answer_and_finish(
    arguments: AnswerArguments,
    benchmark: AnswerBenchmark,
    settings: dict[str, Any],
    questions: Sequence[Question],
    rejected: Sequence[Rejected],
    folder: str,
    stop: Callable[[], bool],
) -> None:
    """All that writes into the output."""
    if arguments.model is None:
        assert arguments.answers is not None  # `check` has seen to it
        answers = read_answers(arguments.answers, questions, left_out=len(rejected))
    else:
        given = answer(arguments, questions, folder, stop)
        questions, answers = given.questions, given.answers
        rejected, settings = (*rejected, *given.rejected), settings | given.settings
    if (found := find_done(arguments.output, settings)) is not None:
        show_done(arguments.output, benchmark, found)
        _guard(arguments, found["systems"])
        return
    replies = _judged(arguments, benchmark, questions, answers, stop)
    records = records_of(benchmark, questions, answers, replies)
    _finish(arguments, benchmark, settings, records, rejected, answers)


def show_done(output: str, columns: Columns, found: Mapping[str, Any]) -> None:
    print("\n".join([f"done already: {output}", *table(columns, found["systems"], found["remarks"])]))


def sha256_of(file: str, flag: str = "--input") -> str:
    """Raises BenchmarkError where there is no such file."""
    path = storage.to_path(file)
    if not path.exists() or path.is_dir():
        raise BenchmarkError(f"{file} {'is a directory' if path.exists() else 'does not exist'}: correct {flag}")
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            total.update(block)
    return total.hexdigest()


def _settings(arguments: AnswerArguments, benchmark: AnswerBenchmark) -> dict[str, Any]:
    """What the figures depend on and can be told before a model is loaded."""
    named = {name: getattr(arguments, name, None) for name in FILES}
    baseline = getattr(arguments, "baseline", None)
    return {
        "benchmark": benchmark.name,
        "input_sha256": [sha256_of(file) for file in files_of(arguments)],
        "answers_sha256": None if arguments.answers is None else sha256_of(arguments.answers, "--answers"),
        "model": None if arguments.model is None else absolute(arguments.model),
        "reward_model": None if arguments.reward is None else absolute(arguments.reward),
        **options(arguments),
        **{f"{name}_sha256": sha256_of(file, f"--{name}") for name, file in named.items() if file is not None},
        **({"baseline_sha256": final_answer.sha256_of_baseline(baseline)} if baseline is not None else {}),
    }


def _forget(_: bytes) -> Media:
    """In place of a store, where answers are there and no picture is looked at."""
    return Media("image", "embedded:unread")


def _check(benchmark: AnswerBenchmark, suffix: str, store: Store, row: Any) -> Question:
    question = benchmark.check(row, store)
    if not suffix:
        return question
    facts = {"asked": question.prompt, **question.facts}
    return dataclasses.replace(question, prompt=f"{question.prompt}\n{suffix}", facts=facts)


# --- verdicts and figures ---------------------------------------------------------------------------------------------


def _judged(
    arguments: AnswerArguments,
    benchmark: AnswerBenchmark,
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    stop: Stop,
) -> list[tuple[Reply, ...]]:
    """A judge's replies about each first answer; none where no judge is asked."""
    endpoint = judge_of(arguments)
    if not endpoint.url or benchmark.asks is None:
        return [() for _ in questions]
    asks = [benchmark.asks(question, given[0]) for question, given in zip(questions, answers, strict=True)]
    cache = endpoint.cache or f"{arguments.output}/{REPLIES}"
    said = iter(replies_of([one for each in asks for one in each], endpoint, cache, stop))
    return [tuple(next(said) for _ in each) for each in asks]


def _finish(
    arguments: AnswerArguments,
    benchmark: AnswerBenchmark,
    settings: Mapping[str, Any],
    records: Sequence[Record],
    rejected: Sequence[Rejected],
    answers: Sequence[Sequence[Answer]],
) -> None:
    systems: dict[str, Measured] = {"model": benchmark.measure(records)}
    remarks = [*benchmark.remarks(records), *_remarks(rejected, answers)]
    if isinstance(arguments, FinalAnswer) and arguments.baseline is not None:
        before = final_answer.read_baseline(arguments.baseline, records)
        systems["baseline"] = benchmark.measure(before)
        remarks.append(final_answer.turned(before, records))
    if rejected:
        directory = storage.to_path(arguments.output)
        directory.mkdir(parents=True, exist_ok=True)
        storage.write_whole(directory / REJECTED, rejected_to_json(tuple(rejected)).encode())
    results = {"benchmark": benchmark.title, "settings": settings, "remarks": remarks, "systems": systems}
    write(arguments.output, results, records)
    print("\n".join([*table(benchmark, systems, remarks), f"rows and figures: {arguments.output}"]))
    _guard(arguments, systems)


def _remarks(rejected: Sequence[Rejected], answers: Sequence[Sequence[Answer]]) -> list[str]:
    lines = []
    if rejected:
        lines.append(f"{len(rejected)} bad rows are left out, see {REJECTED}: do not compare with whole figures")
    ended = [answer.ended for given in answers for answer in given if answer.ended is not None]
    if cut := ended.count(False):
        lines.append(f"{cut} of {len(ended)} answers were cut short: raise --max-new-tokens")
    return lines


def _guard(arguments: AnswerArguments, systems: Mapping[str, Measured]) -> None:
    """Raises CommandError where accuracy fell by more than it may."""
    if not isinstance(arguments, FinalAnswer) or arguments.max_drop is None:
        return
    now, before = (systems[name]["overall"]["accuracy"] for name in ("model", "baseline"))
    if before - now > arguments.max_drop + 1e-12:
        raise CommandError(
            f"accuracy fell from {before:.4f} to {now:.4f}, by more than --max-drop {arguments.max_drop}"
        )

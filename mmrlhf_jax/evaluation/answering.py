"""A benchmark of answers from beginning to end: read the questions, have them answered, judge, measure, write.

    OUTPUT/answers.jsonl     a model's answers, as launch/generate.py writes them, and with its ways of going on
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
from mmrlhf_jax.evaluation.comparisons import BenchmarkError, refuse
from mmrlhf_jax.evaluation.judges import Reply, replies_of
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
from mmrlhf_jax.groups import Group, Media, Turn
from mmrlhf_jax.inference.answer_file import AnswerFile, Saving
from mmrlhf_jax.inference.answers import ANSWERS, Policy, Sampling, begin, finish, room_to_answer, write_answers
from mmrlhf_jax.inference.engine import progress_bar
from mmrlhf_jax.inference.prompts import Prompts, picture_store, prove_prompts
from mmrlhf_jax.inference.watch import Watch
from mmrlhf_jax.models.families import read_config
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import LlavaOnevisionRenderer, load_renderer
from mmrlhf_jax.nn.sharding import ShardingRules, make_mesh
from mmrlhf_jax.training.model import LoadedModel, absolute, assets_of, check_family, load_model, model_fingerprint
from mmrlhf_jax.training.recipe import INFERENCE
from mmrlhf_jax.training.runtime import set_up_jax, stop_signals

ANSWER_FILE, REJECTED, REPLIES = "answers.jsonl", "rejected.jsonl", "replies"

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
        if arguments.model is None:
            assert arguments.answers is not None  # `check` has seen to it
            answers = read_answers(arguments.answers, questions, left_out=len(rejected))
        else:
            questions, answers, more, known = _answer(arguments, questions, folder, asked.is_set)
            rejected, settings = (*rejected, *more), settings | known
        if (found := find_done(arguments.output, settings)) is not None:
            show_done(arguments.output, benchmark, found)
            _guard(arguments, found["systems"])
            return
        replies = _judged(arguments, benchmark, questions, answers, asked.is_set)
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
    return {
        "benchmark": benchmark.name,
        "input_sha256": [sha256_of(file) for file in files_of(arguments)],
        "answers_sha256": None if arguments.answers is None else sha256_of(arguments.answers, "--answers"),
        "model": None if arguments.model is None else absolute(arguments.model),
        **options(arguments),
        **{f"{name}_sha256": sha256_of(file, f"--{name}") for name, file in named.items() if file is not None},
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


# --- answers of a model -----------------------------------------------------------------------------------------------


def _answer(
    arguments: AnswerArguments, questions: Sequence[Question], folder: str, stop: Stop
) -> tuple[tuple[Question, ...], list[tuple[Answer, ...]], tuple[Rejected, ...], dict[str, Any]]:
    """The questions that could be asked, their answers, the rows that could not, and what the answers depend on."""
    assert arguments.model is not None
    set_up_jax(arguments.dtype)
    assets = assets_of(arguments.model)
    check_family(LoadedModel(read_config(assets), None, assets), arguments.model, reward=False)
    renderer = load_renderer(str(assets), arguments.render)
    prompts = _prompts(arguments, questions, folder).without(room_to_answer(renderer, arguments.sampling))
    if not arguments.skip_bad or not prompts.groups:
        refuse(prompts.rejected, "mend the cause, or measure the others with --skip-bad")
    file = AnswerFile(storage.to_path(arguments.output) / ANSWER_FILE, prompts.unit)
    samples = getattr(arguments, "samples", 1)
    known = {
        "prompts": prompts.fingerprint(),
        "samples": samples,
        **dataclasses.asdict(arguments.sampling),
        "dtype": arguments.dtype,
        "rendering": renderer.fingerprint,
    }
    begin(file, known)
    known["model_fingerprint"] = _write_answers(arguments, prompts, renderer, file, samples, stop)
    asked = tuple(questions[place] for place in prompts.places)
    answers = [tuple(Answer(each["text"], each["ended"]) for each in line["responses"]) for line in file.read()]
    return asked, answers, prompts.rejected, known


def _prompts(arguments: AnswerArguments, questions: Sequence[Question], folder: str) -> Prompts:
    groups = {
        place: Group(each.id, (Turn("user", each.prompt),), each.media, (), (), (each.origin,))
        for place, each in enumerate(questions)
    }
    return prove_prompts(
        ", ".join(files_of(arguments)),
        "row",
        groups,
        arguments.media,
        folder,
        frames=arguments.render.frames,
        workers=arguments.decode.workers,
        progress=True,
    )


def _write_answers(
    arguments: AnswerArguments,
    prompts: Prompts,
    renderer: LlavaOnevisionRenderer,
    file: AnswerFile,
    samples: int,
    stop: Stop,
) -> str:
    """Has the model answer what has no answer yet; returns its fingerprint, which earlier answers must share."""
    assert arguments.model is not None
    mesh = make_mesh(arguments.mesh)
    model = load_model(arguments.model, mesh, ShardingRules(), rates=INFERENCE)
    fingerprint = model_fingerprint(model.config, model.params)
    begin(file, {"model": fingerprint})
    if file.finished():
        file.clear_parts()
        return fingerprint
    compute = Compute(
        dtype=arguments.dtype,
        platform=mesh.devices.flat[0].platform,
        attention=arguments.attention,
        vocab_shards=mesh.shape["tensor"],
    )
    with progress_bar(unit="prompt") as bar:
        write_answers(
            prompts,
            Policy(model, renderer, mesh, compute),
            Sampling(samples, arguments.sampling, arguments.decode),
            file,
            Saving(arguments.save_every),
            Watch(stop, bar),
        )
    finish(prompts, file, ANSWERS)
    return fingerprint


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

"""The command line of benchmarks whose answers are measured: one dataclass each, and the benchmark it asks for.

A field is a flag, its docstring the help; `OF` makes the benchmark, and `options` states what else its figures depend
on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.evaluation import chair, diversity, final_answer, mad_bench, mmhal_bench, pope, safety_bench
from mmrlhf_jax.evaluation.judges import Endpoint, check_endpoint
from mmrlhf_jax.evaluation.questions import AnswerBenchmark
from mmrlhf_jax.inference.engine import DecodeConfig
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.nn.sharding import MeshConfig


@dataclass(frozen=True, kw_only=True)
class AnswerArguments:
    input: tuple[str, ...]
    """the benchmark's rows: JSON-lines, JSON-array or .parquet files"""
    output: str
    """directory of results.json and rows.jsonl, and of answers.jsonl where MODEL gives the answers"""
    model: str | None = None
    """answers the questions: a Hugging Face directory, a hub id, or a RUN; or give --answers"""
    answers: str | None = None
    """answers given already: a file of launch/generate.py, or rows {id, answer}. Scores of a reward model in it
    (generate.py --reward) are shown as `reward`, their mean"""
    reward: str | None = None
    """a reward model that scores MODEL's answers; the table then has their mean (`reward`)"""
    critiques: Literal["generated", "none"] | None = None
    """generated: scores are read behind the reward model's own critiques (the default, of a model that writes any);
    none: without (the default of a scalar model)"""
    critique: SamplingConfig = field(default_factory=SamplingConfig)
    """how critiques are sampled"""
    media: str | None = None
    """root of all picture and video paths; of a picture's URL the last part is sought there"""
    skip_bad: bool = False
    """measure the good rows where some are bad; without it a bad row is an error. OUTPUT/rejected.jsonl lists them"""
    suffix: str = ""
    """text put behind every question, on a line of its own"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of activations and matrix products"""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    save_every: float = 20.0
    """seconds between two writes of what is done: what a killed run may lose"""
    render: RenderOptions = field(default_factory=RenderOptions)
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True, kw_only=True)
class Pope(AnswerArguments):
    """POPE: accuracy, precision, recall, F1 and yes rate of yes-or-no questions about objects."""


@dataclass(frozen=True, kw_only=True)
class Chair(AnswerArguments):
    """CHAIR: objects that descriptions mention and pictures do not hold."""

    synonyms: str
    """file of object names and synonyms: a line an object, its name first, parted by commas"""


@dataclass(frozen=True, kw_only=True)
class MMHalBench(AnswerArguments):
    """MMHal-Bench: a judge's ratings, hallucination rate and informativeness by type of question."""

    judge: Endpoint = field(default_factory=Endpoint)


@dataclass(frozen=True, kw_only=True)
class MadBench(AnswerArguments):
    """MAD-Bench: questions that assume what is not so."""

    remedy: bool = False
    """ask before each question to check what it takes for granted"""
    rule: bool = False
    """call answers that deny anything right, where no judge is asked: a rough stand-in"""
    judge: Endpoint = field(default_factory=Endpoint)


@dataclass(frozen=True, kw_only=True)
class SafetyBench(AnswerArguments):
    """MM-RLHF-SafetyBench: eight tasks, by rules or a judge. --input TASK=FILE names the task of a file whose rows do
    not. --max-new-tokens 2048 as the released tasks have it."""

    judge: Endpoint = field(default_factory=Endpoint)


@dataclass(frozen=True, kw_only=True)
class Diversity(AnswerArguments):
    """Diversity of the samples to one prompt, and of answers to different ones."""

    samples: int = 1
    """answers to each prompt"""
    vocabulary: int = diversity.VOCABULARY
    """V of expectation-adjusted distinct n-grams"""
    embeddings: str | None = None
    """.npy file, floats [answers, dimensions] in the order of prompts and samples: their similarity is shown too"""


@dataclass(frozen=True, kw_only=True)
class FinalAnswer(AnswerArguments):
    """Exact match of final answers, and a guard against what a model lost."""

    kind: final_answer.Kind | None = None
    """how answers are read, where rows do not say"""
    baseline: str | None = None
    """output of an earlier evaluation of the same rows to compare with"""
    max_drop: float | None = None
    """fail where accuracy is lower than the baseline's by more than this"""


def check(arguments: AnswerArguments) -> None:
    """Raises UsageError for options that contradict each other, or that nothing would read."""
    if (arguments.model is None) == (arguments.answers is None):
        raise UsageError("give the answers as one of --model, which makes them, and --answers")
    if arguments.answers is not None:
        bare = AnswerArguments(input=arguments.input, output=arguments.output)
        names = (
            "reward", "suffix", "media", "dtype", "attention", "save_every", "render", "sampling", "decode", "mesh",
        )  # fmt: skip
        if changed := [name for name in names if getattr(arguments, name) != getattr(bare, name)]:
            raise UsageError(f"--{changed[0].replace('_', '-')} (or one of its fields) is for --model")
    if arguments.reward is None and (arguments.critiques, arguments.critique) != (None, SamplingConfig()):
        raise UsageError("--critiques and --critique are for --reward")
    if not arguments.save_every > 0:
        raise UsageError(f"--save-every {arguments.save_every} is not positive")
    if isinstance(arguments, Diversity):
        _check_diversity(arguments)
    if isinstance(arguments, FinalAnswer) and arguments.max_drop is not None:
        if arguments.baseline is None:
            raise UsageError("--max-drop needs the --baseline that accuracy is compared with")
        if not 0 <= arguments.max_drop < 1:
            raise UsageError(f"--max-drop {arguments.max_drop} is no share of rows")
    endpoint = judge_of(arguments)
    if endpoint.url:
        check_endpoint(endpoint)
    elif endpoint != Endpoint():
        raise UsageError("--judge.model and others are for --judge.url")
    if isinstance(arguments, MadBench) and arguments.rule and endpoint.url:
        raise UsageError("--rule is for evaluations without --judge.url")


def _check_diversity(arguments: Diversity) -> None:
    if arguments.reward is not None:
        raise UsageError("--reward is for benchmarks with scores: diversity compares the answers' words")
    if arguments.samples < 1:
        raise UsageError(f"--samples {arguments.samples} is not positive")
    if arguments.vocabulary < 2:
        raise UsageError(f"--vocabulary {arguments.vocabulary} is too small")
    if arguments.answers is not None and arguments.samples != 1:
        raise UsageError("--samples is for --model")
    if arguments.samples > 1 and arguments.sampling.temperature == 0:
        raise UsageError(f"{arguments.samples} greedy answers are the same: set --temperature above 0")


def judge_of(arguments: AnswerArguments) -> Endpoint:
    """An endpoint without a URL where no judge is asked."""
    return getattr(arguments, "judge", Endpoint())


def files_of(arguments: AnswerArguments) -> dict[str, str]:
    """The files of --input, each with the task that is named for its rows, or "". Raises UsageError for one twice."""
    found: dict[str, str] = {}
    for given in arguments.input:
        task, equals, file = given.partition("=")
        if not (isinstance(arguments, SafetyBench) and equals and task in safety_bench.TASKS):
            task, file = "", given
        if file in found:
            raise UsageError(f"--input names {file} twice")
        found[file] = task
    return found


def options(arguments: AnswerArguments) -> dict[str, Any]:
    """What the figures depend on beside rows and answers; files are the caller's to add."""
    own = {one.name for one in dataclasses.fields(arguments)} - {
        one.name for one in dataclasses.fields(AnswerArguments)
    }
    endpoint = judge_of(arguments)
    stated = {name: getattr(arguments, name) for name in sorted(own - {"judge", "max_drop", *FILES})}
    judge = {"url": endpoint.url.rstrip("/"), "model": endpoint.model} if endpoint.url else None
    return {
        "suffix": arguments.suffix,
        "skip_bad": arguments.skip_bad,
        "tasks": [task for task in files_of(arguments).values() if task],
        **stated,
        "judge": judge,
    }


FILES = ("synonyms", "embeddings")
"""Options that name a file, whose content the figures depend on."""


def _chair(arguments: Any) -> AnswerBenchmark:
    return chair.benchmark(chair.read_synonyms(arguments.synonyms))


def _mad(arguments: Any) -> AnswerBenchmark:
    return mad_bench.benchmark(remedy=arguments.remedy, rule=arguments.rule)


def _safety(arguments: Any) -> AnswerBenchmark:
    return safety_bench.benchmark({file: task for file, task in files_of(arguments).items() if task})


def _diversity(arguments: Any) -> AnswerBenchmark:
    embeddings = None if arguments.embeddings is None else diversity.read_embeddings(arguments.embeddings)
    return diversity.benchmark(vocabulary=arguments.vocabulary, embeddings=embeddings)


def _final(arguments: Any) -> AnswerBenchmark:
    return final_answer.benchmark(arguments.kind)


def _pope(_: Any) -> AnswerBenchmark:
    return pope.BENCHMARK


def _mmhal(_: Any) -> AnswerBenchmark:
    return mmhal_bench.BENCHMARK


OF: dict[type[AnswerArguments], Callable[[Any], AnswerBenchmark]] = {
    Pope: _pope,
    Chair: _chair,
    MMHalBench: _mmhal,
    MadBench: _mad,
    SafetyBench: _safety,
    Diversity: _diversity,
    FinalAnswer: _final,
}

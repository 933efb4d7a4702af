"""Answers of a policy to prompts, from a file or a prepared dataset; with a reward model, the best of n.

    python launch/generate.py --model MODEL --input prompts.jsonl --media media/ --output answers.jsonl
    python launch/generate.py --model MODEL --dataset DATA --output best.jsonl --samples 8 --temperature 1 --reward RM

A row of the input (JSON lines or parquet): {"id": "q1", "prompt": "What is this?", "image": "a.png"}. `id` may be left
out (then the line's number); `prompt` is a string or a list of messages {role, content} ending with the user's; `image`
a path under --media, a data URI, {bytes, path}, or a list of these; or `video`, a file or a directory of frames; other
columns are not read.

A line of the output, in the order of the input: {"id", "line", "prompt", "responses": [{"text", "tokens", "ended"},
...]}; with --reward each response also has "score", and with generated critiques "scores", "critiques" and
"critiques_ended", and the line "best", the index of the highest score (the first of equals). A dataset's prompts have
"row", counted from 0, in place of "line". `tokens` counts them; `ended` is false where --max-new-tokens cut an answer
off.

OUTPUT appears when it is whole; until then what is done waits in OUTPUT.parts. OUTPUT.settings.json says what the
answers depend on. The same command again resumes. Exit codes: 0 done, 1 failed, 2 bad usage, 75 interrupted.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import Mesh

from mmrlhf_jax.command import CommandError, UsageError, read_arguments, run_command
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.report import SHOWN
from mmrlhf_jax.inference.answer_file import AnswerFile, Record, Saving
from mmrlhf_jax.inference.answers import (
    ANSWERS,
    SCORES,
    Policy,
    Sampling,
    begin,
    finish,
    room_to_answer,
    room_to_score,
    write_answers,
    write_scores,
)
from mmrlhf_jax.inference.engine import DecodeConfig, progress_bar
from mmrlhf_jax.inference.forward import ForwardConfig
from mmrlhf_jax.inference.layout import in_layout
from mmrlhf_jax.inference.prompts import Prompts, dataset_prompts, read_prompts
from mmrlhf_jax.inference.reading import ReadingConfig, key_of, reading_of
from mmrlhf_jax.inference.reward import RewardModel, Scoring
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.inference.watch import Watch
from mmrlhf_jax.models.critique_reward.render import AnyRewardRenderer, load_reward_renderer, shows_facts
from mmrlhf_jax.models.families import read_config
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import LlavaOnevisionRenderer, RenderOptions, load_renderer
from mmrlhf_jax.nn.resharding import Layout
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.storage import to_path
from mmrlhf_jax.training.distributed import AgreedStop, agree_on_view, is_speaker, job_lease, join_processes, say
from mmrlhf_jax.training.model import LoadedModel, assets_of, check_family, load_model, model_fingerprint
from mmrlhf_jax.training.peers import StuckConfig, set_limits, watched_processes
from mmrlhf_jax.training.recipe import INFERENCE
from mmrlhf_jax.training.runtime import set_up_jax, stop_signals


@dataclass(frozen=True)
class Arguments:
    __doc__ = __doc__

    model: str
    """a Hugging Face directory, a hub id, or a RUN"""
    output: str
    """the file of answers, local or gs://; on several hosts on storage that all share"""
    input: str | None = None
    """a file of prompts, JSON lines or parquet; or give --dataset"""
    media: str | None = None
    """root of all picture and video paths in --input; pictures that stand in the rows need none"""
    dataset: str | None = None
    """answer the prompts of a directory made by launch/prepare.py, or of a mixture file"""
    skip_bad: bool = False
    """answer the good rows where some are bad; without it a bad row is an error. OUTPUT.rejected.jsonl lists them"""
    samples: int = 1
    """answers to each prompt"""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    reward: str | None = None
    """a reward model that scores the answers once all are there; MODEL is dropped from memory before it is loaded"""
    critiques: Literal["generated", "none"] | None = None
    """generated: scores are read behind the reward model's own critiques (the default, of a model that writes any);
    none: without (the default of a scalar model)"""
    critique_samples: int = 1
    """critiques of each answer; its score is the mean of theirs"""
    critique: SamplingConfig = field(default_factory=SamplingConfig)
    template: str = ""
    """file with the template of a reward model that does not bring its own"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of activations and matrix products"""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    save_every: float = 20.0
    """seconds between two writes of what is done: what a killed run may lose"""
    render: RenderOptions = field(default_factory=RenderOptions)
    """--render.system is the policy's; a reward model brings its own"""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    """how answers are scored without critiques"""
    reading: Annotated[ReadingConfig, tyro.conf.arg(name="")] = field(default_factory=ReadingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    layout: Layout = "split"
    """where parameters lie while answers are decoded. split: as they train, each layer gathered for each token where
    --mesh.fsdp is above 1; whole: moved once, so that every device keeps all that its share of --mesh.tensor needs"""
    stuck: StuckConfig = field(default_factory=StuckConfig)


@dataclass(frozen=True)
class Judging:
    """A reward model yet to be loaded, and what is asked of it."""

    name: str
    renderer: AnyRewardRenderer
    scoring: Scoring
    reading: dict[str, Any]
    """what of it the scores depend on"""


@dataclass(frozen=True)
class Work:
    """What both stages work with; `finished`: OUTPUT is there, and only the models are yet to be compared."""

    arguments: Arguments
    prompts: Prompts
    file: AnswerFile
    mesh: Mesh
    compute: Compute
    stop: Callable[[], bool]
    finished: bool

    @property
    def saving(self) -> Saving:
        return Saving(self.arguments.save_every, self.arguments.forward.rows_per_part)


def main() -> None:
    arguments = read_arguments(Arguments, prog="generate.py")
    check(arguments)
    join_processes()
    set_up_jax(arguments.dtype)
    with (
        watched_processes(),
        stop_signals() as asked,
        tempfile.TemporaryDirectory(prefix="mmrlhf-generate-") as folder,
    ):
        set_limits(arguments.stuck)
        answer(arguments, make_mesh(arguments.mesh), asked, folder)


def check(arguments: Arguments) -> None:
    """Raises UsageError for options that contradict each other, or that nothing would read."""
    if (arguments.input is None) == (arguments.dataset is None):
        raise UsageError("give the prompts as one of --input and --dataset")
    if arguments.dataset is not None and arguments.media is not None:
        raise UsageError("--media is for --input: a dataset holds its pictures")
    for name in ("samples", "critique_samples", "save_every"):
        if not getattr(arguments, name) > 0:  # nan is not
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is not positive")
    if arguments.samples > 1 and arguments.sampling.temperature == 0:
        raise UsageError(f"{arguments.samples} greedy answers are the same: set --temperature above 0")
    if arguments.reward is None:
        bare = Arguments(arguments.model, arguments.output)
        for name in ("critiques", "critique_samples", "critique", "template", "forward", "reading"):
            if getattr(arguments, name) != getattr(bare, name):
                raise UsageError(f"--{name.replace('_', '-')} (or one of its fields) is for --reward")


def answer(arguments: Arguments, mesh: Mesh, asked: threading.Event, folder: str) -> None:
    """Everything after the command line; media that are not files of their own wait in the local `folder`."""
    compute = Compute(
        dtype=arguments.dtype,
        platform=mesh.devices.flat[0].platform,
        attention=arguments.attention,
        vocab_shards=mesh.shape["tensor"],
    )
    renderer = load_renderer(_assets(arguments.model, reward=False), arguments.render)
    judging = None if arguments.reward is None else _judging(arguments, arguments.reward)
    prompts = _prompts(arguments, folder)
    prompts = prompts.without(room_to_answer(renderer, arguments.sampling))
    if judging is not None:
        prompts = prompts.without(room_to_score(judging.renderer, arguments.sampling, judging.scoring))
    file = AnswerFile(to_path(arguments.output), prompts.unit)
    settings = _settings(arguments, prompts, renderer, judging)
    file.check(settings)  # before anything is written beside it
    with job_lease(file.lease, str(file.path)):
        _answer_all(arguments, prompts, file, settings, renderer, judging, mesh, compute, asked)


def _answer_all(
    arguments: Arguments,
    prompts: Prompts,
    file: AnswerFile,
    settings: dict[str, Any],
    renderer: LlavaOnevisionRenderer,
    judging: Judging | None,
    mesh: Mesh,
    compute: Compute,
    asked: threading.Event,
) -> None:
    """What the job does that holds the lease of OUTPUT."""
    _settle_rejected(arguments, prompts, file)
    begin(file, settings)
    finished = file.finished()
    agree_on_view(file.path, finished)

    agreed = AgreedStop(mesh)

    def stop() -> bool:
        return agreed(asked.is_set())

    work = Work(arguments, prompts, file, mesh, compute, stop, finished)
    _answer(work, renderer)  # returns without the policy's parameters, for which there may be no room beside the next
    if judging is not None:
        _score(work, judging)
    if finished:
        if is_speaker():
            file.clear_parts()
        say("done already")
    else:
        finish(prompts, file, ANSWERS if judging is None else SCORES)
    say(_summary(file.read(), file))


def _assets(model: str, *, reward: bool) -> str:
    """The directory of a model's tokenizer and templates; refuses one of the other kind before it is loaded."""
    assets = assets_of(model)
    check_family(LoadedModel(read_config(assets), None, assets), model, reward=reward)
    return str(assets)


def _judging(arguments: Arguments, model: str) -> Judging:
    options = dataclasses.replace(arguments.render, system=None)
    assets = _assets(model, reward=True)
    renderer = load_reward_renderer(assets, options, template=arguments.template)
    scoring = Scoring(
        arguments.critiques,
        arguments.critique_samples,
        arguments.critique,
        arguments.forward,
        arguments.decode,
        arguments.reading,
    )
    reading = key_of(reading_of(read_config(assets), arguments.reading))
    return Judging(model, renderer, scoring.rendered_by(renderer), reading)


def _prompts(arguments: Arguments, folder: str) -> Prompts:
    if arguments.dataset is not None:
        return dataset_prompts(open_dataset(arguments.dataset))
    assert arguments.input is not None  # `check` has seen to it
    prompts = read_prompts(
        arguments.input,
        arguments.media,
        folder,
        frames=arguments.render.frames,
        workers=arguments.decode.workers,
        progress=is_speaker(),
    )
    if prompts.unread:
        say("columns not read: " + ", ".join(f"{name} ({rows} rows)" for name, rows in prompts.unread))
    return prompts


def _settle_rejected(arguments: Arguments, prompts: Prompts, file: AnswerFile) -> None:
    """Lists bad rows; raises CommandError for any, unless they are to be skipped, and where no good one is left."""
    if is_speaker():
        file.list_rejected(prompts.rejected)
    rows = len(prompts.rejected) + len(prompts.groups)
    if not rows:
        raise CommandError(f"{prompts.path} has no prompts")
    if not prompts.rejected:
        return
    said = f"{len(prompts.rejected)} of {rows} prompts cannot be answered"
    lines = [f"  {row.origin}: {row.reason}" for row in prompts.rejected[:SHOWN]]
    if len(prompts.rejected) > SHOWN:
        lines.append(f"  ... and {len(prompts.rejected) - SHOWN} more")
    listed = "\n".join(lines)
    if not prompts.groups or not arguments.skip_bad:
        cure = "mend the cause, or answer the others with --skip-bad" if prompts.groups else "mend the cause"
        raise CommandError(f"{said}; {file.rejected} lists them: {cure}\n{listed}")
    say(f"{said}; {file.rejected} lists them")


def _settings(
    arguments: Arguments, prompts: Prompts, renderer: LlavaOnevisionRenderer, judging: Judging | None
) -> dict[str, Any]:
    """What the answers depend on, but for the models' weights, which are stated once they are loaded."""
    reward = None
    if judging is not None:
        generated = judging.scoring.critiques == "generated"
        reward = {
            "critiques": judging.scoring.critiques,
            "rendering": judging.renderer.fingerprint,
            "critique_samples": judging.scoring.samples,
            "critique": dataclasses.asdict(judging.scoring.sampling) if generated else None,
            **judging.reading,
        }
        if shows_facts(judging.renderer):
            reward["facts"] = prompts.fingerprint(facts=True)
    return {
        "prompts": prompts.fingerprint(),
        "samples": arguments.samples,
        **dataclasses.asdict(arguments.sampling),
        "dtype": arguments.dtype,
        "rendering": renderer.fingerprint,
        "reward": reward,
    }


def _answer(work: Work, renderer: LlavaOnevisionRenderer) -> None:
    arguments = work.arguments
    model = load_model(arguments.model, work.mesh, ShardingRules(), rates=INFERENCE)
    begin(work.file, {"model": model_fingerprint(model.config, model.params)})
    if work.finished:
        return
    model = in_layout(model, arguments.layout, work.mesh)
    policy = Policy(model, renderer, work.mesh, work.compute)
    asked = Sampling(arguments.samples, arguments.sampling, arguments.decode)
    with progress_bar(unit="prompt", shown=is_speaker()) as bar:
        write_answers(work.prompts, policy, asked, work.file, work.saving, Watch(work.stop, bar))


def _score(work: Work, judging: Judging) -> None:
    model = load_model(judging.name, work.mesh, ShardingRules(), rates=INFERENCE)
    begin(work.file, {"reward_model": model_fingerprint(model.config, model.params)})
    if work.finished:
        return
    model = in_layout(model, work.arguments.layout, work.mesh)
    judge = RewardModel(model, judging.renderer, work.mesh, work.compute)
    shown = is_speaker() and judging.scoring.critiques == "generated"  # scoring without has a bar of its own
    with progress_bar(unit="prompt", shown=shown) as bar:
        write_scores(work.prompts, judge, judging.scoring, work.file, work.saving, Watch(work.stop, bar))


def _summary(lines: list[Record], file: AnswerFile) -> str:
    answers = [response for line in lines for response in line["responses"]]
    cut = sum(not response["ended"] for response in answers)
    said = f"{len(answers)} answers to {len(lines)} prompts in {file.path}; --max-new-tokens cut off {cut}"
    if critiques := [ended for response in answers for ended in response.get("critiques_ended", ())]:
        said += f"; --critique.max-new-tokens cut off {critiques.count(False)} of {len(critiques)} critiques"
    return said


if __name__ == "__main__":
    run_command(main)

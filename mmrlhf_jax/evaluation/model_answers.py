"""A model's answers to questions, and a reward model's scores of them, by the engine of launch/generate.py.

They stand in OUTPUT/answers.jsonl as launch/generate.py would write them, with its ways of going on where it stopped:
first all answers, then, with the policy out of memory, all scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from mmrlhf_jax import storage
from mmrlhf_jax.data.sources.rows import Rejected
from mmrlhf_jax.evaluation.answer_arguments import AnswerArguments, files_of
from mmrlhf_jax.evaluation.comparisons import refuse
from mmrlhf_jax.evaluation.questions import Answer, Question
from mmrlhf_jax.groups import Group, Turn
from mmrlhf_jax.inference.answer_file import AnswerFile, Saving
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
from mmrlhf_jax.inference.engine import progress_bar
from mmrlhf_jax.inference.prompts import Prompts, prove_prompts
from mmrlhf_jax.inference.reward import RewardModel, Scoring
from mmrlhf_jax.inference.watch import Watch
from mmrlhf_jax.models.critique_reward.render import AnyRewardRenderer, load_reward_renderer
from mmrlhf_jax.models.families import read_config
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import LlavaOnevisionRenderer, load_renderer
from mmrlhf_jax.nn.sharding import ShardingRules, make_mesh
from mmrlhf_jax.training.model import LoadedModel, assets_of, check_family, load_model, model_fingerprint
from mmrlhf_jax.training.recipe import INFERENCE
from mmrlhf_jax.training.runtime import set_up_jax

ANSWER_FILE = "answers.jsonl"

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Answered:
    """The questions that could be asked, their answers, the rows that could not, and what the answers depend on."""

    questions: tuple[Question, ...]
    answers: list[tuple[Answer, ...]]
    rejected: tuple[Rejected, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class _Work:
    arguments: AnswerArguments
    prompts: Prompts
    file: AnswerFile
    mesh: Mesh
    compute: Compute
    stop: Stop
    finished: bool

    @property
    def saving(self) -> Saving:
        return Saving(self.arguments.save_every)


def answer(arguments: AnswerArguments, questions: Sequence[Question], folder: str, stop: Stop) -> Answered:
    """Has `arguments.model` answer what has no answer yet; pictures that stood in rows lie in `folder`.

    Raises:
        BenchmarkError: a question cannot be asked, and is not to be skipped.
        AnswerFileError: OUTPUT holds answers of other settings, or of another model.
        CommandError: it was asked to stop; what is done is kept.
    """
    assert arguments.model is not None
    set_up_jax(arguments.dtype)
    renderer = load_renderer(_assets(arguments.model, reward=False), arguments.render)
    judging = None if arguments.reward is None else _judging(arguments, arguments.reward)
    prompts = _prompts(arguments, questions, folder).without(room_to_answer(renderer, arguments.sampling))
    if judging is not None:
        prompts = prompts.without(room_to_score(judging[0], arguments.sampling, judging[1]))
    if not arguments.skip_bad or not prompts.groups:
        refuse(prompts.rejected, "mend the cause, or measure the others with --skip-bad")
    file = AnswerFile(storage.to_path(arguments.output) / ANSWER_FILE, prompts.unit)
    settings = _settings(arguments, prompts, renderer, judging)
    begin(file, settings)
    mesh = make_mesh(arguments.mesh)
    compute = Compute(
        dtype=arguments.dtype,
        platform=mesh.devices.flat[0].platform,
        attention=arguments.attention,
        vocab_shards=mesh.shape["tensor"],
    )
    work = _Work(arguments, prompts, file, mesh, compute, stop, file.finished())
    settings["model_fingerprint"] = _write_answers(work, renderer)  # and leaves no room taken for the next model
    if judging is not None:
        settings["reward_fingerprint"] = _write_scores(work, *judging)
    if work.finished:
        file.clear_parts()
    else:
        finish(prompts, file, ANSWERS if judging is None else SCORES)
    answers = [
        tuple(Answer(each["text"], each["ended"], each.get("score")) for each in line["responses"])
        for line in file.read()
    ]
    return Answered(tuple(questions[place] for place in prompts.places), answers, prompts.rejected, settings)


def _assets(model: str, *, reward: bool) -> str:
    """The directory of a model's tokenizer and templates; refuses one of the other kind before it is loaded."""
    assets = assets_of(model)
    check_family(LoadedModel(read_config(assets), None, assets), model, reward=reward)
    return str(assets)


def _judging(arguments: AnswerArguments, reward: str) -> tuple[AnyRewardRenderer, Scoring]:
    options = dataclasses.replace(arguments.render, system=None)  # a reward model brings its own
    renderer = load_reward_renderer(_assets(reward, reward=True), options, template="")
    scoring = Scoring(arguments.critiques, sampling=arguments.critique, decode=arguments.decode)
    return renderer, scoring.rendered_by(renderer)


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


def _settings(
    arguments: AnswerArguments,
    prompts: Prompts,
    renderer: LlavaOnevisionRenderer,
    judging: tuple[AnyRewardRenderer, Scoring] | None,
) -> dict[str, Any]:
    """What the answers depend on, but for the models' weights, which are stated once they are loaded."""
    reward = None
    if judging is not None:
        generated = judging[1].critiques == "generated"
        reward = {
            "critiques": judging[1].critiques,
            "rendering": judging[0].fingerprint,
            "critique": dataclasses.asdict(judging[1].sampling) if generated else None,
        }
    return {
        "prompts": prompts.fingerprint(),
        "samples": getattr(arguments, "samples", 1),
        **dataclasses.asdict(arguments.sampling),
        "dtype": arguments.dtype,
        "rendering": renderer.fingerprint,
        "reward": reward,
    }


def _write_answers(work: _Work, renderer: LlavaOnevisionRenderer) -> str:
    """Returns the model's fingerprint, which earlier answers must share."""
    arguments = work.arguments
    assert arguments.model is not None
    model = load_model(arguments.model, work.mesh, ShardingRules(), rates=INFERENCE)
    fingerprint = model_fingerprint(model.config, model.params)
    begin(work.file, {"model": fingerprint})
    if not work.finished:
        policy = Policy(model, renderer, work.mesh, work.compute)
        asked = Sampling(getattr(arguments, "samples", 1), arguments.sampling, arguments.decode)
        with progress_bar(unit="prompt") as bar:
            write_answers(work.prompts, policy, asked, work.file, work.saving, Watch(work.stop, bar))
    return fingerprint


def _write_scores(work: _Work, renderer: AnyRewardRenderer, scoring: Scoring) -> str:
    """Returns the reward model's fingerprint, which earlier scores must share."""
    assert work.arguments.reward is not None
    model = load_model(work.arguments.reward, work.mesh, ShardingRules(), rates=INFERENCE)
    fingerprint = model_fingerprint(model.config, model.params)
    begin(work.file, {"reward_model": fingerprint})
    if not work.finished:
        judge = RewardModel(model, renderer, work.mesh, work.compute)
        shown = scoring.critiques == "generated"  # scoring without has a bar of its own
        with progress_bar(unit="prompt", shown=shown) as bar:
            write_scores(work.prompts, judge, scoring, work.file, work.saving, Watch(work.stop, bar))
    return fingerprint

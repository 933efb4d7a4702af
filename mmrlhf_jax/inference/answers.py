"""From prompts to a file of answers: a policy samples them, and a reward model may score and rank them.

The two stages follow each other, so that one model is in memory at a time, and each goes on where it was stopped. A
line of the file:

    id, line         of the prompt; of a dataset's prompt `row` stands for line
    prompt           the user's text, or, of a conversation, its messages {role, content}; without media
    responses        one a sample, in order: text; tokens, how many without the one that ends it; ended, false where
                     max_new_tokens cut it off. Scored: also score, and where critiques were generated those and the
                     scores behind each, whose mean score is
    best             scored: the index of the response with the highest score, the first of equals

Random numbers hang on the seed, the prompt's content and the sample's number: the same prompt is given the same answers
wherever it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from mmrlhf_jax.data.rewards import GroupReward
from mmrlhf_jax.groups import Group, Renderer, Response
from mmrlhf_jax.inference.answer_file import AnswerFile, Record, Saving
from mmrlhf_jax.inference.engine import DecodeConfig
from mmrlhf_jax.inference.generate import Answer, generate
from mmrlhf_jax.inference.prompts import Prompts
from mmrlhf_jax.inference.reward import RewardModel, Scoring, rewards_of
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.inference.watch import Watch
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import LlavaOnevisionRenderer, where
from mmrlhf_jax.training.distributed import agree_on_view, check_agreement, is_speaker, wait_for_all
from mmrlhf_jax.training.model import LoadedModel
from mmrlhf_jax.training.peers import STORING, meanwhile

ANSWERS, SCORES = "answers", "scores"  # the two kinds of parts


@dataclass(frozen=True)
class Policy:
    """A model ready to answer."""

    model: LoadedModel
    renderer: LlavaOnevisionRenderer
    mesh: Mesh
    compute: Compute


@dataclass(frozen=True)
class Sampling:
    """What is asked of a policy, and how it runs."""

    samples: int = 1
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)


def begin(file: AnswerFile, settings: dict[str, Any]) -> None:
    """States more of what the answers depend on, the same on every process. Raises AnswerFileError, see `check`."""
    check_agreement("set of prompts and settings", repr(sorted(settings.items())))
    file.check(settings)
    if is_speaker():
        file.state(settings)
    wait_for_all("the settings are written")


def write_answers(
    prompts: Prompts, policy: Policy, asked: Sampling, file: AnswerFile, saving: Saving, watch: Watch
) -> int:
    """Answers every prompt that has no answers yet; returns how many had none. Raises CommandError when stopped."""
    todo = _todo(prompts, file, ANSWERS)
    watch.check()
    said = generate(
        prompts.groups,
        policy.renderer,
        policy.model,
        policy.mesh,
        policy.compute,
        asked.sampling,
        asked.decode,
        samples=asked.samples,
        load=prompts.with_media,
        progress=watch.look,
        chosen=todo,
    )
    with file.saving(ANSWERS, saving) as keep:
        for index, answers in said if todo else ():
            if is_speaker():  # every process is given the same
                with meanwhile(STORING):
                    keep([_record(prompts, index, answers)])
    wait_for_all("the answers are stored")
    return len(todo)


def write_scores(
    prompts: Prompts, judge: RewardModel, scoring: Scoring, file: AnswerFile, saving: Saving, watch: Watch
) -> int:
    """Scores the answers of every prompt that has no scores yet; returns how many had none.

    The answers to a prompt are one group, equal texts one response of it. Raises CommandError when stopped, and
    ValueError where an answer does not fit the model.
    """
    scoring = scoring.of(judge)
    answers, todo = file.done(ANSWERS), _todo(prompts, file, SCORES)
    watch.check()
    answered = _Answered(prompts, tuple(_distinct(answers[place]) for place in prompts.places))
    found = rewards_of(answered, answered.groups(), todo, judge, scoring, watch.look)
    with file.saving(SCORES, saving) as keep:
        for rewards in found if todo else ():
            lines = [
                scored(answers[prompts.places[index]], reward, scoring.critiques == "generated")
                for index, reward in rewards.items()
            ]
            if is_speaker():  # every process is given the same
                with meanwhile(STORING):
                    keep(lines)
            if scoring.critiques != "generated":  # decoding looks by itself
                watch.check()
    wait_for_all("the scores are stored")
    return len(todo)


def finish(prompts: Prompts, file: AnswerFile, kind: str) -> None:
    """Makes the file of its parts. Raises ValueError where a prompt has none."""
    if missing := _todo(prompts, file, kind):
        raise ValueError(f"{file.parts}: {len(missing)} prompts have no {kind}: run the same command again")
    wait_for_all("every process has seen that nothing is missing")
    if is_speaker():
        file.finish(kind)
    wait_for_all("the file is there")


def scored(record: Record, reward: GroupReward, critiques: bool) -> Record:
    """A line with the scores of its responses; `reward` is that of its distinct texts, in order."""
    place = {text: k for k, text in enumerate(_distinct(record))}
    responses = []
    for response in record["responses"]:
        k = place[response["text"]]
        more: Record = {"score": reward.score[k]}
        if critiques:
            more |= {
                "scores": reward.scores[k].tolist(),
                "critiques": list(reward.critiques[k]),
                "critiques_ended": reward.ended[k].tolist(),
            }
        responses.append(response | more)
    best = max(range(len(responses)), key=lambda index: responses[index]["score"])  # the first of equals
    return record | {"responses": responses, "best": best}


def room_to_answer(renderer: Renderer, sampling: SamplingConfig) -> Callable[[Group], str | None]:
    """Says why a prompt cannot be answered, if so: it cannot be rendered, or leaves no room for `max_new_tokens`."""
    return _room(renderer, sampling.max_new_tokens, (), f"--max-new-tokens {sampling.max_new_tokens}", "model")


def room_to_score(renderer: Renderer, sampling: SamplingConfig, scoring: Scoring) -> Callable[[Group], str | None]:
    """Says why the longest answers to a prompt could not be scored, if so."""
    critique = scoring.sampling.max_new_tokens if scoring.critiques == "generated" else 0
    named = f"--max-new-tokens {sampling.max_new_tokens}"
    named += f" and --critique.max-new-tokens {critique}" if critique else ""
    return _room(renderer, sampling.max_new_tokens + critique, (Response(""),), named, "reward model")


def _room(
    renderer: Renderer, new: int, responses: tuple[Response, ...], named: str, model: str
) -> Callable[[Group], str | None]:
    def fault(group: Group) -> str | None:
        try:
            measured = renderer.measure(dataclasses.replace(group, responses=responses))
        except ValueError as error:
            return f"cannot be rendered: {str(error).removeprefix(f'{where(group)}: ')}"
        tokens = measured.prompt + sum(measured.responses)
        if tokens + new <= renderer.max_positions:
            return None
        return f"{tokens} prompt tokens and {named} exceed the {model}'s {renderer.max_positions} positions: lower them"

    return fault


def _todo(prompts: Prompts, file: AnswerFile, kind: str) -> list[int]:
    """Indices of the prompts of which nothing of `kind` is stored, the same on every process."""
    done = file.done(kind)
    agree_on_view(file.parts, sorted(done))
    return [index for index, place in enumerate(prompts.places) if place not in done]


def _record(prompts: Prompts, index: int, answers: Sequence[Answer]) -> Record:
    group = prompts.groups[index]
    alone = len(group.prompt) == 1
    return {
        "id": group.id,
        prompts.unit: prompts.places[index],
        "prompt": group.prompt[0].text if alone else [{"role": t.role, "content": t.text} for t in group.prompt],
        "responses": [{"text": a.text, "tokens": len(a.token), "ended": a.ended} for a in answers],
    }


def _distinct(record: Record) -> tuple[str, ...]:
    return tuple(dict.fromkeys(response["text"] for response in record["responses"]))


@dataclass(frozen=True)
class _Answered:
    """Prompts with their distinct answers as a `GroupSource`."""

    prompts: Prompts
    texts: tuple[tuple[str, ...], ...]

    @property
    def path(self) -> str:
        return self.prompts.path

    def groups(self) -> list[Group]:
        return [self._with_answers(group, index) for index, group in enumerate(self.prompts.groups)]

    def with_media(self, index: int) -> Group:
        return self._with_answers(self.prompts.with_media(index), index)

    def _with_answers(self, group: Group, index: int) -> Group:
        return dataclasses.replace(group, responses=tuple(Response(text) for text in self.texts[index]))

"""Scoring responses with a reward model: with critiques it writes itself, with human ones, or without.

generated   the model criticises every answer, n times if asked; each score is read from the decoding cache where the
            critique is closed, without encoding anything again
human       teacher-forced: one forward a group reads the scores at the ends of the annotators' critiques
none        one forward a group, scores read where critiques would begin; of a scalar model, at the ends of the answers

Pictures keep their any-res tiles and videos their frames in all of them, once a group.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from mmrlhf_jax.batch import GroupBatch
from mmrlhf_jax.command import progress_line
from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.media import decode as decode_picture
from mmrlhf_jax.data.pipeline import GroupSource
from mmrlhf_jax.data.rewards import Critiques, GroupReward, content_of
from mmrlhf_jax.groups import Group, Rendered
from mmrlhf_jax.inference.engine import DecodeConfig, Report, Request, Samples, decode
from mmrlhf_jax.inference.forward import FLUSH_SECONDS, Forward, ForwardConfig, GroupList, forward_everywhere
from mmrlhf_jax.inference.generate import stop_tokens
from mmrlhf_jax.inference.reading import HeadReading, ReadingConfig, reading_of
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.inference.watch import Watch
from mmrlhf_jax.models.critique_reward.model import CritiqueReward, read_score, scores
from mmrlhf_jax.models.critique_reward.render import (
    AnyRewardRenderer,
    RewardRenderer,
    check_facts,
    shows_facts,
    without_critiques,
)
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.training.distributed import agree_on_view, is_speaker, wait_for_all
from mmrlhf_jax.training.model import LoadedModel
from mmrlhf_jax.training.peers import STORING, meanwhile

Rewards = Iterator[dict[int, GroupReward]]


@dataclass(frozen=True)
class RewardModel:
    """A reward model ready to score: parameters, renderer, and where and how it runs."""

    model: LoadedModel
    renderer: AnyRewardRenderer
    mesh: Mesh
    compute: Compute


@dataclass(frozen=True)
class Scoring:
    """What is asked of a reward model, and how it runs. `critiques` None: generated ones of a model that criticises,
    none of a scalar one."""

    critiques: Critiques | None = None
    samples: int = 1
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    forward: ForwardConfig = dataclasses.field(default_factory=ForwardConfig)
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
    reading: ReadingConfig = dataclasses.field(default_factory=ReadingConfig)

    def of(self, judge: RewardModel) -> Scoring:
        """With `critiques` settled. Raises ValueError for what the model cannot do, or what would do nothing."""
        self.head_reading(judge)
        return self.rendered_by(judge.renderer)

    def head_reading(self, judge: RewardModel) -> HeadReading | None:
        """How the model's head is read; None for one that has a score. Raises ValueError as `reading_of` does."""
        return reading_of(judge.model.config, self.reading)

    def rendered_by(self, renderer: AnyRewardRenderer) -> Scoring:
        """`of` a model that is yet to be loaded."""
        criticises = isinstance(renderer, RewardRenderer)
        critiques = self.critiques or ("generated" if criticises else "none")
        if critiques != "none" and not criticises:
            raise ValueError(f"{renderer.name}: a scalar reward model reads no critiques: use --critiques none")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; it must be at least 1")
        if critiques != "generated" and (self.samples > 1 or self.sampling != SamplingConfig()):
            raise ValueError(f"with --critiques {critiques} nothing is sampled: leave out --samples and how to sample")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(f"{self.samples} greedy critiques are the same: set --temperature above 0")
        return dataclasses.replace(self, critiques=critiques)


def score_groups(
    groups: Sequence[Group], judge: RewardModel, scoring: Scoring, progress: Report | None = None
) -> list[GroupReward]:
    """The reward of every response of every group, in order. Groups come with the bytes of their pictures.

    Raises ValueError where a group does not fit the model, has no human critique that was asked for, or a score is not
    finite.
    """
    found: dict[int, GroupReward] = {}
    for rewards in rewards_of(GroupList(tuple(groups)), groups, range(len(groups)), judge, scoring, progress):
        found |= rewards
    return [found[row] for row in range(len(groups))]


def score_attributes(groups: Sequence[Group], judge: RewardModel, scoring: Scoring) -> list[np.ndarray]:
    """f32 [K, A] of every group, in order: each response in each of `judge.model.config.attributes`, under the measure
    of risk of `scoring.reading`. Groups come with the bytes of their pictures.

    Raises ValueError where the model has no attributes, a direction is asked for, a group does not fit the model, or a
    value is not finite.
    """
    scoring = scoring.of(judge)
    if (reading := scoring.head_reading(judge)) is None:
        raise ValueError("this reward model has one score and no attributes: train one with reward.attributes")
    if scoring.reading.direction:
        raise ValueError("a direction makes one score of all attributes: leave it out where each is asked for")
    if shows_facts(judge.renderer):
        check_facts(groups)
    source = GroupList(tuple(groups))

    def read(params: CritiqueReward, batch: GroupBatch) -> jax.Array:
        return scores(params, judge.model.config, batch, judge.compute, reading.attributes)

    forward = Forward(source, groups, judge.renderer, judge.model, judge.mesh, scoring.forward, read)
    found: dict[int, np.ndarray] = {}
    for rows in forward_everywhere(forward, range(len(groups))):
        found |= {row: values[: len(groups[row].responses)] for row, values in rows.items()}
    for row, values in found.items():
        _check_finite(values, source.path, row)
    return [found[row] for row in range(len(groups))]


def write_rewards(
    source: GroupSource,
    groups: Sequence[Group],
    rows: Collection[int],
    judge: RewardModel,
    scoring: Scoring,
    store: AnnotationStore,
    watch: Watch,
) -> int:
    """Stores the reward of each of `rows` that has none yet; returns how many it wrote. `groups` are all of `source`.
    Among several processes the speaker writes. Raises CommandError when stopped; what is done is stored then."""
    scoring = scoring.of(judge)
    todo = sorted(set(rows) - store.done())
    agree_on_view(store.directory, todo)
    pending: dict[int, GroupReward] = {}
    written = time.monotonic()
    try:
        for rewards in rewards_of(source, groups, todo, judge, scoring, watch.look) if todo else ():
            pending |= rewards
            if scoring.critiques != "generated":  # decoding looks by itself
                watch.check()
            if len(pending) >= scoring.forward.rows_per_part or time.monotonic() - written > FLUSH_SECONDS:
                _flush(store, groups, pending)
                written = time.monotonic()
    finally:
        _flush(store, groups, pending)
    wait_for_all("the rewards are stored")
    return len(todo)


def _flush(store: AnnotationStore, groups: Sequence[Group], pending: dict[int, GroupReward]) -> None:
    if pending and is_speaker():
        rows = sorted(pending)
        arrays = [pending[row].arrays() for row in rows]
        hashes = [content_of(groups[row], store.key["critiques"], bool(store.key.get("facts"))) for row in rows]
        with meanwhile(STORING):
            store.write(rows, hashes, {name: [each[name] for each in arrays] for name in arrays[0]})
    pending.clear()


def rewards_of(
    source: GroupSource,
    groups: Sequence[Group],
    rows: Collection[int],
    judge: RewardModel,
    scoring: Scoring,
    progress: Report | None = None,
) -> Rewards:
    """Rewards by row, some at a time, the same on every process; `groups` are all of `source`, whose pictures are read
    when their turn comes."""
    scoring = scoring.of(judge)
    if shows_facts(judge.renderer):
        check_facts(groups)
    if scoring.critiques == "generated":
        return _generated(source, groups, rows, judge, scoring, progress)
    if scoring.critiques == "none":
        source, groups = _Bare(source), [without_critiques(group) for group in groups]
    else:
        _check_reasons([groups[row] for row in rows])
    return _teacher_forced(source, groups, rows, judge, scoring)


@dataclass(frozen=True)
class _Bare:
    """A source whose responses come without critiques."""

    source: GroupSource

    @property
    def path(self) -> str:
        return self.source.path

    def with_media(self, row: int) -> Group:
        return without_critiques(self.source.with_media(row))


def _check_reasons(groups: Sequence[Group]) -> None:
    bare = [group for group in groups if any(response.reason is None for response in group.responses)]
    if bare:
        where = ", ".join(str(group.origins[0]) if group.origins else group.id for group in bare[:3])
        raise ValueError(
            f"{len(bare)} of {len(groups)} groups have a response without a human critique ({where}"
            f"{', ...' if len(bare) > 3 else ''}): use --critiques generated"
        )


def _teacher_forced(
    source: GroupSource, groups: Sequence[Group], rows: Collection[int], judge: RewardModel, scoring: Scoring
) -> Rewards:
    reader = scoring.head_reading(judge) or read_score

    def read(params: CritiqueReward, batch: GroupBatch) -> jax.Array:
        return scores(params, judge.model.config, batch, judge.compute, reader)

    forward = Forward(source, groups, judge.renderer, judge.model, judge.mesh, scoring.forward, read)
    with progress_line(total=len(rows), unit="group", disable=not is_speaker()) as bar:
        for found in forward_everywhere(forward, rows):
            bar.update(len(found))
            yield {row: _read_at_ends(groups[row], score, source.path, row) for row, score in found.items()}


def _read_at_ends(group: Group, score: np.ndarray, path: str, row: int) -> GroupReward:
    """The reward of a group from its row of scores [K], garbage behind its responses."""
    k = len(group.responses)
    scores = score[:k, None]
    _check_finite(scores, path, row)
    return GroupReward(scores, tuple((r.reason or "",) for r in group.responses), np.ones((k, 1), bool))


def _generated(
    source: GroupSource,
    groups: Sequence[Group],
    rows: Collection[int],
    judge: RewardModel,
    scoring: Scoring,
    progress: Report | None,
) -> Rewards:
    renderer = judge.renderer
    assert isinstance(renderer, RewardRenderer)  # scoring.of has seen to it
    bare = [without_critiques(group) for group in groups]
    facts = shows_facts(renderer)
    requests = [
        Request(
            renderer.measure(group), partial(_render, _Bare(source), row, renderer), group.content_hash(facts=facts)
        )
        for row, group in enumerate(bare)
    ]
    _check_room(groups, requests, scoring.sampling.max_new_tokens + len(renderer.closing), renderer.max_positions)
    said = decode(
        requests,
        params=judge.model.params,
        config=judge.model.config,
        mesh=judge.mesh,
        compute=judge.compute,
        sampling=scoring.sampling,
        run=scoring.decode,
        samples=scoring.samples,
        stop=stop_tokens(renderer.policy),
        closing=renderer.closing,
        read=read_score,
        tokens_per_tile=renderer.tokens_per_tile,
        tile_size=renderer.tile_size,
        progress=progress,
        chosen=sorted(rows),
    )
    for row, samples in said:
        reward = _reward_of(samples, partial(_text, renderer))
        _check_finite(reward.scores, source.path, row)
        yield {row: reward}


def _check_room(groups: Sequence[Group], requests: Sequence[Request], new: int, most: int) -> None:
    """Raises ValueError naming the groups whose conversations leave no room for `new` tokens of critique."""
    longest = [request.lengths.prompt + max(request.lengths.responses) for request in requests]
    if long := [group for group, tokens in zip(groups, longest, strict=True) if tokens + new > most]:
        where = ", ".join(str(group.origins[0]) if group.origins else group.id for group in long[:3])
        raise ValueError(
            f"{len(long)} of {len(groups)} groups leave no room for {new} tokens of critique and its closing in the "
            f"model's {most} positions ({where}{', ...' if len(long) > 3 else ''}; up to {max(longest)} tokens): lower "
            "--max-new-tokens, use fewer --render.frames, or prepare without them (--max-tokens)"
        )


def _render(source: GroupSource, row: int, renderer: RewardRenderer) -> Rendered:
    return renderer.render(source.with_media(row), decode_picture)


def _text(renderer: RewardRenderer, token: tuple[int, ...]) -> str:
    return str(renderer.policy.tokenizer.decode(list(token), skip_special_tokens=True))


def _reward_of(samples: Samples, text: Callable[[tuple[int, ...]], str]) -> GroupReward:
    return GroupReward(
        scores=np.array([[sample.score for sample in each] for each in samples], np.float32),
        critiques=tuple(tuple(text(sample.token) for sample in each) for each in samples),
        ended=np.array([[sample.ended for sample in each] for each in samples], bool),
    )


def _check_finite(found: np.ndarray, path: str, row: int) -> None:
    if not np.isfinite(found).all():
        raise ValueError(f"{path} row {row}: the model gives non-finite scores; try --dtype float32")

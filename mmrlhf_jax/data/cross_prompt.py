"""Pairs across prompts: an answer to one question about a picture against an answer to another about the same picture.

A reward model that ranks answers to one prompt alone may still be far off between prompts; "Rethinking Bradley-Terry
Models" (https://arxiv.org/abs/2411.04991; step5_train_rms.py of its authors' repository) compares a response of every
prompt with one of another drawn at random, labelled by their scores, and finds reward models of such pairs better.
There any two prompts may meet, as embeddings. Here they must be about the same pictures: then they are one group, whose
pictures go through the model once, and each response brings its own question (`Response.question`). A pair is the
better's by its score, and none where the scores are closer than the gap or equal; the paper draws labels at random,
the more so the closer the scores are.

Groups are merged whose turns agree in all but the last text, whose media are the same bytes at the same places and
whose facts are the same, whose responses all have scores, and whose own pairs do not contradict these. A question that
stands there twice is not compared with itself. A merged group has at most `MOST` responses; more questions make more
groups.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmrlhf_jax.data import ranking
from mmrlhf_jax.data.pair_choice import is_apart
from mmrlhf_jax.groups import Group, Pair, Turn

MOST = 16  # responses of a merged group: its branches stand in one row of a batch

Place = tuple[int, int]  # which of the groups to merge, which of its responses


class CrossPromptError(ValueError):
    """No pair across prompts can be made."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """Up to `pairs` for each question with answers to others, at least `gap` apart, drawn by `seed`."""

    pairs: int
    gap: float = 0.0
    seed: int = 0


def cross_prompts(groups: Sequence[Group], crossing: Crossing) -> tuple[list[Group], str]:
    """The groups, those about the same pictures merged, each in the place of its first; and a line for the report.

    Raises:
        CrossPromptError: no two questions are about the same pictures, or none of their answers can be compared.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    unfit = 0
    for number, group in enumerate(groups):
        if fits(group):
            alike[_shared(group)].append(number)
        else:
            unfit += bool(group.media)
    merged, absorbed, added = dict[int, Group](), set[int](), 0
    for numbers in alike.values():
        for part in _parts(groups, numbers):
            crossed = merge([groups[number] for number in part], crossing)
            more = len(crossed.pairs) - sum(len(groups[number].pairs) for number in part)
            if more:
                merged[part[0]] = crossed
                absorbed.update(part[1:])
                added += more
    if not merged:
        raise CrossPromptError(
            "--cross-prompt: no two groups ask different questions about the same pictures with answers whose scores "
            "differ enough: leave it out"
        )
    kept = [merged.get(number, group) for number, group in enumerate(groups) if number not in absorbed]
    joined = len(merged) + len(absorbed)
    return kept, (
        f"--cross-prompt {crossing.pairs}: {joined} groups about the same pictures are {len(merged)} now, with {added} "
        f"pairs across questions; {unfit} with pictures could not be, for want of scores that agree with their pairs"
    )


def fits(group: Group) -> bool:
    """Whether the group's answers can be compared with those to another question."""
    if not (group.media and group.prompt and group.prompt[-1].role == "user" and group.one_prompt):
        return False
    scores = [response.score for response in group.responses]
    if any(score is None for score in scores):
        return False
    return all(
        pair.margin is None and scores[pair.chosen] > scores[pair.rejected]  # type: ignore[operator]
        for pair in group.pairs
    )


def merge(groups: Sequence[Group], crossing: Crossing) -> Group:
    """Groups about the same pictures as one, responses best first over all; its pairs are theirs, and those across."""
    places = [(number, k) for number, group in enumerate(groups) for k in range(len(group.responses))]
    asked = [
        dataclasses.replace(groups[number].responses[k], question=groups[number].prompt[-1].text)
        for number, k in places
    ]
    ranked, _ = ranking.by_score(asked)
    now = {(response.question, response.text): k for k, response in enumerate(ranked)}
    place_of = {place: now[response.question, response.text] for place, response in zip(places, asked, strict=True)}
    own = {(place_of[n, pair.chosen], place_of[n, pair.rejected]) for n, g in enumerate(groups) for pair in g.pairs}
    tied = {tuple(sorted((place_of[n, i], place_of[n, j]))) for n, g in enumerate(groups) for i, j in ranking.tied(g)}
    across = {(place_of[better], place_of[worse]) for better, worse in _across(groups, crossing)}
    return Group(
        id=f"{groups[0].id}+{len(groups) - 1}",
        prompt=groups[0].prompt,
        media=groups[0].media,
        responses=tuple(ranked),
        pairs=tuple(Pair(better, worse) for better, worse in sorted(own | across)),
        origins=tuple(origin for group in groups for origin in group.origins),
        facts=groups[0].facts,
        ties=tuple((i, j) for i, j in sorted(tied)),
    )


def _across(groups: Sequence[Group], crossing: Crossing) -> Iterator[tuple[Place, Place]]:
    """(better, worse), of each question's candidates those with the smallest lots."""
    for number in range(len(groups)):
        others = [other for other in range(len(groups)) if other != number]
        candidates = [
            ordered
            for other in others
            for k, j in itertools.product(range(len(groups[number].responses)), range(len(groups[other].responses)))
            if (ordered := _ordered(groups, (number, k), (other, j), crossing.gap)) is not None
        ]
        yield from sorted(candidates, key=lambda pair: _lot(groups, pair, number, crossing.seed))[: crossing.pairs]


def _ordered(groups: Sequence[Group], one: Place, other: Place, gap: float) -> tuple[Place, Place] | None:
    difference = _score(groups, one) - _score(groups, other)
    if not is_apart(abs(difference), gap):
        return None
    return (one, other) if difference > 0 else (other, one)


def _score(groups: Sequence[Group], place: Place) -> float:
    score = groups[place[0]].responses[place[1]].score
    assert score is not None  # see `fits`
    return score


def _lot(groups: Sequence[Group], pair: tuple[Place, Place], number: int, seed: int) -> bytes:
    """Of a pair, as drawn for the question `number`: it hangs on the groups' ids, not on their order."""
    named = [f"{groups[n].id} {k}" for n, k in pair]
    return hashlib.sha256("\n".join([str(seed), groups[number].id, *named]).encode()).digest()


def _shared(group: Group) -> tuple[Any, ...]:
    """Equal for groups that differ in the last text and the answers alone."""
    before: tuple[Turn, ...] = group.prompt[:-1]
    media = tuple((media.kind, media.sha256 or media.path) for media in group.media)
    return before, group.media_before(), media, group.facts


def _parts(groups: Sequence[Group], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Runs of at least two groups with different questions and no more than `MOST` responses in all."""
    first = {groups[number].prompt[-1].text: number for number in reversed(numbers)}
    part, responses = list[int](), 0
    for number in sorted(first.values()):
        count = len(groups[number].responses)
        if part and responses + count > MOST:
            if len(part) > 1:
                yield part
            part, responses = [], 0
        part.append(number)
        responses += count
    if len(part) > 1:
        yield part

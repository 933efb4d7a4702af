"""The sampled answers to each prompt: which of them can be compared, what is known of them, what is learned from them.

Rows are written for launch/prepare.py: candidates and answers to imitate as --source mapped reads them, preferences as
--source mm_rlhf does, which states every pair with its margin, so that a partial order stays one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmrlhf_jax.data.sources.rows import is_readable
from mmrlhf_jax.rounds.prompts import Prompt
from mmrlhf_jax.rounds.ranking import Preference, best
from mmrlhf_jax.rounds.scoring import levels, steered

Row = dict[str, Any]
MAPPING = ("id=id", "prompt=prompt", "image=image", "video=video", "responses=responses")


@dataclass(frozen=True)
class Candidates:
    """The distinct answers to a prompt; `attributes` of each as far as they are known. `score` of each is their
    worth."""

    prompt: Prompt
    texts: tuple[str, ...]
    attributes: tuple[Mapping[str, float], ...]
    scores: tuple[float, ...] = ()

    def row(self) -> Row:
        return {**self.prompt.row(), "responses": list(self.texts)}

    def to_json(self) -> Row:
        answers = [
            {"text": text, "attributes": dict(known), "score": score}
            for text, known, score in zip(self.texts, self.attributes, self.scores, strict=True)
        ]
        return {**self.prompt.row(), "answers": answers}


@dataclass(frozen=True)
class Counted:
    """What became of a round's prompts and answers."""

    prompts: int = 0
    answers: int = 0
    cut: int = 0
    """answers cut off at --max-new-tokens: as far as they go they are no answers"""
    blank: int = 0
    unreadable: int = 0
    """answers with a NUL character or a lone surrogate, which no source reads: a policy may say any token"""
    repeated: int = 0
    """answers that say what another one to the same prompt does"""
    alone: int = 0
    """prompts with fewer than two answers left"""
    tied: int = 0
    """prompts whose answers all have one score"""
    near: int = 0
    """prompts that tell answers apart, but none by --min-gap"""
    used: int = 0
    """prompts that are trained on"""
    pairs: int = 0

    def __add__(self, other: Counted) -> Counted:
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counted(*(a + b for a, b in both))


@dataclass
class Tally:
    """A `Counted` that grows."""

    counted: Counted = field(default_factory=Counted)

    def add(self, **counts: int) -> None:
        self.counted += Counted(**counts)


def candidates_of(prompts: Mapping[str, Prompt], answers: Sequence[Row], tally: Tally) -> list[Candidates]:
    """The distinct answers that can be compared, of the lines of launch/generate.py; a prompt without any is left
    out."""
    found = []
    for line in answers:
        said = line["responses"]
        whole = [answer["text"] for answer in said if answer["ended"]]
        readable = [text for text in whole if is_readable(text)]
        texts = [text for text in readable if text.strip()]
        distinct = tuple(dict.fromkeys(texts))
        tally.add(
            prompts=1,
            answers=len(said),
            cut=len(said) - len(whole),
            unreadable=len(whole) - len(readable),
            blank=len(readable) - len(texts),
            repeated=len(texts) - len(distinct),
        )
        if distinct:
            found.append(Candidates(prompts[line["id"]], distinct, tuple({} for _ in distinct)))
    return found


Ranker = Callable[[Sequence[float], float], tuple[Preference, ...]]


def preference_rows(candidates: Sequence[Candidates], rank: Ranker, min_gap: float, tally: Tally) -> Iterator[Row]:
    """A row for each pair that `rank` names, as MM-RLHF's dpo_pairs.jsonl has them, with the gap as its `margin`."""
    for each in candidates:
        preferences = rank(each.scores, min_gap)
        if not preferences:
            alone, tied = len(each.texts) < 2, len(set(each.scores)) < 2
            tally.add(alone=alone, tied=tied and not alone, near=not tied)
            continue
        tally.add(used=1, pairs=len(preferences))
        for preference in preferences:
            yield {
                **each.prompt.row(),
                "chosen": each.texts[preference.chosen],
                "rejected": each.texts[preference.rejected],
                "margin": preference.gap,
            }


def best_rows(candidates: Sequence[Candidates], tally: Tally) -> Iterator[Row]:
    """Each prompt with its best answer alone: rejection sampling."""
    for each in candidates:
        tally.add(used=1)
        yield {**each.prompt.row(), "responses": [each.texts[best(each.scores)]]}


def steer_rows(candidates: Sequence[Candidates], names: Sequence[str], tally: Tally) -> Iterator[Row]:
    """Every answer, under a prompt that says its own level of each attribute: SteerLM. Levels are among all answers."""
    of_name = {name: levels([known[name] for each in candidates for known in each.attributes]) for name in names}
    number = 0
    for each in candidates:
        tally.add(used=1)
        for k, text in enumerate(each.texts):
            said = {name: found[number] for name, found in of_name.items()}
            prompt = dataclasses.replace(each.prompt, id=f"{each.prompt.id}#{k}")
            yield {**dataclasses.replace(prompt, question=steered(prompt.question, said)).row(), "responses": [text]}
            number += 1


def read_scored(lines: Sequence[Row]) -> list[Candidates]:
    """Inverse of `Candidates.to_json`, line by line."""
    return [
        Candidates(
            Prompt(line["id"], line["prompt"], line["image"], line["video"]),
            tuple(answer["text"] for answer in line["answers"]),
            tuple(answer["attributes"] for answer in line["answers"]),
            tuple(answer["score"] for answer in line["answers"]),
        )
        for line in lines
    ]

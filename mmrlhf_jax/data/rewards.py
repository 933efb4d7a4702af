"""Scores and critiques of a dataset's responses, stored beside it by launch/annotate.py --with reward.

Of every group: `score` f32 [K, n], n samples of each of K responses; `ended` bool [K, n], whether the model closed the
critique itself; `critique` u8, the critiques' utf-8 bytes end to end, and `critique_length` i64 [K * n] of each. A
store's rewards.jsonl holds the same for people.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmrlhf_jax import storage
from mmrlhf_jax.data.annotations import AnnotationError, AnnotationStore, Rows, find
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.datasets import Dataset
from mmrlhf_jax.groups import Group

REWARD = "reward"  # the kind of annotation
READABLE = "rewards.jsonl"
MADE_BY = "made_by.json"

Critiques = Literal["generated", "human", "none"]


@dataclass(frozen=True, eq=False)
class GroupReward:
    """What a reward model says of a group's K responses, n times each: `scores` f32 [K, n], `critiques` K tuples of n
    texts (n empty ones where it wrote none), `ended` bool [K, n]."""

    scores: np.ndarray
    critiques: tuple[tuple[str, ...], ...]
    ended: np.ndarray

    @property
    def score(self) -> tuple[float, ...]:
        """Of each response: the mean over its samples."""
        return tuple(float(row.mean()) for row in self.scores)

    def arrays(self) -> dict[str, np.ndarray]:
        """As a store holds it."""
        encoded = [text.encode() for each in self.critiques for text in each]
        return {
            "score": np.asarray(self.scores, np.float32),
            "ended": np.asarray(self.ended, bool),
            "critique": np.frombuffer(b"".join(encoded), np.uint8),
            "critique_length": np.array([len(text) for text in encoded], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> GroupReward:
        """Inverse of `arrays`. Raises ValueError, KeyError: they are not those of a reward."""
        scores, lengths, ended = arrays["score"], arrays["critique_length"], arrays["ended"]
        if scores.ndim != 2 or scores.dtype.kind != "f" or ended.shape != scores.shape or not scores.size:
            raise ValueError("score is not f32 [K, n], or ended of another shape")
        if len(lengths) != scores.size or lengths.min() < 0 or lengths.sum() != len(arrays["critique"]):
            raise ValueError("critiques and their lengths do not fit")
        ends = np.cumsum(lengths)
        texts = [part.tobytes().decode() for part in np.split(arrays["critique"], ends[:-1])]
        n = scores.shape[1]
        critiques = tuple(tuple(texts[k * n : (k + 1) * n]) for k in range(len(scores)))
        return cls(scores, critiques, ended)


def content_of(group: Group, critiques: str, facts: bool = False) -> str:
    """The hash of everything a reward depends on besides model and rendering: human critiques, and facts that were
    shown, are part of it."""
    return group.content_hash(reasons=critiques == "human", facts=facts)


def read_rewards(store: AnnotationStore, dataset: Rows) -> dict[int, GroupReward]:
    """All rows of a store. Raises AnnotationError where a group has changed since, or a row is no reward."""
    if not isinstance(critiques := store.key.get("critiques"), str):
        raise AnnotationError(f"{store.directory}/key.json does not say which critiques: it is no store of rewards")
    stored = store.read(dataset, lambda group: content_of(group, critiques, bool(store.key.get("facts"))))
    rewards = {}
    for row, arrays in stored.items():
        try:
            rewards[row] = GroupReward.from_arrays(arrays)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise AnnotationError(
                f"{store.directory}: row {row} is no reward ({error}): delete its part, it is computed again"
            ) from error
    return rewards


def cut_short(rewards: Iterable[GroupReward]) -> tuple[int, int]:
    """How many critiques were cut before the model closed them, and how many there are."""
    ended = [one for reward in rewards for one in reward.ended.ravel().tolist()]
    return ended.count(False), len(ended)


def write_readable(store: AnnotationStore, dataset: PreparedDataset) -> None:
    """The store's rewards.jsonl: a line a group with its id and, of each response in the order of the dataset, text,
    rank (0 is the best), score, the score behind each critique, the critiques, whether each was `ended`, and the
    question where it is the response's own."""
    rewards = read_rewards(store, dataset)
    lines = []
    for row, group in enumerate(dataset.groups()):
        if row not in rewards:
            continue
        reward = rewards[row]
        responses = [
            {
                "text": r.text,
                "rank": r.rank,
                "score": reward.score[k],
                "scores": reward.scores[k].tolist(),
                "critiques": list(reward.critiques[k]),
                "ended": reward.ended[k].tolist(),
                **({} if r.question is None else {"question": r.question}),
            }
            for k, r in enumerate(group.responses)
        ]
        lines.append(json.dumps({"row": row, "id": group.id, "responses": responses}, ensure_ascii=False))
    storage.write_whole(store.directory / READABLE, "".join(f"{line}\n" for line in lines).encode())


def with_scores(group: Group, scores: Iterable[float]) -> Group:
    """The group with these scores for its responses, and pairs whose margins are their differences."""
    responses = tuple(dataclasses.replace(r, score=float(s)) for r, s in zip(group.responses, scores, strict=True))
    pairs = tuple(dataclasses.replace(pair, margin=None) for pair in group.pairs)
    return dataclasses.replace(group, responses=responses, pairs=pairs)


def stored_scores(dataset: Dataset, asked: str, command: str) -> dict[int, tuple[float, ...]]:
    """The score of every response by row, from beside each part of `dataset`.

    `asked` is "reward" for the only store there is, or a store's name. Raises ValueError with the cure: the `command`
    that makes one, the names to choose from, or what is missing.
    """
    found: dict[int, tuple[float, ...]] = {}
    for part, row_of in dataset.parts():
        store = _store_beside(part, asked, command)
        rewards = read_rewards(store, part)
        if missing := sorted(set(row_of.values()) - rewards.keys()):
            raise ValueError(
                f"{part.path}: {len(missing)} groups have no reward yet (row {missing[0]} first). Finish them: "
                f"{made_by(store).get('command', command)}"
            )
        found |= {row: rewards[own].score for row, own in row_of.items()}
    return found


def _store_beside(part: PreparedDataset, asked: str, command: str) -> AnnotationStore:
    stores = [store for store in find(part.path, REWARD) if store.done()]  # a refused annotation leaves an empty one
    chosen = [store for store in stores if asked in (REWARD, store.directory.name)]
    if not chosen:
        there = "; there: " + ", ".join(store.directory.name for store in stores) if stores else ""
        raise ValueError(f"{part.path} has no rewards {asked!r}{there}. Make them: {command}")
    if len(chosen) > 1:
        names = "\n  ".join(f"{s.directory.name}: {len(s.done())} groups, {_described(s)}" for s in chosen)
        raise ValueError(f"{part.path} has rewards made in several ways; choose with --margins one of\n  {names}")
    return chosen[0]


def note_command(store: AnnotationStore, model: str, command: str) -> None:
    """Leaves word beside the key of who made a store, for messages: names, on which nothing depends."""
    if not (store.directory / MADE_BY).exists():
        text = json.dumps({"model": model, "command": command}, indent=2) + "\n"
        storage.write_whole(store.directory / MADE_BY, text.encode())


def made_by(store: AnnotationStore) -> dict[str, str]:
    """What `note_command` left: `model` and `command`; empty where it did not.

    Raises:
        AnnotationError: the file holds something else.
    """
    file = store.directory / MADE_BY
    if not file.exists():
        return {}
    try:
        noted = json.loads(file.read_text())
        if not isinstance(noted, dict) or not all(isinstance(text, str) for text in noted.values()):
            raise ValueError("no object of texts")
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{file} is damaged ({error}): remove it, nothing depends on it") from error
    return noted


def _described(store: AnnotationStore) -> str:
    key, sampling = store.key, store.key.get("sampling") or {}
    drawn = ", ".join(f"{name} {value}" for name, value in sampling.items() if value or name == "temperature")
    said = f"critiques {key.get('critiques')}, {key.get('samples')} samples" + (f" ({drawn})" if drawn else "")
    return f"{said}, {key.get('dtype')}, model {made_by(store).get('model', str(key.get('model'))[:12])}"

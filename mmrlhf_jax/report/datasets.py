"""The prepared datasets a report draws on: those its runs were trained and evaluated on, and those it is given.

A run names its dataset by path and by fingerprint; a path that now holds something else is not taken for it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax import storage
from mmrlhf_jax.data.annotations import AnnotationStore, find
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.datasets import Dataset, open_dataset
from mmrlhf_jax.data.rewards import REWARD, GroupReward, made_by, read_rewards, stored_scores, with_scores
from mmrlhf_jax.groups import Group
from mmrlhf_jax.models.files import JSON_BYTES, read_text
from mmrlhf_jax.report.runs import Run
from mmrlhf_jax.training.data import reward_command, scores_fingerprint
from mmrlhf_jax.training.run import RunDirectory


@dataclass(frozen=True)
class Found:
    """Datasets by fingerprint, and a sentence for each that a run names and that is not here."""

    datasets: Mapping[str, Dataset]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """One way of scoring one dataset: what a reward model says of its groups, by row."""

    dataset: PreparedDataset
    store: AnnotationStore
    rewards: Mapping[int, GroupReward]

    @property
    def name(self) -> str:
        return self.store.directory.name

    @property
    def model(self) -> str:
        """The reward model as its user named it; a fingerprint where nobody noted that."""
        return made_by(self.store).get("model") or f"model {str(self.store.key.get('model'))[:12]}"

    @property
    def manner(self) -> str:
        """How the scores were read."""
        key = self.store.key
        behind = {
            "generated": "Behind its own critiques",
            "human": "Behind the human critiques",
            "none": "Without critiques",
        }[key["critiques"]]
        return f"{behind}, mean over {key['samples']}" if key["samples"] > 1 else behind


def was_trained_on(scored: Judged) -> bool | None:
    """Whether the reward model learned from what it scored; None where its run, or what that was trained on, is not
    here to tell."""
    place = scored.model.split("@")[0]
    if storage.is_remote(place) or not (run := RunDirectory.at(place)).start.exists():
        return None
    try:
        path, fingerprint = (json.loads(read_text(file, JSON_BYTES))["dataset"] for file in (run.recipe, run.start))
    except (ValueError, OSError, LookupError, TypeError, RecursionError):
        return None
    if fingerprint == scored.dataset.fingerprint:
        return True
    learned = _open(str(path), str(fingerprint))
    if isinstance(learned, str):
        return None
    return any(part.fingerprint == scored.dataset.fingerprint for part, _ in learned.parts())


def find_datasets(runs: Sequence[Run], named: Sequence[str]) -> Found:
    """Those `named`, and those of the runs that are still where they were. Raises ValueError for one named that cannot
    be opened."""
    given = [open_dataset(path) for path in named]
    datasets: dict[str, Dataset] = {dataset.fingerprint: dataset for dataset in given}
    missing: dict[str, None] = {}
    for run in runs:
        for role, path, fingerprint in _named_by(run):
            if fingerprint in datasets:
                continue
            opened = _open(path, fingerprint)
            if isinstance(opened, str):
                missing[f"The {role} data of {run.name}, {path}, {opened}: name where it is with --dataset."] = None
            else:
                datasets[fingerprint] = opened
    return Found(datasets, tuple(missing))


def _named_by(run: Run) -> Iterator[tuple[str, str, str]]:
    """(role, path, fingerprint) of each dataset a run was made with."""
    for role, field, start in (("training", "dataset", "dataset"), ("held-out", "evaluation.dataset", "evaluation")):
        if run.recipe.get(field) and run.start.get(start):
            yield role, str(run.recipe[field]), str(run.start[start])


def _open(path: str, fingerprint: str) -> Dataset | str:
    """The dataset with that fingerprint at `path`, or what is there instead."""
    if storage.is_remote(path):
        return "is in a bucket and would be copied whole"
    if not storage.to_path(path).exists():
        return "is not here"
    try:
        dataset = open_dataset(path)
    except ValueError as error:
        return f"cannot be read ({error})"
    return dataset if dataset.fingerprint == fingerprint else "is another one by now"


def margins_of(run: Run, dataset: Dataset) -> np.ndarray:
    """The margin of every pair of `dataset` that has one, f64 [pairs], as the run read them. Raises ValueError with the
    cure where they are no longer there."""
    groups: list[Group] = list(dataset.groups())
    asked = str(run.recipe.get("margins", "data"))
    if asked != "data":
        scores = stored_scores(dataset, asked, reward_command(dataset.path))
        if run.start.get("margins") != scores_fingerprint(scores):
            raise ValueError(f"the rewards beside {dataset.path} are others than those {run.name} was trained on")
        groups = [with_scores(group, scores[row]) for row, group in enumerate(groups)]
    found = [margin for group in groups for pair in group.pairs if (margin := group.margin(pair)) is not None]
    return np.array(found, float)


def judged(found: Found) -> tuple[list[Judged], list[str]]:
    """Every finished or begun scoring beside the datasets, of each part of a mixture once, and what is wrong with those
    that cannot be read or belong to what the data was before."""
    parts = {part.path: part for dataset in found.datasets.values() for part, _ in dataset.parts()}
    scorings, wrong = [], []
    for part in parts.values():
        try:
            stores = [store for store in find(part.path, REWARD) if store.done()]
            scorings += [Judged(part, store, read_rewards(store, part)) for store in stores]
        except ValueError as error:
            wrong.append(f"Scores beside {part.path}: {error}.")
    return scorings, wrong


def annotate_command(datasets: Sequence[Dataset]) -> str:
    """The command that scores the first of `datasets`."""
    path = shlex.quote(datasets[0].path) if datasets else "DATASET"
    return f"python launch/annotate.py --dataset {path} --model REWARD_MODEL --with reward"

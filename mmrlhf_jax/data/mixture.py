"""Several prepared datasets as one: which of their rows an epoch sees, and how often.

    {"seed": 0, "parts": [{"dataset": "vqa", "weight": 1.5, "limit": null, "subset": "short/*"}, ...]}

A JSON file with these keys stands wherever a dataset does; only `parts` and each part's `dataset` must be there.
`dataset` is a path, absolute or from the file's folder. `subset`, a glob, keeps the groups whose id or one of whose
media paths it matches, case and all (in a glob of `fnmatch`, `*` matches `/` too); `limit` keeps the first so many of
these. `weight` is how often a row kept is seen in one epoch of the mixture: all of them `floor(weight)` times, and a
random selection, as large as the fraction says, once more.

The rows are a pure function of the file and of the parts' fingerprints. The selection takes the rows whose sha256 with
seed and fingerprint is smallest, so it depends on neither the other parts nor a library's random numbers, and a larger
weight adds rows to those of a smaller one.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.groups import Group

MAX_WEIGHT = 1000.0


class MixtureError(ValueError):
    """A mixture file that cannot be used as it stands."""


@dataclass(frozen=True, slots=True)
class Part:
    """One entry of `parts`, checked; `dataset` is as the file writes it."""

    dataset: str
    weight: float = 1.0
    limit: int | None = None
    subset: str | None = None


class MixedDataset:
    """The rows of a mixture, part after part, each part's repeated and selected rows in order.

    To its users a `PreparedDataset`; picklable, and as cheap to open in another process.
    """

    def __init__(self, path: str, fingerprint: str, datasets: Sequence[PreparedDataset], places: np.ndarray):
        """`places` i64 [rows, 2]: for each row of the mixture the number of a dataset and a row of that one."""
        self.path = path
        self.fingerprint = fingerprint
        self._datasets, self._places = tuple(datasets), places

    def __len__(self) -> int:
        return len(self._places)

    def group(self, row: int) -> Group:
        """Row `row` without picture bytes."""
        dataset, own = self._place(row)
        return dataset.group(own)

    def groups(self) -> Iterator[Group]:
        """All rows in order, without picture bytes. Each dataset is read once, and held as texts."""
        read: dict[int, list[Group]] = {}
        for number, row in self._places.tolist():
            if number not in read:
                read[number] = list(self._datasets[number].groups())
            yield read[number][row]

    def with_media(self, row: int) -> Group:
        """Row `row` with the encoded bytes of every picture and frame. Raises DatasetError naming the part."""
        dataset, own = self._place(row)
        return dataset.with_media(own)

    def parts(self) -> Iterator[tuple[PreparedDataset, dict[int, int]]]:
        """Each dataset once, and which of its rows stand in the mixture: row of the mixture -> row of the dataset."""
        for number, dataset in enumerate(self._datasets):
            rows = np.flatnonzero(self._places[:, 0] == number)
            yield dataset, dict(zip(rows.tolist(), self._places[rows, 1].tolist(), strict=True))

    def _place(self, row: int) -> tuple[PreparedDataset, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has rows 0..{len(self) - 1}, not {row}")
        number, own = self._places[row].tolist()
        return self._datasets[number], own


def open_mixture(path: str, open_part: Callable[[str], PreparedDataset]) -> MixedDataset:
    """The mixture that the file at `path` describes; `open_part` opens a prepared dataset by its path.

    Raises:
        MixtureError: naming the file, the part and the key.
    """
    seed, parts = read_mixture(path)
    opened: dict[str, PreparedDataset] = {}
    places: list[tuple[int, int]] = []
    stated: list[tuple[str, float, int | None, str | None]] = []
    for part in parts:
        where = _resolved(path, part.dataset)
        if where not in opened:
            opened[where] = _open(path, part, where, open_part)
        dataset = opened[where]
        number = list(opened).index(where)
        places += [(number, row) for row in _rows(path, seed, part, dataset)]
        stated.append((dataset.fingerprint, part.weight, part.limit, part.subset))
    datasets = list(opened.values())
    _refuse_copies(path, datasets)
    # The version is raised whenever the same file would give other rows.
    whole = json.dumps({"version": 1, "seed": seed, "parts": stated})
    return MixedDataset(path, hashlib.sha256(whole.encode()).hexdigest(), datasets, np.array(places, np.int64))


def read_mixture(path: str) -> tuple[int, tuple[Part, ...]]:
    """Seed and parts of a mixture file.

    Raises:
        MixtureError: the file holds anything but a mixture.
    """
    try:
        raw = json.loads(epath.Path(path).read_text(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise MixtureError(
            f"{path} is not a mixture file: {error} (rows become a dataset by launch/prepare.py)"
        ) from error
    _check_keys(path, raw, needed=("parts",), known=("seed", "parts"))
    seed = raw.get("seed", 0)
    if not _is_whole(seed) or seed < 0:
        raise MixtureError(f"{path}: seed {seed!r} is not a whole number from 0 on")
    if not isinstance(raw["parts"], list) or not raw["parts"]:
        raise MixtureError(f"{path}: parts is not a list of at least one part")
    parts = tuple(_part(f"{path}: part {i}", entry) for i, entry in enumerate(raw["parts"], 1))
    named = [(_resolved(path, part.dataset), part.subset) for part in parts]
    for place, part in enumerate(parts):
        # Two subsets of a dataset may overlap, and their weights add up; the same rows named twice are a slip.
        if named[place] in named[:place]:
            subset = "" if part.subset is None else f" with subset {part.subset!r}"
            raise MixtureError(
                f"{path}: part {part.dataset!r}{subset} stands there twice: keep one, add up the weights"
            )
    return seed, parts


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose last of two equal keys would otherwise win unseen."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
    return found


def _check_keys(where: str, raw: Any, *, needed: Sequence[str], known: Sequence[str]) -> None:
    if not isinstance(raw, Mapping):
        raise MixtureError(f"{where} is not an object with the keys {', '.join(known)}")
    if unknown := [key for key in raw if key not in known]:
        raise MixtureError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(known)}")
    if missing := [key for key in needed if key not in raw]:
        raise MixtureError(f"{where} lacks the key {missing[0]!r}")


def _part(where: str, raw: Any) -> Part:
    _check_keys(where, raw, needed=("dataset",), known=("dataset", "weight", "limit", "subset"))
    part = Part(**raw)
    if not isinstance(part.dataset, str) or not part.dataset or not _is_name(part.dataset):
        raise MixtureError(f"{where}: dataset {part.dataset!r} is not a path")
    where = f"{where} ({part.dataset})"
    number = isinstance(part.weight, int | float) and not isinstance(part.weight, bool)
    if not number or not 0 < part.weight <= MAX_WEIGHT:
        raise MixtureError(f"{where}: weight {part.weight!r} is not a number over 0, of at most {MAX_WEIGHT:g}")
    if part.limit is not None and (not _is_whole(part.limit) or part.limit < 1):
        raise MixtureError(f"{where}: limit {part.limit!r} is neither null nor a whole number from 1 on")
    if part.subset is not None and (not isinstance(part.subset, str) or not part.subset):
        raise MixtureError(f"{where}: subset {part.subset!r} is neither null nor a glob")
    return Part(part.dataset, float(part.weight), part.limit, part.subset)


def _is_name(text: str) -> bool:
    """Whether a file can have it: no NUL, no lone surrogate."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _resolved(path: str, dataset: str) -> str:
    if "://" in dataset:
        return dataset
    joined = os.fspath(epath.Path(path).parent / dataset)  # of an absolute path nothing stands in front
    return joined if "://" in joined else os.path.realpath(joined)


def _open(path: str, part: Part, where: str, open_part: Callable[[str], PreparedDataset]) -> PreparedDataset:
    try:
        is_file = storage.to_path(where).is_file()
    except ValueError as error:
        raise MixtureError(f"{path}: part {part.dataset!r}: {error}") from error
    if is_file:
        raise MixtureError(f"{path}: part {part.dataset!r} is a file; a part is a dataset made by launch/prepare.py")
    try:
        return open_part(where)
    except ValueError as error:
        raise MixtureError(f"{path}: part {part.dataset!r}: {error}") from error


def _refuse_copies(path: str, datasets: Sequence[PreparedDataset]) -> None:
    """A dataset under two names would have its annotations in one of them only, and be drawn from twice alike."""
    first: dict[str, str] = {}
    for dataset in datasets:
        if (other := first.setdefault(dataset.fingerprint, dataset.path)) != dataset.path:
            raise MixtureError(f"{path}: {other} and {dataset.path} are copies of one dataset: name only one of them")


def _rows(path: str, seed: int, part: Part, dataset: PreparedDataset) -> list[int]:
    """Rows of `dataset` the part contributes: whole repeats first, then the selection in order."""
    if part.subset is None:
        kept = list(range(len(dataset)))
    else:
        kept = [row for row, group in enumerate(dataset.groups()) if _matches(group, part.subset)]
    if not kept:
        raise MixtureError(
            f"{path}: part {part.dataset!r}: subset {part.subset!r} matches neither an id nor a media path of its "
            f"{len(dataset)} groups (the first id is {dataset.group(0).id!r})"
        )
    kept = kept[: part.limit]
    whole = math.floor(part.weight)
    more = round((part.weight - whole) * len(kept))
    if not whole and not more:
        raise MixtureError(
            f"{path}: part {part.dataset!r}: weight {part.weight:g} of {len(kept)} rows leaves none; raise the weight "
            "or leave the part out"
        )

    def lot(row: int) -> bytes:
        return hashlib.sha256(f"{seed} {dataset.fingerprint} {row}".encode()).digest()

    return kept * whole + sorted(heapq.nsmallest(more, kept, key=lot))


def _matches(group: Group, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (group.id, *(media.path for media in group.media)))

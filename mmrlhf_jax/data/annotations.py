"""Arrays computed per row and kept beside the dataset: reference log-probs, rewards, critiques.

    DATASET/annotations/<kind>-<16 hex of the key's sha256>/
        key.json                    everything the values depend on
        part-<first row>-<n>.npz    n rows, each with the content hash of its group
        lease.json                  which job writes, while one does

A part appears under its name only when whole, so a killed run loses at most the part it was writing. Rows are
written once: a second value for a row is an error, never a choice.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.groups import Group

_KIND = re.compile(r"[a-z][a-z0-9_]*")
_PART = re.compile(r"part-(\d+)-(\d+)\.npz")


class Rows(Protocol):
    """What annotations belong to: a prepared dataset, or groups at hand."""

    @property
    def path(self) -> str: ...

    def __len__(self) -> int: ...

    def groups(self) -> Iterator[Group]: ...


class AnnotationError(ValueError):
    """Stored arrays that cannot be trusted for the rows asked."""


@dataclass(frozen=True, slots=True, eq=False)
class AnnotationStore:
    """One kind of annotation made in one way. The processes of a job may write different rows at a time."""

    directory: epath.Path
    key: Mapping[str, Any]
    _rows_of: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)  # part name -> rows, read once

    @classmethod
    def open(cls, dataset_path: str | os.PathLike[str], kind: str, key: Mapping[str, Any]) -> AnnotationStore:
        """The store of `kind` (a word such as `reference`) made with `key` (JSON values), created if new.

        Raises:
            AnnotationError: `key` is not JSON, or the stored key differs.
        """
        if not _KIND.fullmatch(kind):
            raise AnnotationError(f"kind {kind!r} is not a lower-case word")
        try:
            text = json.dumps(dict(key), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AnnotationError(f"the key of {kind!r} is not JSON: {error}") from error
        name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        directory = storage.to_path(dataset_path) / "annotations" / name
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "key.json").exists():
            storage.write_whole(directory / "key.json", text.encode())
        stored = _read_key(directory)
        if stored != json.loads(text):
            raise AnnotationError(f"{directory}/key.json holds another key ({stored}): remove the directory")
        return cls(directory, stored)

    @property
    def lease(self) -> epath.Path:
        """Held by the job that writes (mmrlhf_jax/lease.py)."""
        return self.directory / "lease.json"

    def done(self) -> set[int]:
        """Rows that are stored.

        Raises:
            AnnotationError: a part is damaged.
        """
        paths = self._part_paths()
        for path in paths:
            if path.name not in self._rows_of:
                self._rows_of[path.name] = tuple(_read_part(path)["rows"].tolist())
        return {row for path in paths for row in self._rows_of[path.name]}

    def write(self, rows: Sequence[int], hashes: Sequence[str], arrays: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Store one part: for each of `rows` the group's `content_hash()` and one array [n, ...] a name.

        Raises:
            AnnotationError: counts differ, arrays of one name do not stack, or a row is stored already.
        """
        if len(set(rows)) != len(rows) or not rows:
            raise AnnotationError(f"rows {list(rows)[:8]} are empty or repeat")
        if any(len(values) != len(rows) for values in (hashes, *arrays.values())) or not arrays:
            raise AnnotationError(f"{len(rows)} rows need as many hashes and, for at least one name, as many arrays")
        again = self.done().intersection(rows)
        if again:
            raise AnnotationError(
                f"{self.directory}: row {min(again)} is stored already; write only rows not in done()"
            )
        columns = {
            "rows": np.asarray(rows, np.int64),
            "hashes": np.asarray([bytes.fromhex(h) for h in hashes], "V32"),
        }
        for name, values in arrays.items():
            columns[f"{name}.values"], columns[f"{name}.lengths"] = _stack(name, values)
        buffer = io.BytesIO()
        np.savez(buffer, **columns)  # type: ignore[arg-type]
        name = f"part-{min(rows)}-{len(rows)}.npz"
        storage.write_whole(self.directory / name, buffer.getvalue())
        self._rows_of[name] = tuple(int(row) for row in rows)

    def read(
        self, dataset: Rows, content: Callable[[Group], str] = Group.content_hash
    ) -> dict[int, dict[str, np.ndarray]]:
        """All stored rows: row -> name -> array. `content` is the hash of a group that its rows were written with.

        Raises:
            AnnotationError: a row's group has changed, a row is stored twice, or a part is damaged.
        """
        stored: dict[int, dict[str, np.ndarray]] = {}
        hash_of: dict[int, str] = {}
        for path in self._part_paths():
            part = _read_part(path)
            names = [member.removesuffix(".values") for member in part if member.endswith(".values")]
            for i, (row, stamp) in enumerate(zip(part["rows"].tolist(), part["hashes"], strict=True)):
                if row in stored:
                    raise AnnotationError(f"{self.directory}: row {row} is stored twice; delete one of its parts")
                stored[row] = {name: part[name][i] for name in names}
                hash_of[row] = stamp.tobytes().hex()
        self._check_content(dataset, hash_of, content)
        return stored

    def _check_content(self, dataset: Rows, hash_of: Mapping[int, str], content: Callable[[Group], str]) -> None:
        outside = [row for row in hash_of if not 0 <= row < len(dataset)]
        if outside:
            raise AnnotationError(f"{self.directory}: row {outside[0]} is not in {dataset.path}; delete the directory")
        for row, group in enumerate(dataset.groups()):
            if row in hash_of and content(group) != hash_of[row]:
                raise AnnotationError(
                    f"{self.directory}: row {row} was computed for other content than {dataset.path} has now; "
                    "delete the directory and annotate again"
                )

    def _part_paths(self) -> list[epath.Path]:
        """Parts by first row. Files of other names are not ours."""
        parts = {path: _PART.fullmatch(path.name) for path in self.directory.iterdir()}
        named = {path: (int(match[1]), int(match[2])) for path, match in parts.items() if match}
        return sorted(named, key=named.__getitem__)


def find(dataset_path: str | os.PathLike[str], kind: str) -> tuple[AnnotationStore, ...]:
    """All stores of `kind`, by directory name; their keys say how each was made."""
    root = storage.to_path(dataset_path) / "annotations"
    if not root.exists():
        return ()
    found = re.compile(re.escape(kind) + r"-[0-9a-f]{16}")
    directories = sorted((d for d in root.iterdir() if found.fullmatch(d.name)), key=lambda d: d.name)
    return tuple(AnnotationStore(d, _read_key(d)) for d in directories if (d / "key.json").exists())


def _read_key(directory: epath.Path) -> dict[str, Any]:
    try:
        key = json.loads((directory / "key.json").read_text())
        if not isinstance(key, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{directory}/key.json is damaged: delete the directory and annotate again") from error
    return key


def _read_part(path: epath.Path) -> dict[str, Any]:
    """`rows`, `hashes` and, under each name, the values cut into rows."""
    data = path.read_bytes()
    try:
        part = _members(data)
        names = [member.removesuffix(".values") for member in part if member.endswith(".values")]
        if not names:
            raise ValueError("members missing")
        count = len(_whole_numbers(part["rows"]))
        if part["hashes"].shape != (count,) or part["hashes"].dtype != np.dtype("V32"):
            raise ValueError("hashes do not fit the rows")
        for name in names:
            values, lengths = part[f"{name}.values"], _whole_numbers(part[f"{name}.lengths"])
            if (
                values.dtype.kind not in "biuf"
                or values.ndim == 0
                or len(lengths) != count
                or sum(lengths) != len(values)
            ):
                raise ValueError(f"{name} does not fit its rows")
            part[name] = np.split(values, np.cumsum(lengths)[:-1])
    except Exception as error:  # numpy and zipfile raise a dozen types on damaged files
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise AnnotationError(f"{path} is damaged ({said}): delete it, its rows are computed again") from error
    return part


def _members(data: bytes) -> dict[str, Any]:
    """The arrays in a part. They stand in it as they are, so none can be larger than the file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("compressed, which no part is")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("a member stands in it twice")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _whole_numbers(array: np.ndarray) -> list[int]:
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array) or array.min() < 0:
        raise ValueError("rows or lengths are no list of whole numbers from 0 on")
    return array.tolist()


def _stack(name: str, values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays [n_i, ...] -> ([sum n_i, ...], n_i)."""
    first = np.asarray(values[0])
    for value in map(np.asarray, values):
        if value.dtype.kind not in "biuf" or value.ndim == 0:
            raise AnnotationError(
                f"{name}: arrays [n, ...] of plain numbers can be stored, not {value.dtype} {value.shape}"
            )
        if value.dtype != first.dtype or value.shape[1:] != first.shape[1:]:
            raise AnnotationError(
                f"{name}: {value.dtype} {value.shape} does not stack with {first.dtype} {first.shape}"
            )
    return np.concatenate([np.asarray(v) for v in values]), np.asarray([len(v) for v in values], np.int64)

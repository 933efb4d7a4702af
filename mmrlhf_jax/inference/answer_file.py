"""The file that answers are written to, so that a killed run loses little, doubles nothing and mixes nothing.

    OUTPUT                   one JSON line a prompt, in their order; appears when all are there
    OUTPUT.settings.json     everything the answers depend on
    OUTPUT.lease             which job writes, while one does
    OUTPUT.parts/            <kind>-<place>-<n>.jsonl: what is done so far, n lines each as they will stand in OUTPUT

Nothing is appended to: a part appears under its name only when whole, on a disk as on gs://, where appending is
impossible. Processes that share the work must share the storage.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.data.report import rejected_to_json
from mmrlhf_jax.data.sources.rows import Rejected

Record = dict[str, Any]

_PART = re.compile(r"([a-z]+)-\d+-\d+\.jsonl")
_FORMAT = 1  # raised whenever the same settings would give other lines


class AnswerFileError(ValueError):
    """An OUTPUT that is not this run's to write, or whose parts cannot be trusted."""


@dataclass(frozen=True)
class Saving:
    """How often what is done is written."""

    seconds: float = 20.0
    records: int = 256


@dataclass(frozen=True)
class AnswerFile:
    """An OUTPUT; each of its lines is named by a number under the key `unit`."""

    path: epath.Path
    unit: str

    @property
    def settings(self) -> epath.Path:
        return self._beside("settings.json")

    @property
    def rejected(self) -> epath.Path:
        return self._beside("rejected.jsonl")

    @property
    def lease(self) -> epath.Path:
        """Held by the job that writes (mmrlhf_jax/lease.py)."""
        return self._beside("lease")

    @property
    def parts(self) -> epath.Path:
        return self._beside("parts")

    def _beside(self, suffix: str) -> epath.Path:
        return self.path.with_name(f"{self.path.name}.{suffix}")

    def finished(self) -> bool:
        return self.path.exists()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises AnswerFileError where OUTPUT is not ours, or was begun with another value of one of `settings`."""
        stored = self._stored()
        if stored is None:
            if self.path.exists():
                raise AnswerFileError(
                    f"{self.path} exists, and {self.settings.name} beside it does not: choose another --output"
                )
            return
        settings = {"format": _FORMAT, **json.loads(json.dumps(dict(settings)))}
        differ = [name for name in settings if name in stored and stored[name] != settings[name]]
        if differ:
            what = "; ".join(f"{name} was {_short(stored[name])}, is {_short(settings[name])}" for name in differ)
            raise AnswerFileError(
                f"{self.path} was begun with other settings ({what}): give the same, choose another --output, or "
                f"remove {self.path.name}, {self.settings.name} and {self.parts.name}"
            )

    def state(self, settings: Mapping[str, Any]) -> None:
        """Adds to what the answers are known to depend on. For one process, and after `check`."""
        if not storage.is_remote(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"format": _FORMAT, **(self._stored() or {}), **settings}
        storage.write_whole(self.settings, (json.dumps(whole, indent=2) + "\n").encode())

    def _stored(self) -> dict[str, Any] | None:
        if not self.settings.exists():
            return None
        try:
            stored = json.loads(self.settings.read_text())
            if not isinstance(stored, dict):
                raise ValueError("no object")
            return stored
        except (ValueError, RecursionError) as error:
            raise AnswerFileError(f"{self.settings} is damaged ({error}): remove it and {self.parts.name}") from error

    def list_rejected(self, rejected: tuple[Rejected, ...]) -> None:
        """Writes the rows that are not answered, or removes the list of an earlier run where there are none."""
        if not rejected:
            self.rejected.unlink(missing_ok=True)
            return
        if not storage.is_remote(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(self.rejected, rejected_to_json(rejected).encode())

    def done(self, kind: str) -> dict[int, Record]:
        """What the parts of `kind` hold, by number. Raises AnswerFileError for a damaged part, or one too many."""
        found: dict[int, Record] = {}
        for part in self._part_paths(kind):
            for record in _read_part(part, self.unit):
                number = record[self.unit]
                if number in found:
                    raise AnswerFileError(f"{part}: {self.unit} {number} is in another part too; remove one of them")
                found[number] = record
        return found

    def write(self, kind: str, records: list[Record]) -> None:
        """One part more; no record may be there already."""
        self.parts.mkdir(parents=True, exist_ok=True)
        name = f"{kind}-{min(record[self.unit] for record in records)}-{len(records)}.jsonl"
        storage.write_whole(self.parts / name, _lines(records))

    @contextmanager
    def saving(self, kind: str, saving: Saving) -> Iterator[Callable[[list[Record]], None]]:
        """A function that takes records and writes them now and then; the rest is written at the end, however it
        comes."""
        pending: list[Record] = []
        written = time.monotonic()

        def flush() -> None:
            if pending:
                self.write(kind, pending)
                pending.clear()

        def keep(records: list[Record]) -> None:
            nonlocal written
            pending.extend(records)
            if len(pending) >= saving.records or time.monotonic() - written > saving.seconds:
                flush()
                written = time.monotonic()

        try:
            yield keep
        finally:
            flush()

    def finish(self, kind: str) -> None:
        """Makes OUTPUT of the records of `kind`, by number."""
        records = self.done(kind)
        storage.write_whole(self.path, _lines([records[number] for number in sorted(records)]))
        self.clear_parts()

    def clear_parts(self) -> None:
        """Of a finished OUTPUT: what is left where a run was killed while it cleared them."""
        if self.parts.exists():
            for part in list(self.parts.iterdir()):
                part.unlink()
            if not storage.is_remote(self.path):
                self.parts.rmdir()

    def read(self) -> list[Record]:
        """The lines of a finished OUTPUT."""
        return _read_part(self.path, self.unit)

    def _part_paths(self, kind: str) -> list[epath.Path]:
        if not self.parts.exists():
            return []
        named = {path: _PART.fullmatch(path.name) for path in self.parts.iterdir()}
        return sorted((path for path, match in named.items() if match and match[1] == kind), key=lambda path: path.name)


def _lines(records: list[Record]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _read_part(path: epath.Path, unit: str) -> list[Record]:
    try:
        # not splitlines, which also breaks at characters that stand unescaped in JSON
        records = [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]
        if not all(isinstance(record, dict) and isinstance(record.get(unit), int) for record in records):
            raise ValueError(f"a line without {unit!r}")
        _lines(records)  # a lone surrogate could not be written again
    except (ValueError, RecursionError) as error:
        raise AnswerFileError(f"{path} is damaged ({error}): remove it, its lines are made again") from error
    return records


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."

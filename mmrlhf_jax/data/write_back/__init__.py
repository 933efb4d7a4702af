"""A prepared dataset's pairs as rows that other trainers read: one pair a row, its pictures with it.

What the formats have no place for is counted, not written: reasons, scores, ties, responses in no pair. What they would
misread is refused, naming groups. Read with `--source` of the same name the rows are the same pairs again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.data.datasets import Dataset
from mmrlhf_jax.data.write_back import sharegpt, trl
from mmrlhf_jax.data.write_back.selection import Chosen, WriteBackError, choose
from mmrlhf_jax.lease import beside, lease

Format = Literal["trl", "sharegpt"]

RECORD = ".written_from.json"  # hidden: `datasets` takes any other file in the directory for data
UPLOADING = ".uploading"

_WRITERS: dict[str, tuple[Callable[[Dataset, Chosen, Path, bool], None], Callable[..., str | None], str]] = {
    "trl": (trl.write, trl.problem, trl.FILE),
    "sharegpt": (sharegpt.write, sharegpt.problem, sharegpt.INFO),
}


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_back` wrote, or found written."""

    chosen: Chosen
    reused: bool


def write_back(
    dataset: Dataset, form: Format, output: str, *, skip_videos: bool = False, progress: bool = False
) -> Written:
    """Write the pairs of `dataset` under the directory `output`, which appears when it is whole.

    Raises:
        WriteBackError: `output` holds something else, no group has a pair, or groups that the format cannot hold.
    """
    write, problem, last = _WRITERS[form]
    target = storage.to_path(output)
    record = json.dumps({"dataset": dataset.fingerprint, "format": form, "skip_videos": skip_videos})
    chosen = choose(dataset, form, problem, skip_videos)
    if target.exists() and not (target / UPLOADING).exists():
        if not (target / RECORD).exists() or (target / RECORD).read_text() != record:
            raise WriteBackError(f"{output} exists and was not written from this dataset in this way: choose another")
        return Written(chosen, reused=True)
    with lease(beside(output), output):
        if storage.is_remote(target):
            with tempfile.TemporaryDirectory(prefix="mmrlhf-write-back-") as folder:
                write(dataset, chosen, Path(folder), progress)
                (Path(folder) / RECORD).write_text(record)
                storage.upload(Path(folder), target, last=last, marker=UPLOADING)
        else:
            _write_local(Path(os.fspath(target)), lambda folder: write(dataset, chosen, folder, progress), record)
    return Written(chosen, reused=False)


def _write_local(target: Path, write: Callable[[Path], None], record: str) -> None:
    aside = epath.Path(target.parent / f".{target.name}.writing")
    if aside.exists():  # of an interrupted run
        aside.rmtree()
    aside.mkdir(parents=True)
    write(Path(aside))
    (aside / RECORD).write_text(record)
    aside.rename(target)

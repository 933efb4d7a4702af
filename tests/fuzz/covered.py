"""Which lines of a reader count, and which of them ran.

A reader names what it covers as modules, `data/media`, or as some functions of one, `data/media:decode,_open`, where
other readers feed the rest. What runs on import is left out, and `NOT_READERS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

Line = tuple[str, int]

NOT_READERS: dict[str, tuple[str, ...]] = {
    # what only writes stored annotations, where a job holds its lease, and a protocol without code
    "annotations.py": ("AnnotationStore.open", "AnnotationStore.write", "AnnotationStore.lease", "_stack", "Rows."),
    # for people, or of scores that were read already
    "rewards.py": (
        "write_readable",
        "with_scores",
        "note_command",
        "stored_scores",
        "_store_beside",
        "_described",
        "cut_short",
    ),
    # what writes or uploads; pickled for other processes; its rows are checked numbers of a program, not of a file
    "dataset.py": (
        "PreparedGroups.",
        "_shards",
        "_ahead",
        "write_dataset",
        "upload_dataset",
        "_is_data",
        "PreparedDataset.__getstate__",
        "PreparedDataset._checked",
    ),
    # writing a report; `lines` and `from_json` read one
    "report.py": ("Spread.of", "report_of", "_spreads", "_buckets", "rejected_to_json", "Report.to_json"),
    # writing
    "prepare.py": ("_progress", "_write", "_reload", "_metadata", "_clear", "_waiting"),
    # writing, and protocols without code
    "results.py": ("figures", "write", "_write", "table", "_cell", "_figure", "Columns."),
    # writing, and names of files beside it
    "answer_file.py": (
        "AnswerFile.write",
        "AnswerFile.state",
        "AnswerFile.saving",
        "AnswerFile.list_rejected",
        "AnswerFile.clear_parts",
        "AnswerFile.rejected",
        "AnswerFile.lease",
        "AnswerFile.finished",
    ),
    # protocols without code
    "comparisons.py": ("Scored.",),
    "rows.py": ("Source.",),
    # of datasets, which `dataset` reads
    "prompts.py": ("dataset_prompts", "Prompts.without", "Prompts._origin"),
    "media.py": ("_read_object",),  # of a bucket
    "video.py": ("_require_av",),  # without PyAV nothing is read
}
"""Functions by the beginning of their qualified names that no file of a stranger reaches."""


def file_of(part: str) -> str:
    """The source file of `data/media` or of `data/media:decode`."""
    return importlib.import_module("mmrlhf_jax." + part.partition(":")[0].replace("/", ".")).__file__ or ""


def lines_in(parts: Iterable[str]) -> set[Line]:
    """Of the functions that count; a name that is no function is an error."""
    found: set[Line] = set()
    for part in parts:
        file, named = file_of(part), tuple(filter(None, part.partition(":")[2].split(",")))
        codes = [code for code in _functions(file) if not named or code.co_qualname.startswith(named)]
        for name in named:
            if not any(code.co_qualname.startswith(name) for code in codes):
                raise ValueError(f"{part}: there is no function {name}")
        found |= {(file, line) for code in codes for line in _lines_of(code)}
    return found


def _functions(file: str) -> Iterator[CodeType]:
    left_out = NOT_READERS.get(Path(file).name, ())
    pending = [(compile(Path(file).read_text(), file, "exec"), False)]
    while pending:
        code, is_function = pending.pop()
        if is_function and code.co_qualname.startswith(left_out):
            continue
        if is_function and not code.co_qualname.startswith("<"):  # of the module itself
            yield code
        for inner in code.co_consts:
            if isinstance(inner, CodeType):  # CO_NEWLOCALS: not the body of a class
                pending += [(inner, bool(inner.co_flags & 0x2))]


def _lines_of(code: CodeType) -> set[int]:
    return {line for _, _, line in code.co_lines() if line is not None and line != code.co_firstlineno}


class Lines:
    """Which lines of functions of some files ran. A function all of whose lines are known is no longer watched."""

    def __init__(self, parts: Iterable[str], seen: set[Line]):
        self._missing: dict[CodeType, set[int]] = {}
        self._files = frozenset(map(file_of, parts))
        self.seen = set(seen)

    def call(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        missing = self._missing.setdefault(code, _lines_of(code))
        return self._line if missing else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        self.seen.add((code.co_filename, frame.f_lineno))
        self._missing[code].discard(frame.f_lineno)
        return self._line


def share(everything: set[Line], seen: set[Line]) -> str:
    covered = len(everything & seen)
    return f"{100 * covered / len(everything):.0f} % of {len(everything)} lines" if everything else "lines not counted"


def by_module(everything: set[Line], seen: set[Line]) -> list[str]:
    """A row a module: how many of its lines ran, and which did not."""
    rows = []
    for file in sorted({file for file, _ in everything}):
        lines = {each for each in everything if each[0] == file}
        missing = sorted(line for _, line in lines - seen)
        rows.append(f"{share(lines, seen)} of {Path(file).name}" + (f", not {missing}" if missing else ""))
    return rows

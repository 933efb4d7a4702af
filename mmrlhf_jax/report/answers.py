"""Files of answers, as launch/generate.py writes them, and which claims in them are wrong where somebody says so.

A line is {"id", "prompt", "responses": [{"text", ...}, ...]}; of what else generate writes "row", "line", "best" and a
response's "ended", "score" and "critiques" are read. Three more fields of a response may be added by whoever knows:

    wrong     [[start, end], ...] or [[start, end, "what is right"], ...]: the wrong claims as half-open ranges of
              characters (Unicode code points) of `text`, in order and apart; [] says that none is wrong
    missing   ["what is right", ...]: claims that were due and that the text does not make
    claims    how many claims were due, or made where there are more: what wrong and missing ones are a share of
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mmrlhf_jax import storage
from mmrlhf_jax.data.sources.rows import MAX_ROW_BYTES
from mmrlhf_jax.report.runs import ReportError, number_of

Prompt = tuple[tuple[str, str], ...]
Key = tuple[str, str]
"""What names a prompt in every file: its id, and its row or line where the file has one."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """A wrong claim: characters [start, end) of the text; `right` is what should stand there, "" where nobody says."""

    start: int
    end: int
    right: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """One response. `wrong` is None where nobody says what is wrong; `score` and `critiques` are a reward model's."""

    text: str
    ended: bool = True
    score: float | None = None
    critiques: tuple[str, ...] = ()
    wrong: tuple[Wrong, ...] | None = None
    missing: tuple[str, ...] = ()
    claims: int | None = None

    @property
    def faults(self) -> int:
        """Wrong and missing claims."""
        return len(self.wrong or ()) + len(self.missing)


@dataclass(frozen=True, slots=True)
class Answered:
    """A line: the prompt as (role, text) of each turn, and its responses, of which `best` is the one to show."""

    where: str
    key: Key
    prompt: Prompt
    responses: tuple[Said, ...]
    best: int

    @property
    def shown(self) -> Said:
        return self.responses[self.best]


@dataclass(frozen=True)
class AnswersFile:
    """`label` is how the report calls it."""

    label: str
    path: str
    answers: Mapping[Key, Answered]


def read_answers(given: Sequence[str]) -> list[AnswersFile]:
    """Files named FILE or LABEL=FILE, in their order. Raises ReportError naming file and line."""
    files = [read_file(path, label) for label, path in map(_labelled, given)]
    labels = [file.label for file in files]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ReportError(f"two files of answers are called {twice[0]!r}: name them, --answers BEFORE=FILE AFTER=FILE")
    return files


def in_all(files: Sequence[AnswersFile]) -> list[Key]:
    """The prompts that every file answers, in the order of the first. Raises ReportError where there is none, or where
    two files ask different things under one name."""
    keys = [key for key in files[0].answers if all(key in file.answers for file in files)]
    if not keys:
        names = ", ".join(file.path for file in files)
        raise ReportError(f"no prompt is answered in all of {names}: compare answers to the same prompts")
    for key in keys:
        first, *others = (file.answers[key] for file in files)
        for other in others:
            if other.prompt != first.prompt:
                raise ReportError(f"{other.where}: the prompt of {key[0]!r} is not that of {first.where}")
    return keys


def _labelled(given: str) -> tuple[str, str]:
    label, equals, path = given.partition("=")
    if equals and label and "/" not in label and not storage.to_path(given).exists():
        return label, path
    return PurePosixPath(given.replace("\\", "/")).name.removesuffix(".jsonl"), given


def read_file(file: str, label: str) -> AnswersFile:
    """Raises ReportError naming file and line."""
    path = storage.to_path(file)
    if not path.exists() or path.is_dir():
        what = "is a directory" if path.exists() else "does not exist"
        raise ReportError(f"{file} {what}: --answers takes files that launch/generate.py --output wrote")
    answers: dict[Key, Answered] = {}
    with storage.open_read(file) as stream:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise ReportError(f"{file}:{number}: the line is over {MAX_ROW_BYTES} bytes")
            if line.strip():
                answered = _answered(line, f"{file}:{number}")
                if answered.key in answers:
                    raise ReportError(f"{answered.where}: {answered.key[0]!r} is on {answers[answered.key].where} too")
                answers[answered.key] = answered
    if not answers:
        raise ReportError(f"{file} holds no answers")
    return AnswersFile(label, file, answers)


def _answered(line: bytes, where: str) -> Answered:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where}: not JSON ({error})") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("id"), str):
        raise ReportError(f"{where}: a line is an object with a string 'id', as launch/generate.py writes it")
    responses = raw.get("responses")
    if not isinstance(responses, list) or not responses:
        raise ReportError(f"{where}: 'responses' is not a list of at least one response")
    best = raw.get("best", 0)
    if not _is_count(best) or best >= len(responses):
        raise ReportError(f"{where}: 'best' is {json.dumps(best)[:40]}, not one of {len(responses)} responses")
    place = next((f"{unit} {raw[unit]}" for unit in ("row", "line") if _is_count(raw.get(unit))), "")
    said = tuple(_said(each, f"{where}: response {i}") for i, each in enumerate(responses))
    return Answered(where, (raw["id"], place), _prompt(raw.get("prompt"), where), said, best)


def _prompt(raw: Any, where: str) -> Prompt:
    if isinstance(raw, str):
        return (("user", raw),)
    turns = raw if isinstance(raw, list) and raw else [None]
    found = tuple(
        (turn["role"], turn["content"])
        for turn in turns
        if isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
    )
    if len(found) != len(turns):
        raise ReportError(f"{where}: 'prompt' is neither a string nor a list of messages {{role, content}}")
    return found


def _said(raw: Any, where: str) -> Said:
    if not isinstance(raw, dict) or not isinstance(raw.get("text"), str):
        raise ReportError(f"{where} is not an object with a string 'text'")
    text, score, claims = raw["text"], raw.get("score"), raw.get("claims")
    said = Said(
        text=text,
        ended=raw.get("ended") is not False,
        score=None if score is None else number_of(score, "'score'", where),
        critiques=_texts(raw.get("critiques", []), "critiques", where),
        wrong=None if raw.get("wrong") is None else _wrong(raw["wrong"], text, where),
        missing=_texts(raw.get("missing", []), "missing", where),
        claims=claims,
    )
    if claims is not None and (not _is_count(claims) or claims < said.faults):
        raise ReportError(
            f"{where}: 'claims' is {json.dumps(claims)[:40]}, not a whole number of at least the {said.faults} that "
            "are wrong or missing"
        )
    return said


def _texts(raw: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(each, str) for each in raw):
        raise ReportError(f"{where}: '{name}' is not a list of strings")
    return tuple(raw)


def _wrong(raw: Any, text: str, where: str) -> tuple[Wrong, ...]:
    found: list[Wrong] = []
    for each in raw if isinstance(raw, list) else [raw]:
        if not isinstance(each, list) or len(each) not in (2, 3) or not all(map(_is_count, each[:2])):
            raise ReportError(
                f"{where}: 'wrong' holds {json.dumps(each)[:40]}, not [start, end] or [start, end, right]"
            )
        start, end, right = (*each, "")[:3]
        if not isinstance(right, str):
            raise ReportError(f"{where}: 'wrong' says {json.dumps(right)[:40]} is right, which is not a string")
        if not (found[-1].end if found else 0) <= start < end <= len(text):
            raise ReportError(
                f"{where}: 'wrong' holds [{start}, {end}]; ranges follow each other within the {len(text)} characters "
                "of the text, and none is empty"
            )
        found.append(Wrong(start, end, right))
    return tuple(found)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

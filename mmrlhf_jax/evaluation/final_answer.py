"""Exact match of final answers: whether alignment broke what a model could do before.

Source of the idea: https://arxiv.org/abs/2305.17306 (Chain-of-Thought Hub), https://arxiv.org/abs/2402.10884 (a
benchmark before and after multimodal tuning). A row: `prompt`, `answer`, `image` or `video` if any, `id`, `category`,
and `kind`, how an answer is read (or --kind for all rows):

    number   what stands behind the last `####`, in the last \\boxed{}, or behind the last "answer is" or "answer:",
             else the whole text; the last number of it (the first behind one of these marks); equal as numbers, commas,
             signs of currency and percent aside; 1/2, \\frac{1}{2}, 2\\frac{1}{2}, 5e-05, 5 \\times 10^{-5} are numbers
    choice   a letter A to H: behind such a mark, or the whole answer, or the one it begins with ("B.", "(B) ..."), or
             the last in parentheses
    yes_no   the first yes or no, behind such a mark if there is one
    text     what stands behind such a mark, else the last line; equal but for case, articles and punctuation

An answer of which nothing can be read is wrong; `found` says how many could be read. As a guard, --baseline DIR names
an earlier evaluation of the same rows: the table has its figures too, rows that became wrong and right are counted
(with the exact two-sided sign test over them, McNemar's), and the program fails where accuracy fell by more than
--max-drop.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Literal, cast, get_args

from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.data.sources.pictures import Store, media_of
from mmrlhf_jax.data.sources.rows import Row, RowError, prompt_of, text_of
from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.judges import Reply
from mmrlhf_jax.evaluation.questions import (
    Answer,
    AnswerBenchmark,
    Question,
    Record,
    by_category,
    column_of,
    name_of,
    share,
)
from mmrlhf_jax.evaluation.results import ROWS

Kind = Literal["number", "choice", "yes_no", "text"]

MOST_DIGITS = 200  # of a number; Python itself refuses to read very long ones

_MARK = re.compile(r"####|\\boxed\{|\banswer\s*(?:is\s*:?|:)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?(?:/\d+)?")
_SIGNED_CURRENCY = re.compile(r"-\s*\\?[$€£¥]\s*(?=[\d.])")  # -$5
_TEX_FRACTION = re.compile(r"(\d{1,50})?\s{0,4}\\[dt]?frac\s*\{\s*(\d{1,50})\s*\}\s*\{\s*(\d{1,50})\s*\}")
_POWER_OF_TEN = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?\s*(-?\d{1,50})\s*\}?")
_CHOICE = re.compile(r"\(?\b([A-H])\b\)?")
_BEGINS = re.compile(r"\s*\(?([A-H])(?:[).:,]|\s*$)")
_IN_PARENTHESES = re.compile(r"\(([A-H])\)")
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def extract(text: str, kind: Kind) -> str | None:
    """The final answer in a form in which equal answers are equal texts; None where there is none."""
    marks = list(_MARK.finditer(text))
    behind = text[marks[-1].end() :] if marks else None
    if behind is not None and marks[-1][0].startswith("\\boxed"):
        behind = _braced(behind)
    if kind == "number":
        return _number(behind, text)
    if kind == "choice":
        return _choice(behind, text)
    if kind == "yes_no":
        found = _YES_NO.search(text if behind is None else behind)
        return None if found is None else found[1].lower()
    lines = (text if behind is None else behind).strip().splitlines()
    return _plain(lines[-1 if behind is None else 0]) or None if lines else None


def _braced(text: str) -> str:
    """What stands before the brace that closes one opened before the text."""
    depth = 1
    for at, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return text[:at]
    return text


def _number(behind: str | None, text: str) -> str | None:
    found = _NUMBER.findall(_one_notation(text if behind is None else behind))
    if not found:
        return None
    said = found[-1 if behind is None else 0].replace(",", "")
    top, _, bottom = said.partition("/")
    exponent = top.lower().partition("e")[2]
    if len(said) > MOST_DIGITS or abs(int(exponent or 0)) > MOST_DIGITS or (bottom and not int(bottom)):
        return None
    return str(Fraction(top) / int(bottom or 1))


def _one_notation(text: str) -> str:
    """Signs, fractions and powers of ten as `_NUMBER` has them."""
    text = _SIGNED_CURRENCY.sub("-", text.replace("\N{MINUS SIGN}", "-"))
    text = _POWER_OF_TEN.sub(r"e\1", text)
    return _TEX_FRACTION.sub(_fraction, text)


def _fraction(found: re.Match[str]) -> str:
    whole, top, bottom = found.groups()
    return f"{int(whole or 0) * int(bottom) + int(top)}/{bottom}"


def _choice(behind: str | None, text: str) -> str | None:
    if behind is not None:
        found = _CHOICE.search(behind)
        return None if found is None else found[1]
    if begins := _BEGINS.match(text):
        return begins[1]
    named = _IN_PARENTHESES.findall(text)
    return named[-1] if named else None


def _plain(text: str) -> str:
    small = "".join(sign if sign.isalnum() or sign.isspace() else " " for sign in text.casefold())
    return " ".join(_ARTICLE.sub(" ", small).split())


def check(row: Row, store: Store, kind: Kind | None) -> Question:
    media = media_of(row.fields.get("image"), row.fields.get("video"), store)
    given = _kind(row.fields.get("kind") or kind)
    value = column_of(row, "answer")
    answer = (
        str(value) if isinstance(value, int | float) and not isinstance(value, bool) else text_of(value, "'answer'")
    )
    expected = extract(answer, given)
    if expected is None:
        raise RowError(f"'answer' {answer[:80]!r} holds no {given}")
    return Question(
        origin=row.origin,
        id=name_of(row),
        category=text_of(row.fields.get("category") or given, "'category'"),
        prompt=prompt_of(column_of(row, "prompt", "question"), media),
        media=media,
        facts={"kind": given, "expected": expected},
    )


def _kind(value: Any) -> Kind:
    if value not in get_args(Kind):
        raise RowError(f"'kind' is {value!r}; number, choice, yes_no or text was expected (or --kind for all rows)")
    return cast(Kind, value)


def verdict(question: Question, answers: Sequence[Answer], _: Sequence[Reply]) -> Record:
    found = extract(answers[0].text, question.facts["kind"])
    expected = question.facts["expected"]
    return {"kind": question.facts["kind"], "expected": expected, "found": found, "right": found == expected}


def figures(records: Sequence[Record]) -> Mapping[str, Any]:
    return {
        "accuracy": share(sum(record["right"] for record in records), len(records)),
        "found": share(sum(record["found"] is not None for record in records), len(records)),
    }


def measure(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    return by_category(records, figures)


# --- the guard --------------------------------------------------------------------------------------------------------


def sha256_of_baseline(directory: str) -> str:
    """Of the rows of an earlier evaluation. Raises BenchmarkError where there are none."""
    return hashlib.sha256(_rows_of(directory).read_bytes()).hexdigest()


def _rows_of(directory: str) -> epath.Path:
    path = storage.to_path(directory) / ROWS
    if not path.exists():
        raise BenchmarkError(f"{path} does not exist: --baseline is the output of an earlier final_answer")
    return path


def read_baseline(directory: str, records: Sequence[Record]) -> list[Record]:
    """An earlier evaluation's records of the same rows, in their order. Raises BenchmarkError where it has others."""
    path = _rows_of(directory)
    try:
        rows = [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]
        found = {row["id"]: row for row in rows if isinstance(row["right"], bool) and row["expected"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{path} is not of final_answer: {error}") from error
    for record in records:
        before = found.get(record["id"])
        same = before is not None and all(before.get(name) == record[name] for name in ("expected", "kind", "category"))
        if not same or len(rows) != len(records):
            raise BenchmarkError(f"{path} is of other rows (id {record['id']!r}): a guard compares the same ones")
    return [found[record["id"]] for record in records]


def turned(before: Sequence[Record], now: Sequence[Record]) -> str:
    """How many rows turned, and how likely at least so uneven a split is by chance."""
    pairs = [(a["right"], b["right"]) for a, b in zip(before, now, strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    return f"{lost} rows became wrong and {won} right since the baseline; sign test p = {sign_test(lost, won):.3g}"


def sign_test(lost: int, won: int) -> float:
    """Exact and two-sided: how likely a fair coin splits lost + won throws at least so unevenly."""
    total, least = lost + won, min(lost, won)
    tail = sum(math.comb(total, k) for k in range(least + 1))
    return min(1.0, float(Fraction(2 * tail, 2**total)))


def benchmark(kind: Kind | None = None) -> AnswerBenchmark:
    return AnswerBenchmark(
        name="final_answer",
        title="Final answers",
        counts=("rows",),
        metrics={"accuracy": "accuracy", "found": "found", "reward": "reward"},
        check=partial(check, kind=kind),
        verdict=verdict,
        measure=measure,
    )

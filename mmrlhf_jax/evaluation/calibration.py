"""Expected calibration error: how far a model's certainty is from how often it is right.

Source: https://arxiv.org/abs/1706.04599; of preference models, as MMPO reports it, https://arxiv.org/abs/2410.03145. A
row is one of

    confidence, right (or correct)   a probability, and whether what it was given for turned out so
    rewards                          [of the preferred, of the other answer], as evaluate.py reward_bench leaves in
                                     rows.jsonl; more may stand there
    margin                           of the preferred answer, such as beta h of a policy

A margin m is worth sigma(scale m): the model names the answer with m > 0, with confidence max(sigma, 1 - sigma), and
is right where m > 0 (0 is wrong, as everywhere here). Confidences fall into bins of equal width, (lower, upper], 0 into
the first. ECE = sum over bins of share x |accuracy - mean confidence|; MCE the largest of these gaps; the Brier score
the mean of (confidence - right)^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmrlhf_jax.data.sources.rows import Rejected, Row, RowError, number_of, read_rows, text_of
from mmrlhf_jax.evaluation.comparisons import BenchmarkError, refuse
from mmrlhf_jax.evaluation.questions import Record
from mmrlhf_jax.evaluation.results import Measured, Sheet

SHEET = Sheet(
    title="Calibration",
    counts=("rows",),
    metrics={"ece": "ECE", "mce": "MCE", "brier": "Brier", "accuracy": "accuracy", "confidence": "confidence"},
)


def read(file: str, *, scale: float) -> list[Record]:
    """A record {line, category, confidence, right} of each row.

    Raises:
        SourceError: the file cannot be read.
        BenchmarkError: a row cannot be used, or there is none.
    """
    records: list[Record] = []
    bad: list[Rejected] = []
    for row in read_rows([file]):
        if isinstance(row, Rejected):
            bad.append(row)
            continue
        try:
            records.append(_record(row, scale))
        except RowError as error:
            bad.append(Rejected(row.origin, str(error)))
    refuse(bad, "mend the file")
    if not records:
        raise BenchmarkError(f"{file} holds no rows: correct --input")
    return records


def _record(row: Row, scale: float) -> Record:
    fields = row.fields
    category = "overall" if fields.get("category") is None else text_of(fields["category"], "'category'")
    where: Record = {"id": str(fields.get("id", row.origin.line)), "line": row.origin.line, "category": category}
    if fields.get("confidence") is not None:
        confidence = number_of(fields["confidence"], "'confidence'")
        right = fields.get("right", fields.get("correct"))
        if not 0 <= confidence <= 1:
            raise RowError(f"'confidence' is {confidence}, not from 0 to 1")
        if not isinstance(right, bool):
            raise RowError("'right' (or 'correct') is neither true nor false")
        return where | {"confidence": confidence, "right": right}
    margin = _margin(fields)
    return where | {"confidence": sigmoid(abs(scale * margin)), "right": margin > 0}


def _margin(fields: Mapping[str, Any]) -> float:
    if fields.get("margin") is not None:
        return number_of(fields["margin"], "'margin'")
    rewards = fields.get("rewards")
    if not isinstance(rewards, list) or len(rewards) != 2:
        raise RowError("the row has none of 'confidence', 'margin' and 'rewards' (two)")
    preferred, other = (number_of(reward, "'rewards'") for reward in rewards)
    return preferred - other


def sigmoid(x: float) -> float:
    """Of x >= 0."""
    return 1 / (1 + math.exp(-x))


def figures(confidence: np.ndarray, right: np.ndarray, bins: int) -> dict[str, Any]:
    """`confidence` f64 [N] in [0, 1] and `right` bool [N], N > 0."""
    edges = np.arange(1, bins) / bins
    place = np.searchsorted(edges, confidence, side="left")  # (lower, upper]
    count = np.bincount(place, minlength=bins)
    taken = count > 0
    gaps = np.abs(np.bincount(place, right - confidence, bins)[taken]) / count[taken]
    return {
        "rows": len(confidence),
        "ece": float((gaps * count[taken]).sum() / len(confidence)),
        "mce": float(gaps.max()),
        "brier": float(((confidence - right) ** 2).mean()),
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
    }


def measure(records: Sequence[Record], bins: int) -> Measured:
    """Of each category, and of all rows."""
    names = [name for name in dict.fromkeys(record["category"] for record in records) if name != "overall"]
    sections = {name: [record for record in records if record["category"] == name] for name in names}
    sections["overall"] = list(records)
    return {
        name: figures(
            np.array([record["confidence"] for record in rows]), np.array([record["right"] for record in rows]), bins
        )
        for name, rows in sections.items()
    }

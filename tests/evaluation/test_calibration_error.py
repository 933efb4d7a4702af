"""Calibration: errors by hand, and what a row may be."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from data_samples import write_rows

from mmrlhf_jax.evaluation.calibration import figures, measure, read
from mmrlhf_jax.evaluation.comparisons import BenchmarkError


def test_errors_by_hand():
    """Two bins: (0, .5] holds .3 right and .5 wrong: |1/2 - .4| = .1; (.5, 1] .9 right, .9 wrong, .6 right:
    |2/3 - .8| = 2/15. ECE = (2 x .1 + 3 x 2/15) / 5 = .12; Brier = (.49 + .25 + .01 + .81 + .16) / 5 = .344."""
    confidence = np.array([0.3, 0.5, 0.9, 0.9, 0.6])
    right = np.array([True, False, True, False, True])
    found = figures(confidence, right, 2)
    assert found["ece"] == pytest.approx(0.12)
    assert found["mce"] == pytest.approx(2 / 15)
    assert found["brier"] == pytest.approx(0.344)
    assert (found["accuracy"], found["confidence"]) == (3 / 5, pytest.approx(0.64))


def test_one_bin_is_the_gap_of_the_means():
    confidence, right = np.array([0.0, 1.0, 0.5]), np.array([False, True, True])
    assert figures(confidence, right, 1)["ece"] == pytest.approx(abs(2 / 3 - 1 / 2))


def test_a_perfect_and_a_boastful_model():
    sure = np.ones(4)
    assert figures(sure, np.ones(4, bool), 10)["ece"] == 0
    assert figures(sure, np.zeros(4, bool), 10)["ece"] == 1


def test_rewards_margins_and_confidences(tmp_path: Path):
    """Reward difference 2, scaled by 1/2: sigma(1); margin -2: the other answer is named, as surely, and wrongly."""
    rows = [
        {"id": "a", "rewards": [3.0, 1.0], "category": "mcq", "right": True, "critiques": []},
        {"margin": -2.0},
        {"margin": 0},
        {"confidence": 0.25, "correct": True},
    ]
    records = read(write_rows(tmp_path / "rows.jsonl", rows), scale=0.5)
    sure = 1 / (1 + math.exp(-1))
    assert [(one["confidence"], one["right"]) for one in records] == [
        (pytest.approx(sure), True),
        (pytest.approx(sure), False),
        (0.5, False),
        (0.25, True),
    ]
    found = measure(records, 10)
    assert list(found) == ["mcq", "overall"]
    assert found["mcq"]["ece"] == pytest.approx(1 - sure)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"confidence": 1.5, "right": True}, "'confidence' is 1.5, not from 0 to 1"),
        ({"confidence": 0.5}, "'right' .or 'correct'. is neither true nor false"),
        ({"rewards": [1]}, "none of 'confidence', 'margin' and 'rewards'"),
        ({"rewards": [1, "x"]}, "'rewards' is a string"),
    ],
)
def test_a_bad_row_is_named(row, reason, tmp_path: Path):
    with pytest.raises(BenchmarkError, match=f"rows.jsonl:1: .*{reason}"):
        read(write_rows(tmp_path / "rows.jsonl", [row]), scale=1)

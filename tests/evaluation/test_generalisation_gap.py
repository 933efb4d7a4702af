"""Generalisation gap: two evaluations of one benchmark, section by section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.generalisation_gap import measure, read, remarks


def results(benchmark: str = "POPE", **sections: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "settings": {}, "systems": {"model": sections}}


def test_the_gap_is_what_is_lost():
    """.75 - .5; counts, figures that are missing and sections of one alone have no gap."""
    inside = results(overall={"rows": 4, "accuracy": 0.75, "f1": None}, popular={"accuracy": 1.0})
    outside = results(overall={"rows": 9, "accuracy": 0.5, "f1": 0.5})
    assert measure(inside, outside) == {"overall accuracy": {"in": 0.75, "out": 0.5, "gap": 0.25}}


@pytest.mark.parametrize(
    ("outside", "reason"),
    [(results("CHAIR", overall={"accuracy": 0.5}), "do not compare"), (results(overall={}), "no figure in common")],
)
def test_what_does_not_compare_is_refused(outside, reason):
    with pytest.raises(BenchmarkError, match=reason):
        measure(results(overall={"accuracy": 0.75}), outside)


def settled(**settings: Any) -> dict[str, Any]:
    return {**results(overall={"accuracy": 0.5}), "settings": settings}


def test_two_models_have_no_gap_between_them():
    for one, other in (
        (settled(model="a"), settled(model="b")),
        (settled(model="a", model_fingerprint="x"), settled(model="a", model_fingerprint="y")),
    ):
        with pytest.raises(BenchmarkError, match="figures of two models"):
            measure(one, other)
    assert measure(settled(model="a", model_fingerprint="x"), settled(model="moved/a", model_fingerprint="x"))
    assert measure(settled(model=None), settled(model="b"))  # of answers that a file brought nobody knows


def test_what_was_evaluated_differently_is_remarked():
    one, other = (
        settled(input_sha256=["x"], suffix="", judge=None),
        settled(input_sha256=["y"], suffix="Briefly.", judge=None),
    )
    assert remarks(one, other) == ['evaluated differently, suffix: "" and "Briefly."']
    assert remarks(one, one) == []


@pytest.mark.parametrize("text", ["", "[]", '{"systems": {"random": {}}}', '{"systems": {"model": {"a": 1}}}'])
def test_what_is_no_evaluation_of_a_model_is_refused(text, tmp_path: Path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(BenchmarkError, match="holds no figures of a model"):
        read(str(tmp_path))
    with pytest.raises(BenchmarkError, match="does not exist"):
        read(str(tmp_path / "gone"))


def test_a_directory_is_its_results(tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps(results(overall={"accuracy": 1.0})))
    assert read(str(tmp_path)) == read(str(tmp_path / "results.json"))

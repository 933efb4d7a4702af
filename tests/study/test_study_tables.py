"""From what each seed left to what the table says, by hand."""

from __future__ import annotations

import pytest

from mmrlhf_jax.study.intervals import Interval
from mmrlhf_jax.study.summary import summarise
from mmrlhf_jax.study.table import Column, cell, markdown, table

FOUND = {
    1: {
        "policies": {
            "dpo": {"hallucination": {"all": 0.2, "row": 0.4}, "refusal": None},
            "mm_dpo": {"hallucination": {"all": 0.1, "row": 0.5}, "refusal": 0.5},
        },
        "scores": {"scalar": {"accuracy": 0.7}},
    },
    2: {
        "policies": {"dpo": {"hallucination": {"all": 0.4}, "refusal": 0.5}, "mm_dpo": {"hallucination": {"all": 0.3}}},
        "scores": {"scalar": {"accuracy": 0.9}},
    },
}


def test_every_figure_is_over_the_seeds_that_have_it() -> None:
    means = summarise(FOUND, {}).means
    assert means["policies"]["dpo"]["hallucination/all"] == Interval(pytest.approx(0.3), pytest.approx(1.27062), 2)
    assert means["policies"]["dpo"]["hallucination/row"] == Interval(0.4, None, 1)
    assert means["policies"]["dpo"]["refusal"] == Interval(0.5, None, 1)
    assert means["scores"]["scalar"]["accuracy"].mean == pytest.approx(0.8)


def test_differences_are_held_against_what_is_named_and_there() -> None:
    differences = summarise(FOUND, {"policies": ("dpo", "absent")}).differences
    assert list(differences) == ["dpo"]
    assert list(differences["dpo"]) == ["mm_dpo"]
    less = differences["dpo"]["mm_dpo"]
    assert less["hallucination/all"].mean == pytest.approx(-0.1)
    assert less["hallucination/all"].half == pytest.approx(0, abs=1e-9)
    assert less["hallucination/row"] == Interval(pytest.approx(0.1), None, 1)
    assert "refusal" not in less  # no seed has both


@pytest.mark.parametrize(
    ("found", "column", "signed", "text"),
    [
        (Interval(0.1644, 0.0121, 5), Column("x", "x"), False, "16.4 ± 1.2"),
        (Interval(0.1644, None, 1), Column("x", "x"), False, "16.4"),
        (Interval(-0.004, 0.008, 5), Column("x", "x"), True, "-0.4 ± 0.8"),
        (Interval(0.02, 0.008, 5), Column("x", "x"), True, "+2.0 ± 0.8*"),
        (Interval(5.2345, 0.1, 5), Column("x", "x", share=False, digits=2), False, "5.23 ± 0.10"),
        (None, Column("x", "x"), False, "-"),
    ],
)
def test_a_cell(found: Interval | None, column: Column, signed: bool, text: str) -> None:
    assert cell(found, column, signed=signed) == text


def test_a_table_has_a_line_for_each_title_that_has_figures_and_says_over_how_many_seeds() -> None:
    means = summarise(FOUND, {}).means["policies"]
    columns = (Column("hallucination/row", "row"), Column("hallucination/all", "all"), Column("absent", "absent"))
    lines = table(means, {"mm_dpo": "MM-DPO", "dpo": "DPO", "sft": "SFT"}, columns)
    assert [[text.strip() for text in line.strip("|").split("|")] for line in (lines[0], *lines[2:])] == [
        ["", "row", "all", "seeds"],
        ["MM-DPO", "50.0", "20.0 ± 127.1", "2"],
        ["DPO", "40.0", "30.0 ± 127.1", "2"],
    ]


def test_markdown_is_padded() -> None:
    lines = markdown(["", "a"], [["one", "1"], ["three", "1.25"]])
    assert lines == ["|       |    a |", "|-------|-----:|", "| one   |    1 |", "| three | 1.25 |"]

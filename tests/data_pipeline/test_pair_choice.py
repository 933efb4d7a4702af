"""Scores to pairs with a gap, and the best with the worst."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from data_samples import row, sorted_out, write_rows

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.pair_choice import best_and_worst, choose_pairs, far_apart
from mmrlhf_jax.data.pipeline import Item, Selection, select, tie_weights
from mmrlhf_jax.data.prepare import PrepareError, PrepareOptions, prepare
from mmrlhf_jax.data.ranking import by_score
from mmrlhf_jax.data.sources import read_source
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.groups import Group, Lengths, Origin, Pair, Response, Turn

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "prepare.py"
SCORED = {"prompt": "q", "responses": "a", "score": "s"}


def scored(*scores: float) -> Group:
    """Answers a, b, ... with these scores, ranked by them."""
    responses, pairs = by_score([Response(chr(97 + i), score=score) for i, score in enumerate(scores)])
    return Group("g", (Turn("user", "What?"),), (), tuple(responses), pairs, (Origin("in.jsonl", 1),))


def named(group: Group) -> set[tuple[str, str]]:
    return {(group.responses[pair.chosen].text, group.responses[pair.rejected].text) for pair in group.pairs}


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.0, 2.0])
def test_pairs_are_those_at_least_a_gap_apart(gap: float) -> None:
    rng = Random(0)
    for _ in range(200):
        halves = [rng.randrange(8) for _ in range(rng.randrange(1, 6))]
        group = far_apart(scored(*(half / 2 for half in halves)), gap)
        letters = "abcde"[: len(halves)]
        expected = {
            (letters[i], letters[j])
            for i, j in itertools.permutations(range(len(halves)), 2)
            if halves[i] > halves[j] and halves[i] - halves[j] >= 2 * gap
        }
        assert named(group) == expected
        assert [r.text for r in group.responses] == [x for _, x in sorted(zip(halves, letters), key=lambda t: -t[0])]


def test_a_gap_between_means_of_ratings_is_met_within_rounding() -> None:
    high, low = (5 + 4 + 4) / 3, (4 + 3 + 3) / 3
    assert high - low < 1  # which is what the rounding of a difference would cost
    assert named(far_apart(scored(high, low), 1.0)) == {("a", "b")}
    assert named(far_apart(scored(high, low + 0.01), 1.0)) == set()


def test_what_is_close_is_no_tie_and_what_is_equal_is_one() -> None:
    def ties(group: Group) -> float:
        return float(tie_weights(group, Item(0, tuple(range(len(group.responses)))), Selection(preferences=True)).sum())

    assert ties(far_apart(scored(3, 3, 1), 1.0)) == 1
    assert ties(far_apart(scored(3, 2.9, 1), 1.0)) == 0
    stated = dataclasses.replace(scored(3, 3, 2.9), ties=((0, 1),))
    assert (ties(stated), ties(far_apart(stated, 1.0))) == (1, 0)
    nobody_compared = scored(3, 3)
    assert (ties(nobody_compared), ties(dataclasses.replace(nobody_compared, ties=((0, 1),)))) == (0, 1)


def test_a_group_of_ties_alone_is_of_use_where_ties_are_trained_on() -> None:
    tied, plain = dataclasses.replace(scored(2, 2), ties=((0, 1),)), scored(3, 1)
    lengths = [Lengths(0, 4, (2, 2))] * 2
    with_ties, without = (
        select([tied, plain], lengths, Selection(preferences=True, ties=wanted)) for wanted in (True, False)
    )
    assert [item.row for item in with_ties.items] == [0, 1]
    assert with_ties.weights.ties.tolist() == [1, 0]
    assert ([item.row for item in without.items], without.skipped) == ([1], 1)


def test_a_margin_of_the_row_counts_too_and_a_missing_one_is_refused() -> None:
    group = Group(
        "g",
        (Turn("user", "What?"),),
        (),
        (Response("a"), Response("b", 1), Response("c", 2)),
        (Pair(0, 1, 0.2), Pair(0, 2, 0.9), Pair(1, 2, -3.0)),
        (Origin("in.jsonl", 4), Origin("in.jsonl", 7)),
    )
    assert far_apart(group, 0.0).pairs == group.pairs[:2]
    assert far_apart(group, 0.5).pairs == group.pairs[1:2]
    bare = Group("h", group.prompt, (), group.responses, (Pair(0, 1),), group.origins)
    kept, rejected, lines = choose_pairs([bare, group], 0.5, "all")
    assert kept == [far_apart(group, 0.5)]
    assert [(r.origin.line, r.reason) for r in rejected] == [
        (line, "--gap: a response of a pair has no score, and the pair no margin") for line in (4, 7)
    ]
    assert lines == ["--gap 0.5: 2 pairs that are closer are none; 0 groups lost all of theirs"]


def test_best_and_worst() -> None:
    group = best_and_worst(scored(2, 5, 1, 5, 1))
    assert [(r.text, r.rank, r.score) for r in group.responses] == [("b", 0, 5), ("c", 1, 1)]
    assert group.pairs == (Pair(0, 1),)
    none = scored(2, 2)
    assert best_and_worst(none) == none
    ranked = Group(
        "g",
        (Turn("user", "What?"),),
        (),
        (Response("a"), Response("b", 1), Response("c", 1)),
        (Pair(0, 1, 1.0), Pair(0, 2, 4.0)),
        (),
    )
    chosen = best_and_worst(ranked)  # of two that are as low in rank, the one further off
    assert ([r.text for r in chosen.responses], chosen.pairs) == (["a", "c"], (Pair(0, 1, 4.0),))


def test_a_partial_order_keeps_a_pair_that_somebody_compared() -> None:
    ranked = (Response("a"), Response("b"), Response("c", 1), Response("d", 2))
    group = Group("g", (Turn("user", "?"),), (), ranked, (Pair(0, 2), Pair(1, 2), Pair(2, 3)), ())
    chosen = best_and_worst(group)  # nobody compared a or b with d
    assert named(chosen) == {("a", "c")}


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., PrepareOptions]:
    def make(rows: list[Any], mapping: dict[str, str] | None = None, **changes: Any) -> PrepareOptions:
        inputs = (write_rows(tmp_path / "in.jsonl", rows),)
        said = SourceOptions(mapping or {}, changes.pop("margin_column", None))
        defaults = {"source": "mapped", "inputs": inputs, "output": str(tmp_path / "out"), "source_options": said}
        return PrepareOptions(**{**defaults, **changes})

    return make


ROWS = [
    {"q": "One?", "a": ["x", "y", "z"], "s": [1, 3, 2.5], "r": [1, 2, 3]},
    {"q": "Two?", "a": ["x", "y"], "s": [1, 1.2]},
    {"q": "Three?", "a": ["x", "y"], "s": [2, 2]},
]


def test_scores_rank_what_has_no_ranks_only_when_a_gap_is_asked_for(options: Any, tmp_path: Path) -> None:
    report = prepare(options(ROWS, SCORED, output=str(tmp_path / "plain")))
    assert (report.pairs, report.stages) == (0, ())
    asked = options(ROWS, SCORED, gap=1.0)
    report = prepare(asked)
    groups = list(open_dataset(asked.output).groups())
    assert [named(group) for group in groups] == [{("y", "x"), ("z", "x")}, set(), set()]
    assert [[r.rank for r in group.responses] for group in groups] == [[0, 1, 2], [0, 1], [0, 0]]
    assert (report.pairs, report.without_pairs, report.margins) == (2, 2, (1.5, 1.75, 2.0))
    line = "--gap 1: 2 pairs that are closer are none; 1 groups lost all of theirs"
    assert report.stages == (line,)
    again = prepare(asked)
    assert again.reused
    assert f"stage      {line}" in again.lines()


def test_ranks_that_are_given_stay_and_the_gap_drops_pairs_of_theirs(options: Any) -> None:
    asked = options(ROWS[:1], {**SCORED, "rank": "r"}, gap=0.0)
    prepare(asked)
    (group,) = open_dataset(asked.output).groups()
    assert [r.text for r in group.responses] == ["x", "y", "z"]
    assert named(group) == {("y", "z")}  # the scores say the opposite of the other two


def test_a_row_without_all_its_scores_costs_only_itself(options: Any) -> None:
    bad = {"q": "Four?", "a": ["x", "y"], "s": [2, None]}
    rows = [*ROWS, bad]
    items = read_source("mapped", options(rows).inputs, SourceOptions(SCORED, by_score=True))
    groups, rejected, _ = sorted_out(items)
    assert len(groups) == 3
    assert rejected == {4: "1 of 2 responses have no score, by which they are ranked"}


def test_the_gap_is_part_of_what_a_dataset_is_made_of(options: Any) -> None:
    prepare(options(ROWS, SCORED, gap=1.0))
    with pytest.raises(ValueError, match="different: gap"):
        prepare(options(ROWS, SCORED, gap=2.0))
    with pytest.raises(ValueError, match="different: pairs"):
        prepare(options(ROWS, SCORED, gap=1.0, pairs="best_worst"))


def test_margins_of_rows_and_the_best_with_the_worst(options: Any) -> None:
    rows = [
        row(image=None, chosen="a", rejected="b", m=1),
        row(image=None, chosen="b", rejected="c", m=0.1),
        row(image=None, chosen="a", rejected="c", m=2),
    ]
    asked = options(rows, source="mm_rlhf", margin_column="m", gap=0.5, pairs="best_worst")
    report = prepare(asked)
    (group,) = open_dataset(asked.output).groups()
    assert [r.text for r in group.responses] == ["a", "c"]
    assert group.pairs == (Pair(0, 1, 2.0),)
    assert report.stages[1] == "--pairs best_worst: 1 other pairs and 1 other responses are left out"
    assert report.rows == 3


def test_a_gap_without_margins_prepares_nothing(options: Any) -> None:
    with pytest.raises(PrepareError, match=r"none of 1 rows became a group.*no score, and the pair no margin"):
        prepare(options([row(image=None)], source="mm_rlhf", gap=1.0))


def test_the_program(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", ROWS)
    out = str(tmp_path / "out")
    mapped = ["--source", "mapped", "--map", "prompt=q", "responses=a", "score=s"]
    command = [sys.executable, str(LAUNCH), "--input", file, "--output", out, *mapped, "--gap", "1"]
    done = subprocess.run([*command, "--pairs", "best_worst"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stage      --gap 1: 2 pairs" in done.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["pairs"] == 1


REFUSED = {
    "no scores mapped": ({"gap": 1.0}, "--gap needs scores"),
    "no margins": ({"source": "trl", "map": (), "gap": 1.0}, "--gap needs scores"),
    "negative": ({"map": ("prompt=q", "responses=a", "score=s"), "gap": -1.0}, "--gap -1.0 is not a number from 0 on"),
    "no number": ({"map": ("prompt=q", "responses=a", "score=s"), "gap": math.nan}, "--gap nan is not a number from"),
}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_options_without_a_use_are_refused(arguments: dict[str, Any], said: str) -> None:
    program = runpy.run_path(str(LAUNCH))
    base = {"source": "mapped", "input": ("in.jsonl",), "output": "out", "map": ("prompt=q", "responses=a")}
    with pytest.raises(UsageError, match=re.escape(said)):
        program["_options"](program["Arguments"](**{**base, **arguments}))

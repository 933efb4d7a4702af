"""The audit: what is doubtful of well-formed preferences, by hand and on the real annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import SHARED, picture, row, write_media, write_rows

from mmrlhf_jax.data.audit import audit, sign_test
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.sources import SOURCES
from mmrlhf_jax.data.sources.rows import Rejected, SourceOptions
from mmrlhf_jax.groups import Group, Media, Origin, Pair, Response, Turn

REAL = SHARED / "data" / "mm_reward_bench.jsonl"


def group(name: str, *texts: str, question: str = "What?", path: str = "a.png", pairs: Any = None) -> Group:
    """Texts from best to worst."""
    order = [(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts))] if pairs is None else pairs
    return Group(
        id=name,
        prompt=(Turn("user", question),),
        media=(Media("image", path),),
        responses=tuple(Response(text, rank) for rank, text in enumerate(texts)),
        pairs=tuple(Pair(i, j) for i, j in order),
        origins=(Origin("f", 1),),
    )


def test_pairs_that_differ_in_form_alone_and_answers_without_a_word():
    found = audit([group("a", "A dog.", "a  DOG"), group("b", "cat", "...", path="b.png"), group("c", "x", "y", "z!")])
    assert (found.alike.count, found.alike.ids) == (1, ("a",))
    assert (found.wordless.count, found.wordless.ids) == (1, ("b",))


def test_the_same_question_under_another_id_repeats_or_swaps_preferences():
    groups = [
        group("a", "good", "fair", "bad"),
        group("b", "good", "bad"),  # repeats one
        group("c", "bad", "good", "new"),  # swaps one; the pairs with new are new
        group("d", "bad", "good", path="b.png"),  # about another picture
        group("e", "bad", "good", question="Why?"),
    ]
    found = audit(groups)
    assert (found.asked_again.count, found.asked_again.ids) == (2, ("b", "c"))
    assert (found.repeated.ids, found.repeated.count) == (("b",), 1)
    assert (found.swapped.ids, found.swapped.count) == (("c",), 1)


def test_lengths_by_hand():
    """Pairs 3 > 1, 3 > 2, 1 < 2 of one group, 2 = 2 of another, 5 > 1 of a third: 3 of 5, in all pairs of one of three
    groups. Preferred 3, 3, 1, 2, 5: 2.8; others 1, 2, 2, 2, 1: 1.6. Of 4 uneven 3: (1 - .5) / 1 = .5 deviations."""
    groups = [
        group("a", "abc", "a", "ab"),
        group("b", "xy", "zz", path="b.png"),
        group("c", "abcde", "f", path="c.png"),
    ]
    found = audit(groups)
    assert (found.longer, found.longer_all) == (3 / 5, 1 / 3)
    assert (found.preferred_characters, found.other_characters) == (pytest.approx(2.8), pytest.approx(1.6))
    assert found.length_p == pytest.approx(0.617, abs=1e-3)


def test_the_sign_test_by_hand():
    """60 of 100: (10 - .5) / 5 = 1.9 deviations, 5.7 percent; 50 of 100: certain."""
    assert sign_test(60, 100) == pytest.approx(0.0574, abs=1e-4)
    assert sign_test(40, 100) == sign_test(60, 100)
    assert (sign_test(50, 100), sign_test(0, 0)) == (1, 1)


def test_what_reading_turned_away_is_counted_by_reason():
    origin = Origin("f", 1)
    gone = [Rejected(origin, "duplicate of f:1", True), Rejected(origin, "x"), Rejected(origin, "x")]
    assert audit([], gone).rejected == {"x": 2, "duplicate": 1}
    assert audit([]).longer is None


def test_lines_are_fit_for_a_terminal():
    lines = audit([group("a\x1b[31m", "A", "a")]).lines()
    assert "  1 pairs differ in case, spaces or punctuation alone (a[31m)" in lines


def test_a_prepared_dataset_is_audited(tmp_path: Path):
    media = write_media(tmp_path / "media", a=picture())
    rows = [row(id="a"), row(id="b", chosen="bad", rejected="good"), row(id="c", chosen="same", rejected="same")]
    options = PrepareOptions(
        source="mm_rlhf",
        inputs=(write_rows(tmp_path / "rows.jsonl", rows),),
        output=str(tmp_path / "prepared"),
        media=str(media),
        max_rejected=0.5,
    )
    report = prepare(options)
    found = audit(open_dataset(options.output).groups(), report.rejected)
    assert (found.groups, found.asked_again.count, found.swapped.count) == (2, 1, 1)
    assert found.rejected == {"'chosen' and 'rejected' are identical": 1}
    json.dumps(found.to_json())


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not here")
def test_on_the_real_annotations_the_longer_answer_wins_as_measured():
    """170 pairs in 46 groups: .718 of pairs and .478 of groups; nothing doubtful otherwise."""
    items = list(SOURCES["mm_rlhf"]([str(REAL)], SourceOptions()))
    found = audit([one for one in items if isinstance(one, Group)], [one for one in items if isinstance(one, Rejected)])
    assert (found.groups, found.pairs) == (46, 170)
    assert found.longer == pytest.approx(0.718, abs=5e-4)
    assert found.longer_all == pytest.approx(0.478, abs=5e-4)
    assert found.length_p < 1e-6
    assert (found.swapped.count, found.repeated.count, found.alike.count, found.wordless.count) == (0, 0, 0, 0)

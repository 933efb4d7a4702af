"""From rows to groups and back: who shares a group, what a row is scored with, and what refuses a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from data_samples import WordCounter, picture, write_media

from mmrlhf_jax.data.media import MediaRoot
from mmrlhf_jax.evaluation.comparisons import (
    BenchmarkError,
    Comparison,
    as_groups,
    check_lengths,
    check_reasons,
    cut_short,
    rewards_of,
    row_records,
    with_pictures,
)
from mmrlhf_jax.groups import Media, Origin


@dataclass(frozen=True)
class Said:
    score: tuple[float, ...]
    critiques: tuple[tuple[str, ...], ...]
    ended: tuple[tuple[bool, ...], ...] = ()


def comparison(line: int, chosen: str, rejected: str, **changes: object) -> Comparison:
    base = {"id": "q", "category": "mcq", "question": "What?", "media": (Media("image", "a.png"),)}
    base |= {"reasons": (f"why {chosen}", f"why {rejected}")}
    return Comparison(Origin("b.jsonl", line), chosen=chosen, rejected=rejected, **{**base, **changes})


ROWS = [
    comparison(1, "best", "good"),
    comparison(2, "best", "bad"),
    comparison(3, "good", "bad", id="another"),
    comparison(4, "good", "bad", reasons=("other words", "why bad")),
]


def shown(items, total):
    return items


def test_rows_of_one_question_are_one_group_and_an_answer_is_one_response():
    groups, places = as_groups(ROWS, human=False)
    assert [[response.text for response in group.responses] for group in groups] == [
        ["best", "good", "bad"],
        ["good", "bad"],
    ]
    assert [(p.group, p.chosen, p.rejected) for p in places] == [(0, 0, 1), (0, 0, 2), (1, 0, 1), (0, 1, 2)]
    assert {response.reason for group in groups for response in group.responses} == {None}
    assert groups[0].origins == tuple(ROWS[i].origin for i in (0, 1, 3))
    assert groups[0].prompt[0].text == "What?"


def test_with_human_critiques_every_row_is_scored_with_its_own():
    groups, places = as_groups(ROWS, human=True)
    assert [(r.text, r.reason) for r in groups[0].responses] == [
        ("best", "why best"),
        ("good", "why good"),
        ("bad", "why bad"),
        ("good", "other words"),
    ]
    assert (places[3].chosen, places[3].rejected) == (3, 2)


@pytest.mark.parametrize("apart", [{"id": "r"}, {"question": "Why?"}, {"media": ()}, {"media": (Media("video", "a"),)}])
def test_another_id_question_or_picture_is_another_group(apart):
    assert len(as_groups([ROWS[0], comparison(2, "best", "good", **apart)], human=False)[0]) == 2


def test_scores_come_back_to_their_rows():
    _, places = as_groups(ROWS, human=False)
    scored = [Said((3.0, 1.0, 2.0), (("a",), ("b", "c"), ("d",))), Said((0.5, 0.5), ((), ()))]
    np.testing.assert_array_equal(rewards_of(ROWS, places, scored), [[3, 1], [3, 2], [0.5, 0.5], [1, 2]])
    records = row_records(ROWS, places, scored)
    assert records[3] == {
        "id": "q",
        "line": 4,
        "category": "mcq",
        "lengths": [4, 3],
        "rewards": [1.0, 2.0],
        "right": False,
        "critiques": [["b", "c"], ["d"]],
    }
    assert [record["right"] for record in records] == [True, True, False, False]
    assert row_records(ROWS, places, None)[0] == {"id": "q", "line": 1, "category": "mcq", "lengths": [4, 4]}


def test_a_score_that_is_no_number_is_no_wrong_answer_but_an_error():
    _, places = as_groups(ROWS[:2], human=False)
    with pytest.raises(BenchmarkError, match=r"1 row cannot be scored: try --dtype float32\n  b.jsonl:2: .* nan"):
        rewards_of(ROWS[:2], places, [Said((1.0, 0.0, float("nan")), ((), (), ()))])


def test_critiques_that_were_cut_short_are_told():
    whole, cut = Said((), (), ((True, True), (True, True))), Said((), (), ((True, False),))
    assert cut_short([whole]) == []
    assert cut_short([whole, cut]) == ["1 of 6 critiques were cut short: raise --max-new-tokens"]


def test_missing_reasons_are_named_by_row():
    check_reasons(ROWS)
    rows = [*ROWS, comparison(5, "x", "y", reasons=("because", None)), comparison(6, "x", "y", reasons=(None, None))]
    with pytest.raises(BenchmarkError) as error:
        check_reasons(rows)
    assert str(error.value).split("\n") == [
        "2 rows cannot be scored: --critiques human scores with the file's own reasons; use generated or none",
        "  b.jsonl:5: no rejected_reason",
        "  b.jsonl:6: no chosen_reason",
        "  b.jsonl:6: no rejected_reason",
    ]


def test_rows_that_are_too_long_for_the_model_are_listed():
    renderer = WordCounter()
    renderer.max_positions = 6
    groups, _ = as_groups([ROWS[0], comparison(2, "a b c", "d", id="r")], human=False)  # 1 + 1 and 1 + 3 words
    check_lengths(groups, renderer, 2)
    with pytest.raises(
        BenchmarkError, match=r"^1 row cannot(.|\n)*takes 6 tokens(.|\n)*2: 7 tokens \(prompt 1, 3 to come"
    ):
        check_lengths(groups, renderer, 3)


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_come_from_their_root_or_from_the_rows(tmp_path: Path):
    media = MediaRoot(
        str(write_media(tmp_path / "media", a=picture(), clip__1=picture(), clip__2=picture(size=(7, 9))))
    )
    store = tmp_path / "store"
    store.mkdir()
    (store / "embedded:x").write_bytes(picture(size=(8, 6)))
    rows = [
        comparison(1, "a", "b"),
        comparison(2, "a", "b", id="r", media=(Media("video", "clip"),)),
        comparison(3, "a", "b", id="s", media=(Media("image", "embedded:x"),)),
        comparison(4, "a", "b", id="t", media=()),
    ]
    groups = with_pictures(as_groups(rows, human=False)[0], media, MediaRoot(str(store)), workers=2, progress=shown)
    assert [[m.sizes for m in group.media] for group in groups] == [
        [((40, 30),)],
        [((40, 30), (7, 9))],
        [((8, 6),)],
        [],
    ]
    assert groups[0].media[0].encoded == (picture(),)


def test_every_row_without_its_picture_is_listed(tmp_path: Path):
    media = write_media(tmp_path / "media", a=picture(), bad=picture()[:-30])
    rows = [
        ROWS[0],
        comparison(2, "a", "b", media=(Media("image", "bad.png"),)),
        comparison(3, "a", "b", media=(Media("image", "gone.png"),)),
        comparison(4, "a", "c", media=(Media("image", "gone.png"),)),
        comparison(5, "a", "b", media=(Media("image", "../a.png"),)),
    ]
    with pytest.raises(BenchmarkError) as error:
        with_pictures(
            as_groups(rows, human=False)[0], MediaRoot(str(media)), MediaRoot(str(media)), workers=2, progress=shown
        )
    lines = str(error.value).split("\n")
    assert lines[0].startswith("4 rows cannot be scored: put the pictures there (--media is the root of all paths)")
    assert [line.split(": ")[0] for line in lines[1:]] == [f"  b.jsonl:{line}" for line in (2, 3, 4, 5)]
    assert "'bad.png': picture cannot be decoded" in lines[1]
    assert "'gone.png' is not under the media root" in lines[2]
    assert "leaves the media root" in lines[4]


def test_named_pictures_need_a_root(tmp_path: Path):
    groups, _ = as_groups(ROWS, human=False)
    with pytest.raises(
        BenchmarkError, match=r"the rows name pictures or videos \('a.png'\): give their root with --media"
    ):
        with_pictures(groups, None, MediaRoot(str(tmp_path)), workers=1, progress=shown)


def test_a_long_list_of_bad_rows_is_cut_short():
    rows = [comparison(line, "a", "b", reasons=("x", None)) for line in range(1, 31)]
    with pytest.raises(BenchmarkError, match=r"30 rows cannot(.|\n)*b.jsonl:20: .*\n  ... and 10 more$"):
        check_reasons(rows)

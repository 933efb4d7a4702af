"""Rows with the columns of VLFeedback's data card, as its JSON lines and as `datasets` stores them in parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_samples import embedded, picture, sorted_out, write_parquet, write_rows
from etils import epath

from mmrlhf_jax.data.sources import read_source
from mmrlhf_jax.data.sources.pictures import PictureStore
from mmrlhf_jax.data.sources.rows import SourceError, SourceOptions
from mmrlhf_jax.data.sources.vlfeedback import TWICE, UNRATED
from mmrlhf_jax.groups import Media, Pair, Turn

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "data" / "vlfeedback_golden.json").read_text())

_RATED = pa.struct([("Rating", pa.string()), ("Rationale", pa.string())])
_ANNOTATIONS = pa.struct([(name, _RATED) for name in ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("models", pa.list_(pa.string())),
        (
            "completions",
            pa.struct(
                [
                    ("annotations", pa.list_(_ANNOTATIONS)),
                    ("model", pa.list_(pa.string())),
                    ("response", pa.list_(pa.string())),
                ]
            ),
        ),
        ("img_path", pa.string()),
    ]
)


def rated(helpful: Any, faithful: Any, ethical: Any, why: str = "Why.") -> dict[str, Any]:
    ratings = {"Helpfulness": helpful, "Ethical Considerations": ethical, "Visual Faithfulness": faithful}
    return {name: {"Rating": rating, "Rationale": why} for name, rating in ratings.items()}


def completion(response: Any, *ratings: Any, **fields: Any) -> dict[str, Any]:
    return {"response": response, "model": "m", "annotations": rated(*ratings), **fields}


GOOD = [completion("good", "5", "4", "5"), completion("bad", "1", "2", "3")]


def row(**fields: Any) -> dict[str, Any]:
    base = {"id": "q", "prompt": "What?", "models": ["m", "m"], "completions": GOOD}
    return {key: value for key, value in {**base, **fields}.items() if value is not None}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(lines: list[Any], schema: Any = None, **options: Any) -> Any:
        file = tmp_path / ("in.jsonl" if schema is None else "in.parquet")
        path = write_rows(file, lines) if schema is None else write_parquet(file, lines, schema)
        store = PictureStore(epath.Path(tmp_path / "store"))
        return sorted_out(read_source("vlfeedback", [path], SourceOptions(store=store, **options)))

    return read


@pytest.mark.parametrize("schema", [SCHEMA, None], ids=["parquet", "json lines"])
def test_pairs_are_silkie_s(read: Any, schema: Any) -> None:
    lines = GOLDEN["rows"]
    if schema is None:  # the released JSON lines have a list of objects
        lines = [
            {
                **line,
                "completions": [
                    dict(zip(line["completions"], each, strict=True))
                    for each in zip(*line["completions"].values(), strict=True)
                ],
            }
            for line in lines
        ]
    groups, rejected, remarks = read(lines, schema)
    assert rejected == {}
    ours = {
        (group.prompt[0].text, group.responses[pair.chosen].text, group.responses[pair.rejected].text)
        for group in groups
        for pair in group.pairs
    }
    assert ours == {tuple(pair) for pair in GOLDEN["pairs"]}
    assert len(ours) == len(GOLDEN["pairs"]) == 42
    assert remarks == {UNRATED: sum("N/A" in json.dumps(line) for line in lines)}
    assert [group.media for group in groups] == [(Media("image", f"{line['id']}.jpg"),) for line in lines]


def test_scores_are_means_and_reasons_all_three(read: Any) -> None:
    tied = completion("as good", 4, 5.0, "5", annotations=rated(4, 5.0, "5", why=" "))
    (group,), rejected, remarks = read([row(completions=[*GOOD[::-1], tied])])
    assert rejected == remarks == {}
    assert (group.id, group.prompt) == ("q", (Turn("user", "What?"),))
    assert [(r.text, r.rank, r.score) for r in group.responses] == [
        ("good", 0, 14 / 3),
        ("as good", 0, 14 / 3),
        ("bad", 1, 2.0),
    ]
    assert group.pairs == (Pair(0, 2), Pair(1, 2))
    assert group.margin(group.pairs[0]) == 14 / 3 - 2
    assert group.ties == ((0, 1),)
    why = "Helpfulness: Why.\nVisual Faithfulness: Why.\nEthical Considerations: Why."
    assert [r.reason for r in group.responses] == [why, None, why]


def test_where_the_picture_is(read: Any) -> None:
    a = picture()
    lines = [
        row(id="1"),
        row(id="2", img_path="/home/.cache/extracted/ab/merged_images/2.jpg"),
        row(id="3", img_path="pictures/three.png"),
        row(id="4", image={"bytes": a, "path": "x.jpg"}, img_path="4.jpg"),
        row(id="5", img_path="/home/other.jpg"),
    ]
    lines = [{**line, "image": line.get("image")} for line in lines]
    paths = [Media("image", name) for name in ("1.jpg", "2.jpg", "pictures/three.png")]
    groups, rejected, _ = read([*json.loads(json.dumps(lines[:3])), lines[4]])
    assert rejected == {}
    assert [g.media[0] for g in groups] == [*paths, Media("image", "/home/other.jpg")]  # refused with all absolute ones
    schema = SCHEMA.append(pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    as_lists = {"annotations": [rated("5", "5", "5")], "model": ["m"], "response": ["good"]}
    (group,), rejected, _ = read([{**lines[3], "completions": as_lists}], schema)
    assert (group.media, rejected) == ((embedded(a),), {})


def test_unrated_answers_are_left_out_and_those_rated_twice_averaged(read: Any) -> None:
    more = [
        completion("no", "N/A", "4", "5"),
        completion("none", "4", "4", None),
        {"response": "bare", "annotations": None},
        completion("bad", "2", "3", "4", why="Again."),
    ]
    groups, rejected, remarks = read([row(completions=GOOD + more), row(id="r", completions=more[:3])])
    assert [(r.text, r.score) for r in groups[0].responses] == [("good", 14 / 3), ("bad", 2.5)]
    assert groups[0].responses[1].reason.startswith("Helpfulness: Why.")
    assert rejected == {2: "none of its completions has three ratings"}
    assert remarks == {UNRATED: 1, TWICE: 1}


def test_the_same_row_twice_is_a_duplicate_and_the_same_id_is_not(read: Any) -> None:
    groups, rejected, _ = read([row(), row(prompt="Why?"), row()])
    assert [group.prompt[0].text for group in groups] == ["What?", "Why?"]
    assert list(rejected) == [3]
    assert rejected[3].startswith("duplicate of")


HELPFUL = {"Rating": "5", "Rationale": "a"}
BAD = {
    "no id": (row(id=None), "'id' is null, a string was expected"),
    "no prompt": (row(prompt=None), "'prompt' is null, a string was expected"),
    "no completions": (row(completions=None), "'completions' is not a list of at least one completion"),
    "empty completions": (row(completions=[]), "'completions' is not a list of at least one completion"),
    "completions of texts": (row(completions=["a"]), "'completions' is not a list of objects with 'annotations' and"),
    "columns that are none": (row(completions={"response": ["a"]}), "'completions' is an object, and 'annotations'"),
    "columns of two lengths": (
        row(completions={"annotations": [], "response": ["a"]}),
        "'completions' have 0 annotations of 1 responses",
    ),
    "empty answer": (row(completions=[completion(" ", "1", "1", "1")]), "completion 1: 'response' is empty"),
    "annotations as text": (
        row(completions=[completion("a", 1, 1, 1, annotations="5")]),
        "completion 1: 'annotations' is not an object with Helpfulness, Visual Faithfulness, Ethical Considerations",
    ),
    "another aspect": (
        row(completions=[completion("a", 1, 1, 1, annotations={**rated(1, 1, 1), "Honesty": HELPFUL})]),
        "completion 1: 'annotations' rate 'Honesty'; they rate Helpfulness, Visual Faithfulness",
    ),
    "an aspect as a number": (
        row(completions=[completion("a", 1, 1, 1, annotations={"Helpfulness": 5})]),
        "completion 1: 'Helpfulness' is not an object with 'Rating' and 'Rationale'",
    ),
    "out of range": (
        row(completions=[*GOOD, completion("a", "5", "6", "5")]),
        "completion 3: the rating of 'Visual Faithfulness' is '6', not from 1 to 5",
    ),
    "not a number": (row(completions=[completion("a", "5", "nan", "5")]), "completion 1: the rating of 'Visual Fai"),
    "a list": (row(completions=[completion("a", ["5"], "5", "5")]), "completion 1: the rating of 'Helpfulness' is no"),
    "too many": (row(completions=[completion(str(i), 1, 1, 1) for i in range(300)]), "300 completions, more than 256"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_costs_only_itself(read: Any, bad: Any, reason: str) -> None:
    groups, rejected, _ = read([row(id="before"), bad, row(id="after")])
    assert [group.id for group in groups] == ["before", "after"]
    assert list(rejected) == [2]
    assert rejected[2].startswith(reason)


def test_options_without_a_use_are_refused(read: Any) -> None:
    with pytest.raises(SourceError, match="vlfeedback has fixed columns"):
        read([row()], mapping={"prompt": "q"})
    with pytest.raises(SourceError, match="vlfeedback's margins are those of its scores"):
        read([row()], margin_column="m")

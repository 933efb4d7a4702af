"""Files with the columns that the data cards of RLAIF-V-Dataset and RLHF-V-Dataset list."""

from __future__ import annotations

import base64
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
from mmrlhf_jax.groups import Media, Pair, Turn

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def schema(*texts: str) -> pa.Schema:
    strings = ("ds_name", *texts, "origin_dataset", "origin_split", "image_path")
    return pa.schema([("image", IMAGE), ("idx", pa.int64()), *((name, pa.string()) for name in strings)])


RLAIF_V, RLHF_V = schema("question", "chosen", "rejected"), schema("text")
A, B = picture(), picture(size=(7, 9))


def row(idx: int, **fields: Any) -> dict[str, Any]:
    base = {
        "ds_name": "RLAIF-V",
        "image": {"bytes": A, "path": "x.jpg"},
        "question": "What?",
        "chosen": "good",
        "rejected": "bad",
        "origin_dataset": "OK-VQA",
        "origin_split": '{"model": "llava"}',
        "idx": idx,
        "image_path": "x.jpg",
    }
    return {key: value for key, value in {**base, **fields}.items() if value is not None}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(lines: list[Any], schema: Any = None, **options: Any) -> Any:
        file = tmp_path / ("in.jsonl" if schema is None else "in.parquet")
        path = write_rows(file, lines) if schema is None else write_parquet(file, lines, schema)
        store = PictureStore(epath.Path(tmp_path / "store"))
        return sorted_out(read_source("rlhf_v", [path], SourceOptions(store=store, **options)))

    return read


def test_rows_of_the_same_question_and_picture_are_one_group(read: Any) -> None:
    lines = [
        row(0),
        row(1, image={"bytes": B, "path": "x.jpg"}),
        row(2, question="Why?"),
        row(3, chosen="best", rejected="good", image={"bytes": A, "path": "another name.jpg"}),
    ]
    groups, rejected, remarks = read(lines, RLAIF_V)
    assert rejected == remarks == {}
    assert [(g.id, g.prompt, g.media) for g in groups] == [
        ("0", (Turn("user", "What?"),), (embedded(A),)),
        ("1", (Turn("user", "What?"),), (embedded(B),)),
        ("2", (Turn("user", "Why?"),), (embedded(A),)),
    ]
    assert [(r.text, r.rank) for r in groups[0].responses] == [("best", 0), ("good", 1), ("bad", 2)]
    assert groups[0].pairs == (Pair(0, 1), Pair(1, 2))
    assert [origin.line for origin in groups[0].origins] == [1, 4]


def test_rlhf_v_keeps_the_texts_in_one_json_column(read: Any) -> None:
    def line(idx: int, text: Any) -> dict[str, Any]:
        return row(idx, text=text, question=None, chosen=None, rejected=None)

    texts = {"question": "What?", "chosen": "good", "rejected": "bad"}
    lines = [line(0, json.dumps(texts)), line(1, '{"question": '), line(2, json.dumps({**texts, "rejected": None}))]
    (group,), rejected, _ = read([*lines, line(3, "[]"), line(4, '{"a": 1, "a": 2}')], RLHF_V)
    assert (group.prompt, group.media) == ((Turn("user", "What?"),), (embedded(A),))
    assert [r.text for r in group.responses] == ["good", "bad"]
    assert rejected == {
        2: "'text' is invalid JSON: Expecting value at character 13",
        3: "column 'rejected' is missing; there are chosen, question, rejected",
        4: "'text': row is a list, an object was expected",
        5: "'text': key 'a' appears twice",
    }


def test_json_lines_name_the_picture_or_hold_it(read: Any) -> None:
    text = base64.b64encode(A).decode()
    lines = [
        row(0, image={"bytes": text}),
        row(1, image=f"data:image/png;base64,{text}", chosen="best"),
        row(2, image="a.png"),
        row(3, image=None, image_path="b.png"),
    ]
    groups, rejected, _ = read(lines)
    assert rejected == {}
    assert [g.media for g in groups] == [(embedded(A),), (Media("image", "a.png"),), (Media("image", "b.png"),)]


BAD = {
    "no picture": (row(9, image=None, image_path=None), "the row has neither 'image' nor 'image_path'"),
    "empty answer": (row(9, chosen=""), "'chosen' is empty"),
    "identical": (row(9, rejected="good"), "'chosen' and 'rejected' are identical"),
    "no question": (row(9, question=None), "column 'question' is missing"),
    "no bytes": (row(9, image={"bytes": b"", "path": "x"}), "'image'.bytes is empty"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_costs_only_itself(read: Any, bad: Any, reason: str) -> None:
    groups, rejected, _ = read([row(0, question="before"), bad, row(1, question="after")], RLAIF_V)
    assert [group.id for group in groups] == ["0", "1"]
    assert list(rejected) == [2]
    assert rejected[2].startswith(reason)


def test_texts_in_both_forms_are_refused(read: Any) -> None:
    _, rejected, _ = read([row(0, text="{}", image="a.png")])
    assert rejected == {1: "both 'text' and 'question' are set: keep one"}


def test_map_is_refused(read: Any) -> None:
    with pytest.raises(SourceError, match="rlhf_v has fixed columns"):
        read([row(0)], RLAIF_V, mapping={"question": "q"})

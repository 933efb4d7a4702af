from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import row, sorted_out, write_parquet, write_rows

from mmrlhf_jax.data.sources import parquet, read_source
from mmrlhf_jax.data.sources import rows as rows_module
from mmrlhf_jax.data.sources.rows import Rejected, Row, SourceError, read_rows
from mmrlhf_jax.groups import Origin


def lines(*files: str) -> Iterator[Row | Rejected]:
    return read_rows(files)


def test_rows_are_numbered_through_all_row_groups(tmp_path: Path) -> None:
    rows = [{"n": i, "nested": {"texts": [str(i), None]}, "data": bytes([i])} for i in range(10)]
    file = write_parquet(tmp_path / "in.parquet", rows, row_group_size=3)
    assert list(lines(file)) == [Row(Origin(file, i + 1), fields) for i, fields in enumerate(rows)]


def test_parquet_and_json_lines_read_alike(tmp_path: Path) -> None:
    rows = [row(), row(chosen="best", is_tie=True), row(chosen=" "), row(id="r", image=None)]
    from_json = sorted_out(read_source("mm_rlhf", [write_rows(tmp_path / "in.jsonl", rows)]))
    from_parquet = sorted_out(read_source("mm_rlhf", [write_parquet(tmp_path / "in.parquet", rows)]))
    assert [(g.id, g.media, g.responses, g.pairs) for g in from_parquet[0]] == [
        (g.id, g.media, g.responses, g.pairs) for g in from_json[0]
    ]
    assert from_parquet[1:] == from_json[1:]


def test_a_bad_row_costs_only_itself(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"bad \xff", b"nul \0", b"good"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 4, texts.buffers())
    file = str(tmp_path / "in.parquet")
    pq.write_table(pa.table({"text": broken}), file)
    found = {item.origin.line: item.reason if isinstance(item, Rejected) else item.fields for item in lines(file)}
    assert found == {
        1: {"text": "good"},
        2: "not UTF-8 at byte 4 of a text",
        3: "NUL character in text",
        4: {"text": "good"},
    }


def test_a_text_too_long_for_a_row_is_passed_over_and_a_picture_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 200)
    rows = [{"texts": ["x" * 150, "y" * 51], "data": b""}, {"texts": ["x"], "data": b"z" * 300}]
    first, second = lines(write_parquet(tmp_path / "in.parquet", rows))
    assert first == Rejected(Origin(str(tmp_path / "in.parquet"), 1), "texts of the row are over 200 characters")
    assert isinstance(second, Row)


def test_a_large_row_group_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, count = 2**18, 120
    rows = ({"image": {"bytes": bytes([i]) * size, "path": str(i)}} for i in range(count))
    file = write_parquet(
        tmp_path / "in.parquet", list(rows), compression="none", use_dictionary=False, write_batch_size=4
    )
    monkeypatch.setattr(parquet, "BATCH_BYTES", 8 * size)
    before, most = pa.total_allocated_bytes(), 0
    for number, item in enumerate(lines(file)):
        assert isinstance(item, Row)
        assert item.fields["image"]["bytes"][:1] == bytes([number])
        most = max(most, pa.total_allocated_bytes() - before)
    assert number + 1 == count
    assert most < 20 * size  # a row group is 120, a page 4


@pytest.mark.parametrize("damage", ["empty", "json", "cut", "inside"])
def test_a_broken_file_is_refused_whole(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "in.parquet"
    write_parquet(file, [{"text": str(i) * 1000} for i in range(100)], row_group_size=50, compression="snappy")
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(
        {"empty": b"", "json": b'{"a": 1}\n' * 9, "cut": whole[:-20]}.get(
            damage, whole[: middle - 100] + b"\xff" * 200 + whole[middle + 100 :]
        )
    )
    with pytest.raises(SourceError, match=r"in\.parquet: .*not a whole parquet file"):
        list(lines(str(file)))


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "in.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    with pytest.raises(SourceError, match="two columns have the same name: rename one"):
        list(lines(file))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "in.parquet", [{"a": 1}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"parquet needs pyarrow: pip install 'mmrlhf-jax\[parquet\]'"):
        list(lines(file))


def test_what_no_format_expects_is_rejected_by_name(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [row(prompt=None) | {"prompt": b"bytes"}]
    _, rejected, _ = sorted_out(read_source("mm_rlhf", [write_parquet(tmp_path / "in.parquet", rows)]))
    assert rejected == {1: "'prompt' is bytes, a string was expected"}

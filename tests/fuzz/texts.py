"""Rows of texts: every format of preferences, as JSON and as parquet.

Names as in `readers`.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import corpus
import mutate
from etils import epath

from mmrlhf_jax.data.sources import read_source
from mmrlhf_jax.data.sources.pictures import PictureStore
from mmrlhf_jax.data.sources.rows import Rejected, Remark, SourceOptions, read_rows
from mmrlhf_jax.groups import Group

Made = dict[str, Any]


@dataclass
class Rows:
    folder: Path
    rows: list[Any]
    store: Any
    root: Path | None = None
    tables: list[bytes] = field(default_factory=list)


def classed(message: str) -> str:
    """A message without what differs from row to row."""
    message = re.sub(r"other settings \(.*", "other settings (…)", message, flags=re.DOTALL)
    message = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'…'", message, flags=re.DOTALL)
    message = re.sub(r"/\S*?(?=[:\s]|$)", "PATH", message)
    return re.sub(r"-?\d[\d.e+]*", "N", " ".join(message.split()))[:70]


def rows_at(name: str, media_too: bool = False) -> Callable[[Path], Rows]:
    def start(folder: Path) -> Rows:
        root = corpus.media_root(folder) if media_too else None
        return Rows(folder, corpus.text_rows()[name], PictureStore(epath.Path(folder) / "pictures"), root)

    return start


def spoiled_rows(rng: Random, state: Rows) -> Made:
    rows = corpus.some(rng, state.rows)
    if rng.random() < 0.8:
        at = rng.randrange(len(rows))
        rows[at] = mutate.mutated(rng, rows[at], rng.choice((1, 1, 1, 2, 3)))
    data = mutate.json_file(rng, rows)
    if rng.randrange(4_000) == 0:  # a line of 100 MB
        data += b'{"id": "' + b"x" * 100 * 2**20 + b'"}\n'
    name = rng.choice(("in.jsonl", "in.jsonl", "in.json"))
    (state.folder / name).write_bytes(data)
    return {
        "file": str(state.folder / name),
        "lines": _lines(data) if name == "in.jsonl" else None,
        "rng": rng.random(),
    }


def _lines(data: bytes) -> int:
    """Rows there must be an account of: lines with anything in them."""
    return sum(bool(line.strip()) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


def source(name: str, *choices: SourceOptions) -> Callable[[Rows, Made], Iterable[str]]:
    def run(state: Rows, made: Made) -> Iterable[str]:
        options = choices[int(made["rng"] * len(choices))]
        store = None if made["rng"] < 0.02 else state.store
        items = list(read_source(name, [made["file"]], dataclasses.replace(options, store=store)))
        for item in items:
            if isinstance(item, Rejected):
                assert len(item.reason) < 2_000, "a reason as long as its row"
                yield f"rejected: {classed(item.reason)}"
            elif isinstance(item, Remark):
                yield "remark"
            else:
                check_group(item)
                yield "accepted"
        origins = [o.line for i in items if isinstance(i, Group) for o in i.origins]
        origins += [i.origin.line for i in items if isinstance(i, Rejected)]
        assert made["lines"] is None or made["lines"] == len(origins) == len(set(origins)), "a row without an account"

    return run


def check_group(group: Group) -> None:
    """What every later stage relies on."""
    assert Group.from_json(group.to_json()) == group
    for text in (group.id, *(turn.text for turn in group.prompt), *(r.text for r in group.responses)):
        text.encode()
        assert "\0" not in text
    for pair in group.pairs:
        assert group.responses[pair.chosen].rank < group.responses[pair.rejected].rank
    group.content_hash()


_MARGIN = SourceOptions(margin_column="margin")
_MAP = {"prompt": "q", "responses": "a"}
_FULL = {**_MAP, "rank": "r", "score": "s", "reason": "why", "image": "pic", "video": "clip", "id": "n.id"}
_PLAIN = SourceOptions()

SOURCES: tuple[tuple[str, tuple[str, ...], tuple[SourceOptions, ...]], ...] = (
    (
        "mm_rlhf",
        (
            "data/sources/mm_rlhf",
            "data/sources/pairs",
            "data/sources/pictures:PictureStore,media_of,_check_count,video_of,picture_of,_path_of,_base64,_put,_too_large",
            "data/ranking",
        ),
        (_PLAIN, _PLAIN, _MARGIN),
    ),
    (
        "trl",
        (
            "data/sources/trl",
            "data/sources/conversation:role_of,marked,of_parts,messages_of,_message,placed,check_prompt,answer_of,place",
            "data/sources/pictures:pictures_of,videos_of,_listed",
        ),
        (_PLAIN, _PLAIN, _PLAIN, _MARGIN),
    ),
    (
        "sharegpt",
        ("data/sources/sharegpt", "data/sources/conversation:check_alternate"),
        (
            _PLAIN,
            _PLAIN,
            _MARGIN,
            SourceOptions({"id": "id", "system_tag": "system"}),
            SourceOptions({"messages": "messages", "role_tag": "role", "content_tag": "content"}),
        ),
    ),
    ("rlhf_v", ("data/sources/rlhf_v",), (_PLAIN, _MARGIN)),
    ("ms_swift", ("data/sources/ms_swift",), (_PLAIN, _PLAIN, _MARGIN)),
    ("vlfeedback", ("data/sources/vlfeedback",), (_PLAIN,)),
    (
        "mapped",
        ("data/sources/mapped",),
        (
            SourceOptions(_FULL),
            SourceOptions(_MAP),
            SourceOptions({**_MAP, "image": "pic"}),
            SourceOptions({**_MAP, "text": "t", "rank": "r", "score": "s"}),
            SourceOptions({**_MAP, "text": "t", "rank": "/r"}),
            SourceOptions({**_MAP, "ratings": "by", "facts": "known"}),
            SourceOptions({**_MAP, "text": "t", "ratings": "by", "facts": "known"}),
            SourceOptions({**_MAP, "score": "s"}, by_score=True),
        ),
    ),
)
"""Format, what it covers, the options it is read with."""


def rows_of_all(folder: Path) -> Rows:
    state = rows_at("mm_rlhf")(folder)
    every = corpus.text_rows()
    state.rows = [row for name, *_ in SOURCES for row in every[name]]
    return state


def spoiled_any(rng: Random, state: Rows) -> Made:
    """As JSON, or as parquet where it can be written as that."""
    import pyarrow as pa

    if rng.random() < 0.7:
        return spoiled_rows(rng, state)
    rows = [row if rng.random() < 0.5 else mutate.mutated(rng, row, 1) for row in corpus.some(rng, state.rows)]
    try:
        data = _table(pa.Table.from_pylist(rows))
    except Exception:  # values of several kinds, keys that are no text: it cannot be written
        return spoiled_rows(rng, state)
    (state.folder / "in.parquet").write_bytes(data)
    return {"file": str(state.folder / "in.parquet"), "lines": None, "rng": rng.random()}


def read_any(state: Rows, made: Made) -> Iterable[str]:
    """Rows of one format in a file of another too: whatever the rows are, they are read alike."""
    name, _, choices = SOURCES[int(made["rng"] * 1e6) % len(SOURCES)]
    file = made["file"] if made["rng"] > 0.02 else str(state.folder / ("gone" if made["rng"] < 0.01 else "pictures"))
    return source(name, *choices)(state, {**made, "file": file})


def read_parquet(state: Rows, made: Made) -> Iterable[str]:
    for row in read_rows([made["file"]]):
        yield f"rejected: {classed(row.reason)}" if isinstance(row, Rejected) else "row"


def parquet_at(folder: Path) -> Rows:
    import pyarrow as pa

    state = rows_at("mm_rlhf")(folder)
    texts = pa.array(["What?", None, "w" * 50])
    columns = {
        "id": texts,
        "n": pa.array([1, 2, None]),
        "f": pa.array([1.0, float("nan"), float("inf")]),
        "b": pa.array([b"x", b"", None]),
        "image": pa.array([{"bytes": b"x", "path": "a"}, None, {"bytes": None, "path": "b"}]),
        "l": pa.array([["a", None], [], None]),
        "d": texts.dictionary_encode(),
        "t": pa.array([0, 10**12, None], pa.timestamp("s", tz="Europe/Paris")),
        "m": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        "x": pa.array([1, 2, 3], pa.decimal128(5, 1)),
        "deep": pa.array([[[[["a"]]]], None, []]),
        "u": pa.array([b"0123456789abcdef"] * 3, pa.uuid()),
        "day": pa.array([0, 2**31 - 1, None], pa.date32()),
        "zone": pa.array([0, 1, 2], pa.timestamp("us", tz="Foo/Bar")),
        "dur": pa.array([1, 2, 3], pa.duration("us")),
        "time": pa.array([1, 2, 3], pa.time64("us")),
    }
    state.rows = list(columns.items())
    state.tables = [
        _table(dict(state.rows[i : i + 3]), **how) for i in range(0, len(state.rows), 3) for how in _COMPRESSED
    ]
    state.tables.append(_table(pa.Table.from_arrays([texts, texts], names=["id", "id"])))
    return state


_COMPRESSED: tuple[dict[str, Any], ...] = (
    {"compression": "none"},
    {"compression": "snappy"},
    {"compression": "zstd", "version": "1.0"},
    {"use_dictionary": False, "compression": "gzip", "data_page_version": "2.0"},
    {"row_group_size": 1, "write_page_checksum": True},
)


def _table(columns: Any, **how: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), buffer, **how)
    return buffer.getvalue()


def spoiled_parquet(rng: Random, state: Rows) -> Made:
    import pyarrow as pa

    path = state.folder / "in.parquet"
    if rng.random() < 0.2:
        columns = dict(rng.sample(state.rows, 3))
        if rng.random() < 0.5:
            name = mutate.hostile_text(rng)[:200]
            columns[name] = pa.array(
                [t if "\0" not in t else "nul\0" for t in (mutate.hostile_text(rng) for _ in range(3))]
            )
        data = _table(columns, **rng.choice(_COMPRESSED))
    else:
        data = rng.choice(state.tables)
    if rng.random() < 0.85:
        data = mutate.mutated_bytes(rng, data, state.tables)
    if rng.random() < 0.5 and len(data) > 8:  # the footer is where all the numbers are
        at = max(0, len(data) - 8 - rng.randrange(1, 600))
        data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    path.write_bytes(data)
    return {"file": str(path)}

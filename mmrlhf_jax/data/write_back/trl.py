"""TRL's conversational preference format, as parquet that `datasets.load_dataset(DIRECTORY)` reads with its pictures.

Columns: `prompt`, `chosen`, `rejected`, lists of messages `{role, content}` whose content is a list of parts `{type,
text}`; `images`, `datasets`' Image structs with the encoded bytes, where any group has a picture; `margin` where every
pair has one. Image parts stand before the text of their turn, as many as the turn has pictures. TRL has no column of
videos.

Source: TRL 1.16, docs/source/dataset_formats and DataCollatorForVisionPreference in trl/trainer/dpo_trainer.py;
`datasets`, the schema metadata "huggingface" that says which columns are pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmrlhf_jax.command import progress_line
from mmrlhf_jax.data.datasets import Dataset
from mmrlhf_jax.data.write_back.selection import Chosen, WriteBackError, pairs_in
from mmrlhf_jax.groups import Group

FILE = "train.parquet"
ROW_GROUP_BYTES = 64 * 2**20  # about what is held at once, and what a reader has to hold
ROW_GROUP_ROWS = 1000


def problem(group: Group) -> str | None:
    """Why the group cannot be rows of TRL's."""
    return None


def write(dataset: Dataset, chosen: Chosen, directory: Path, progress: bool) -> None:
    """Write the chosen rows of `dataset` as `directory`/train.parquet.

    Raises:
        WriteBackError: pyarrow is not there.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise WriteBackError("parquet needs pyarrow: pip install 'mmrlhf-jax[parquet]'") from error
    schema = _schema(pa, chosen)
    # A picture stands in as many rows as its group has pairs: as a dictionary a row group holds it once.
    options = {"compression": "zstd", "dictionary_pagesize_limit": ROW_GROUP_BYTES}
    with pq.ParquetWriter(directory / FILE, schema, **options) as writer:
        rows, held = list[dict[str, Any]](), 0
        for number in progress_line(chosen.rows, desc="writing", unit="group", disable=not progress):
            for row, size in _rows(dataset.with_media(number), chosen):
                rows.append(row)
                held += size
                if held >= ROW_GROUP_BYTES or len(rows) >= ROW_GROUP_ROWS:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows, held = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _rows(group: Group, chosen: Chosen) -> Iterator[tuple[dict[str, Any], int]]:
    """The group's pairs as rows, and the bytes of each."""
    pictures = [{"bytes": media.encoded[0], "path": None} for media in group.media]
    counts = group.media_before()
    prompt = [_message(turn.role, turn.text, count) for turn, count in zip(group.prompt, counts, strict=True)]
    size = sum(len(picture["bytes"] or b"") for picture in pictures) + sum(len(turn.text) for turn in group.prompt)
    for pair in pairs_in(group):
        row: dict[str, Any] = {
            "prompt": prompt,
            "chosen": [_message("assistant", pair.chosen)],
            "rejected": [_message("assistant", pair.rejected)],
        }
        if chosen.media:
            row["images"] = pictures
        if chosen.margins:
            row["margin"] = pair.margin
        yield row, size + len(pair.chosen) + len(pair.rejected)


def _message(role: str, text: str, pictures: int = 0) -> dict[str, Any]:
    parts = [{"type": "image", "text": None}] * pictures
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def _schema(pa: Any, chosen: Chosen) -> Any:
    text = {"dtype": "string", "_type": "Value"}
    said = [{"role": text, "content": [{"type": text, "text": text}]}]
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    fields = [(name, message) for name in ("prompt", "chosen", "rejected")]
    features: dict[str, Any] = {name: said for name, _ in fields}
    if chosen.media:
        fields.append(("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))))
        features["images"] = [{"_type": "Image"}]
    if chosen.margins:
        fields.append(("margin", pa.float64()))
        features["margin"] = {"dtype": "float64", "_type": "Value"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})

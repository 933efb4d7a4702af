"""RLAIF-V-Dataset and RLHF-V-Dataset: one pair about one picture a row, as parquet or JSON lines.

Columns read: `image` (see `pictures`; in the released parquet files a struct with the bytes) or, without it,
`image_path`; `question`, `chosen`, `rejected`, or `text`, a JSON string with these three, as RLHF-V-Dataset writes it;
`idx`; and the margin column the user names. Rows of the same question and picture are one group.

Source: the data cards of openbmb/RLAIF-V-Dataset and openbmb/RLHF-V-Dataset on the Hugging Face hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mmrlhf_jax.data.sources.pairs import PairRow, check_different, margin_of, read_pairs
from mmrlhf_jax.data.sources.pictures import picture_of
from mmrlhf_jax.data.sources.rows import (
    Item,
    Row,
    RowError,
    SourceError,
    SourceOptions,
    id_of,
    parse_object,
    prompt_of,
    text_of,
)
from mmrlhf_jax.groups import Turn

TEXTS = ("question", "chosen", "rejected")
COLUMNS = ("image", "image_path", *TEXTS, "text", "idx", "ds_name", "origin_dataset", "origin_split")


def read(files: Sequence[str], options: SourceOptions) -> Iterator[Item]:
    """Groups in order of their first row; `Rejected` rows; `Remark`s at the end.

    Raises:
        SourceError: the margin column is in no row, or `--map` was given.
    """
    if options.mapping:
        raise SourceError("--map belongs to --source mapped and sharegpt; rlhf_v has fixed columns")
    check = partial(_check, options=options)
    yield from read_pairs(files, check, columns=COLUMNS, margin_column=options.margin_column)


def _check(row: Row, options: SourceOptions) -> PairRow:
    texts = _texts(row.fields)
    name = next((column for column in ("image", "image_path") if row.fields.get(column) is not None), None)
    if name is None:
        raise RowError("the row has neither 'image' nor 'image_path'")
    chosen, rejected = text_of(texts["chosen"], "'chosen'"), text_of(texts["rejected"], "'rejected'")
    check_different(chosen, rejected)
    media = (picture_of(row.fields[name], repr(name), options.store),)
    index = row.fields.get("idx")
    return PairRow(
        origin=row.origin,
        id=str(row.origin) if index is None else id_of(index, "'idx'"),
        prompt=(Turn("user", prompt_of(texts["question"], media, "'question'")),),
        media=media,
        chosen=chosen,
        rejected=rejected,
        margin=margin_of(row, options.margin_column),
    )


def _texts(fields: dict[str, Any]) -> dict[str, Any]:
    if fields.get("text") is not None:
        if twice := [column for column in TEXTS if fields.get(column) is not None]:
            raise RowError(f"both 'text' and {twice[0]!r} are set: keep one")
        try:
            fields = parse_object(text_of(fields["text"], "'text'"))
        except json.JSONDecodeError as error:
            raise RowError(f"'text' is invalid JSON: {error.msg} at character {error.pos}") from error
        except RowError as error:
            raise RowError(f"'text': {error}") from error
    for column in TEXTS:
        if fields.get(column) is None:
            raise RowError(f"column {column!r} is missing; there are {', '.join(sorted(fields)) or 'none'}")
    return fields

"""TRL's preference format, plain or conversational, with or without pictures: JSON lines, a JSON array or parquet.

Columns read: `prompt`, `chosen`, `rejected`, each a string or a list of messages `{role, content}` whose `content` is a
string or a list of parts `{type: "text", text} | {type: "image"} | {type: "video"}`; `images` (a list) or `image`;
`videos` (a list) or `video`; and the margin column the user names. Without `prompt`, or where `prompt` is a string and
both answers are whole conversations, the messages that both begin with are the prompt, as TRL's `extract_prompt` has
it. Media that the messages do not place stand before the first user turn, as TRL's `prepare_multimodal_messages` puts
them; where a user's text is a string, its `<image>` and `<video>` markers place them. Rows of the same prompt and media
are one group.

Source: TRL 1.16, docs/source/dataset_formats and trl/data_utils.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mmrlhf_jax.data.sources.conversation import (
    Message,
    answer_of,
    check_prompt,
    marked,
    messages_of,
    place,
    placed,
)
from mmrlhf_jax.data.sources.pairs import PairRow, check_different, margin_of, read_pairs
from mmrlhf_jax.data.sources.pictures import pictures_of, videos_of
from mmrlhf_jax.data.sources.rows import Item, Row, RowError, SourceError, SourceOptions, text_of

COLUMNS = ("prompt", "chosen", "rejected", "images", "image", "videos", "video", "tools")


def read(files: Sequence[str], options: SourceOptions) -> Iterator[Item]:
    """Groups in order of their first row; `Rejected` rows; `Remark`s at the end.

    Raises:
        SourceError: the margin column is in no row, or `--map` was given.
    """
    if options.mapping:
        raise SourceError("--map belongs to --source mapped and sharegpt; trl has fixed columns")
    check = partial(_check, options=options)
    yield from read_pairs(files, check, columns=COLUMNS, margin_column=options.margin_column)


def _check(row: Row, options: SourceOptions) -> PairRow:
    fields = row.fields
    for column in ("chosen", "rejected"):
        if fields.get(column) is None:
            raise RowError(f"column {column!r} is missing; the row has {', '.join(sorted(fields)) or 'none'}")
    if fields.get("tools"):
        raise RowError("'tools' are set: conversations with tools are not read")
    images = pictures_of(_either(fields, "images", "image"), "'images'", options.store)
    videos = videos_of(_either(fields, "videos", "video"), "'videos'")
    prompt, chosen, rejected = _split(fields, markers=bool(images or videos))
    check_different(chosen, rejected)
    check_prompt(prompt)
    turns, media, notes = place(placed(prompt, images, videos), images, videos)
    return PairRow(
        origin=row.origin,
        id=str(row.origin),
        prompt=turns,
        media=media,
        chosen=chosen,
        rejected=rejected,
        margin=margin_of(row, options.margin_column),
        notes=notes,
    )


def _either(fields: dict[str, Any], several: str, one: str) -> Any:
    if fields.get(several) is not None and fields.get(one) is not None:
        raise RowError(f"both {several!r} and {one!r} are set: keep one")
    return fields.get(one) if fields.get(several) is None else fields[several]


def _split(fields: dict[str, Any], markers: bool) -> tuple[list[Message], str, str]:
    """Prompt, chosen, rejected."""
    prompt, chosen, rejected = fields.get("prompt"), fields["chosen"], fields["rejected"]
    lists = isinstance(chosen, list) and isinstance(rejected, list)
    if prompt is None and not lists:
        raise RowError("there is no 'prompt', nor are 'chosen' and 'rejected' conversations that begin with one")
    if prompt is None or (isinstance(prompt, str) and lists and max(len(chosen), len(rejected)) > 1):
        first, second = messages_of(chosen, "'chosen'", markers), messages_of(rejected, "'rejected'", markers)
        if first == second:
            raise RowError("'chosen' and 'rejected' are identical")
        both = list(itertools.takewhile(lambda turns: turns[0] == turns[1], zip(first, second, strict=False)))
        rest = len(both)
        return first[:rest], answer_of(first[rest:], "'chosen'"), answer_of(second[rest:], "'rejected'")
    asked = messages_of(prompt, "'prompt'", markers) if isinstance(prompt, list) else [_asked(prompt, markers)]
    return asked, _answer(chosen, "'chosen'", markers), _answer(rejected, "'rejected'", markers)


def _asked(prompt: Any, markers: bool) -> Message:
    text = text_of(prompt, "'prompt'")
    return marked("user", text, "'prompt'") if markers else Message("user", text)


def _answer(value: Any, where: str, markers: bool) -> str:
    return answer_of(messages_of(value, where, markers), where) if isinstance(value, list) else text_of(value, where)

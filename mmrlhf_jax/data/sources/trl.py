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

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mmrlhf_jax.data.sources.conversation import Message, answer_of, check_prompt, marked, of_parts, place, role_of
from mmrlhf_jax.data.sources.pairs import PairRow, check_different, margin_of, read_pairs
from mmrlhf_jax.data.sources.pictures import pictures_of, videos_of
from mmrlhf_jax.data.sources.rows import Item, Row, RowError, SourceError, SourceOptions, text_of
from mmrlhf_jax.groups import Media

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
    turns, media, notes = place(_placed(prompt, images, videos), images, videos)
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
        first, second = _messages(chosen, "'chosen'", markers), _messages(rejected, "'rejected'", markers)
        if first == second:
            raise RowError("'chosen' and 'rejected' are identical")
        both = list(itertools.takewhile(lambda turns: turns[0] == turns[1], zip(first, second, strict=False)))
        rest = len(both)
        return first[:rest], answer_of(first[rest:], "'chosen'"), answer_of(second[rest:], "'rejected'")
    asked = _messages(prompt, "'prompt'", markers) if isinstance(prompt, list) else [_asked(prompt, markers)]
    return asked, _answer(chosen, "'chosen'", markers), _answer(rejected, "'rejected'", markers)


def _asked(prompt: Any, markers: bool) -> Message:
    text = text_of(prompt, "'prompt'")
    return marked("user", text, "'prompt'") if markers else Message("user", text)


def _answer(value: Any, where: str, markers: bool) -> str:
    return answer_of(_messages(value, where, markers), where) if isinstance(value, list) else text_of(value, where)


def _messages(value: list[Any], where: str, markers: bool) -> list[Message]:
    return [_message(message, f"{where}[{number}]", markers) for number, message in enumerate(value, 1)]


def _message(message: Any, where: str, markers: bool) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"{where} is not a message with 'role' and 'content'")
    if message.get("tool_calls"):
        raise RowError(f"{where} calls tools: conversations with tools are not read")
    role, content = role_of(message.get("role"), f"{where}.role"), message.get("content")
    if isinstance(content, list):
        return of_parts(role, content, f"{where}.content")
    text = text_of(content, f"{where}.content")
    return marked(role, text, f"{where}.content") if markers and role == "user" else Message(role, text)


def _placed(messages: list[Message], images: Sequence[Media], videos: Sequence[Media]) -> list[Message]:
    """Media that no message places go before the first user turn."""
    if any(message.media for message in messages):
        return messages
    kinds = ("image",) * len(images) + ("video",) * len(videos)
    first = next(i for i, message in enumerate(messages) if message.role == "user")
    return [dataclasses.replace(m, media=kinds) if i == first else m for i, m in enumerate(messages)]

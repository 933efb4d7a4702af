"""LLaMA-Factory's sharegpt format: ranking rows and supervised rows, as JSON lines, a JSON array or parquet.

Columns read, under LLaMA-Factory's names unless `--map TARGET=NAME` gives others: `conversations` or `messages` (target
`messages`), `chosen` and `rejected` (one message each), `images`, `videos`, `system`, `id`, and the margin column the
user names. A message is `{from: human | gpt | system, value}` or `{role: user | assistant | system, content}`; the
targets `role_tag`, `content_tag`, `user_tag`, `assistant_tag` and `system_tag` name other spellings, as in
dataset_info.json. Markers `<image>` and `<video>` in the texts place the media, as many as the row lists. A first
message of the system stands above the column `system`.

With `chosen` and `rejected` the messages are the prompt, and rows of the same prompt and media are one group. Without
both, the last message is the answer and a row is a group without pairs.

Source: LLaMA-Factory, data/README.md and src/llamafactory/data/converter.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from mmrlhf_jax.data.sources.conversation import (
    EARLIER_TURNS,
    ROLES,
    Message,
    Role,
    answer_of,
    check_alternate,
    check_prompt,
    marked,
    place,
)
from mmrlhf_jax.data.sources.pairs import PairRow, check_different, margin_of, read_pairs
from mmrlhf_jax.data.sources.pictures import pictures_of, videos_of
from mmrlhf_jax.data.sources.rows import (
    Item,
    Row,
    RowError,
    SourceError,
    SourceOptions,
    id_of,
    optional_text_of,
    text_of,
)

COLUMNS = ("messages", "chosen", "rejected", "images", "videos", "system", "id")
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")
TARGETS = (*COLUMNS, *TAGS)
NOT_OPTIONAL = ("chosen", "rejected", "id")  # where --map names them; media and system may be absent from a row
REFUSED = ("tools", "audios")

_SPELLINGS: dict[Role, tuple[str, ...]] = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant"),
    "system": ("system",),
}


def read(files: Sequence[str], options: SourceOptions) -> Iterator[Item]:
    """Groups in order of their first row; `Rejected` rows; `Remark`s at the end.

    Raises:
        SourceError: an unknown target, or a column that the user named is in no row.
    """
    mapping = options.mapping
    if unknown := sorted(set(mapping) - set(TARGETS)):
        raise SourceError(f"--map does not know {', '.join(unknown)}; it knows {', '.join(TARGETS)}")
    yield from read_pairs(
        files,
        partial(_check, options=options),
        columns=[*_columns(mapping), *REFUSED],
        margin_column=options.margin_column,
        needed=[(f"--map {target}", mapping[target]) for target in COLUMNS if target in mapping],
    )


def _columns(mapping: Mapping[str, str]) -> list[str]:
    named = [mapping.get(target, target) for target in COLUMNS]
    return named if "messages" in mapping else ["conversations", *named]


def _check(row: Row, options: SourceOptions) -> PairRow:
    fields, mapping = row.fields, options.mapping
    for column in REFUSED:
        if fields.get(column):
            raise RowError(f"{column!r} are set: conversations with {column} are not read")
    found = {target: fields.get(mapping.get(target, target)) for target in COLUMNS}
    for target in NOT_OPTIONAL:
        if target in mapping and found[target] is None:
            raise RowError(f"{target}={mapping[target]} is missing")
    messages = _conversation(fields, mapping)
    if not (messages and messages[0].role == "system"):
        system = optional_text_of(found["system"], "'system'")
        messages = messages if system is None else [Message("system", system), *messages]
    check_alternate(messages)
    prompt, chosen, rejected = _split(messages, found, mapping)
    check_prompt(prompt)
    images = pictures_of(found["images"], "'images'", options.store)
    turns, media, notes = place(prompt, images, videos_of(found["videos"], "'videos'"))
    alone = rejected is None
    if alone and any(message.role == "assistant" for message in prompt):
        notes = (*notes, EARLIER_TURNS)
    return PairRow(
        origin=row.origin,
        id=str(row.origin) if found["id"] is None else id_of(found["id"], "'id'"),
        apart=chosen if alone else "",  # answers that nobody compared are groups of their own
        prompt=turns,
        media=media,
        chosen=chosen,
        rejected=rejected,
        margin=None if alone else margin_of(row, options.margin_column),
        notes=notes,
    )


def _conversation(fields: Mapping[str, Any], mapping: Mapping[str, str]) -> list[Message]:
    names = [mapping["messages"]] if "messages" in mapping else ["conversations", "messages"]
    given = [name for name in names if fields.get(name) is not None]
    if len(given) != 1:
        both = "both " if given else "no "
        raise RowError(f"the row has {both}{' and '.join(map(repr, given or names))}: one is needed")
    value = fields[given[0]]
    if not isinstance(value, list) or not value:
        raise RowError(f"{given[0]!r} is not a list of messages")
    return [_message(message, f"{given[0]!r}[{number}]", mapping) for number, message in enumerate(value, 1)]


def _split(
    messages: list[Message], found: Mapping[str, Any], mapping: Mapping[str, str]
) -> tuple[list[Message], str, str | None]:
    """Prompt, chosen (or the only answer), rejected."""
    answers = {name: found[name] for name in ("chosen", "rejected") if found[name] is not None}
    if not answers:
        if messages[-1].role != "assistant":
            raise RowError("there is neither 'chosen' nor 'rejected', and the last message is not of the assistant")
        return messages[:-1], answer_of(messages[-1:], "the last message"), None
    if len(answers) == 1:
        raise RowError(f"the row has {next(iter(answers))!r} alone: a preference needs 'chosen' and 'rejected'")
    chosen, rejected = (
        answer_of([_message(value, repr(name), mapping)], repr(name)) for name, value in answers.items()
    )
    check_different(chosen, rejected)
    return messages, chosen, rejected


def _message(message: Any, where: str, mapping: Mapping[str, str]) -> Message:
    role_tag, content_tag = _tag(message, "role_tag", mapping, where), _tag(message, "content_tag", mapping, where)
    if message.get("tool_calls"):
        raise RowError(f"{where} calls tools: conversations with tools are not read")
    said = text_of(message[role_tag], f"{where}.{role_tag}")
    spellings = {role: (mapping[f"{role}_tag"],) if f"{role}_tag" in mapping else _SPELLINGS[role] for role in ROLES}
    role = next((role for role, names in spellings.items() if said in names), None)
    if role is None:
        known = ", ".join(name for names in spellings.values() for name in names)
        raise RowError(f"{where}.{role_tag} is {said!r:.60}; it may be {known}")
    return marked(role, text_of(message[content_tag], f"{where}.{content_tag}"), f"{where}.{content_tag}")


def _tag(message: Any, target: str, mapping: Mapping[str, str], where: str) -> str:
    """Which key of the message says who speaks, or what: the one that is there."""
    usual = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}[target]
    names = (mapping[target],) if target in mapping else usual
    if not isinstance(message, dict):
        raise RowError(f"{where} is not a message with {' or '.join(map(repr, names))}")
    there = [name for name in names if message.get(name) is not None]
    if len(there) != 1:
        raise RowError(f"{where} has {'both' if there else 'no'} {' and '.join(map(repr, names))}: one is needed")
    return there[0]

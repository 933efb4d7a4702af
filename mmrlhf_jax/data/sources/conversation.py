"""Conversations with pictures -> turns and media, for the formats that write messages.

A message holds its pictures and videos either as parts, `{"type": "image"}`, or as markers in its text, `<image>`;
either way the row lists the media beside the conversation, and their number must agree with what is written. Within a
turn the media come before the text, as the model families' own chat templates write them; no medium changes its turn.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from mmrlhf_jax.data.sources.rows import RowError, text_of
from mmrlhf_jax.groups import Media, Turn

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
MOVED = "a picture or video written after text of its turn; it comes before the text, as chat templates write it"
EARLIER_TURNS = "earlier answers of the conversation are prompt: only the last one is trained on"

_MARKER = re.compile(r"<(image|video)>\n?")
_OPENING = re.compile(r"(?:\s*<(?:image|video)>)*")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn as written: `media` are the kinds of its media in order; `late`: one stands after text."""

    role: Role
    text: str
    media: tuple[str, ...] = ()
    late: bool = False


def role_of(value: Any, where: str) -> Role:
    if value not in ROLES:
        raise RowError(f"{where} is {text_of(value, where)!r}; roles are {', '.join(ROLES)}")
    return cast(Role, value)


def marked(role: Role, text: str, where: str) -> Message:
    """A message whose text holds `<image>` and `<video>` markers; each goes, with one line break after it."""
    kinds = tuple(found[1] for found in _MARKER.finditer(text))
    opening = _OPENING.match(text)
    early = 0 if opening is None else opening[0].count("<")
    return Message(role, text_of(_MARKER.sub("", text), where), kinds, late=early < len(kinds))


def of_parts(role: Role, parts: Sequence[Any], where: str) -> Message:
    """A message of parts; several texts are lines of one, as LLaVA-OneVision's chat template writes them."""
    texts: list[str] = []
    kinds: list[str] = []
    late = False
    for number, part in enumerate(parts, 1):
        at = f"{where}[{number}]"
        if not isinstance(part, dict):
            raise RowError(f"{at} is not an object with 'type'")
        kind = part.get("type")
        if kind == "text":
            texts.append(text_of(part.get("text"), f"{at}.text"))
        elif kind in ("image", "video"):
            kinds.append(kind)
            late = late or bool(texts)
            # parquet gives every part the same fields, so null ones are absent ones
            if unknown := sorted(key for key, value in part.items() if key != "type" and value is not None):
                raise RowError(f"{at} holds {', '.join(unknown)}; media belong in the columns beside the messages")
        else:
            raise RowError(f"{at}.type is {str(kind)!r:.40}; parts are text, image, video")
    return Message(role, text_of("\n".join(texts), where), tuple(kinds), late)


def messages_of(value: Sequence[Any], where: str, markers: bool) -> list[Message]:
    """A list of `{role, content}`, content being a string or a list of parts; with `markers` those in a user's string
    place media, without they are text."""
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


def placed(messages: Sequence[Message], images: Sequence[Media], videos: Sequence[Media]) -> list[Message]:
    """Media that no message places go before the first user turn."""
    if any(message.media for message in messages):
        return list(messages)
    kinds = ("image",) * len(images) + ("video",) * len(videos)
    first = next(i for i, message in enumerate(messages) if message.role == "user")
    return [dataclasses.replace(m, media=kinds) if i == first else m for i, m in enumerate(messages)]


def check_prompt(messages: Sequence[Message]) -> None:
    """A system turn comes first or not at all, and a user turn last."""
    if not messages or messages[-1].role != "user":
        raise RowError("the prompt does not end with a user turn")
    if any(message.role == "system" for message in messages[1:]):
        raise RowError("a system turn stands after other turns")


def check_alternate(messages: Sequence[Message]) -> None:
    """User and assistant take turns, after the system; the user begins."""
    spoken = [message.role for message in messages if message.role != "system"]
    if any(role != ("user", "assistant")[number % 2] for number, role in enumerate(spoken)):
        raise RowError("user and assistant do not take turns, the user first")


def answer_of(messages: Sequence[Message], where: str) -> str:
    """The text of the one assistant message that a response is."""
    if len(messages) != 1 or messages[0].role != "assistant":
        said = ", ".join(message.role for message in messages) or "nothing"
        raise RowError(f"{where} must be one assistant message; after the prompt it has {said}")
    if messages[0].media:
        raise RowError(f"{where} holds a picture or video; they belong in the prompt")
    return messages[0].text


def place(
    messages: Sequence[Message], images: Sequence[Media], videos: Sequence[Media]
) -> tuple[tuple[Turn, ...], tuple[Media, ...], tuple[str, ...]]:
    """Turns, media in the order in which they are written, and notes on the row.

    Raises:
        RowError: other numbers of media than are written, or media outside user turns.
    """
    for kind, given in (("image", images), ("video", videos)):
        written = sum(message.media.count(kind) for message in messages)
        if written != len(given):
            raise RowError(f"the prompt places {written} {kind}s, the row lists {len(given)}")
    for message in messages:
        if message.media and message.role != "user":
            raise RowError(f"a picture or video stands in a turn of the {message.role}; they belong in user turns")
    lists = {"image": iter(images), "video": iter(videos)}
    media = tuple(next(lists[kind]) for message in messages for kind in message.media)
    first = next((message for message in messages if message.role == "user"), None)
    plain = first is not None and len(first.media) == len(media)  # the place of media unless turns say otherwise
    turns = tuple(Turn(m.role, m.text, 0 if plain else len(m.media)) for m in messages)
    return turns, media, (MOVED,) if any(message.late for message in messages) else ()

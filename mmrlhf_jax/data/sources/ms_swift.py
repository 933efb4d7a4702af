"""ms-swift's standard format: preference rows and supervised rows, as JSON lines, a JSON array or parquet.

Columns read: `messages` (or `conversations`, or `query` with `response` and `history`), `rejected_response` or
`rejected_messages`, `images` or `image`, `videos` or `video`, `rejected_images`, `system`, and the margin column the
user names (ms-swift's own is `margin`). A message is `{role: user | assistant | system, content}`, or with `from` and
`value` and the roles human, gpt and bot; its content is a string, or parts `{type: text, text}` and `{type: image,
image}`, which hold the media themselves.

The tags `<image>` and `<video>` place the media. Where a row lists more than it places, the first of them come before
the first message that is not the system's, as ms-swift puts them. The messages end with the chosen answer;
`rejected_response`, a string or messages, stands in for what follows the last user turn, `rejected_messages` for the
whole conversation, which must then ask the same about the same `rejected_images`. Rows of the same prompt and media
are one group. Without either, a row is a group without pairs.

Source: ms-swift 4.6, docs/source_en/Customization/Custom-dataset.md, swift/template/template_inputs.py and
swift/dataset/preprocessor/core.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmrlhf_jax.data.sources.conversation import (
    EARLIER_TURNS,
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
    optional_text_of,
    text_of,
)

CONVERSATIONS = ("messages", "conversations", "query")
MEDIA = ("images", "image", "videos", "video")
REFUSED = (  # what says more than a group can hold, each with the reason
    *((name, "conversations with tools are not read") for name in ("tools", "rejected_tools")),
    *((name, "conversations with sound are not read") for name in ("audios", "audio", "rejected_audios")),
    ("objects", "boxes are not read: write them into the texts"),
    ("label", "a group compares answers: KTO's and classifiers' rows are not read"),
    ("rejected_videos", "both answers must be about the same 'videos'"),
    *((f"{kind}_messages", "rows for embeddings are not read") for kind in ("positive", "negative")),
)
COLUMNS = (
    *CONVERSATIONS,
    *MEDIA,
    *(name for name, _ in REFUSED),
    "response",
    "history",
    "system",
    "rejected_response",
    "rejected_messages",
    "rejected_images",
)

_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class _Said:
    """A message as written, its media as tags."""

    role: Role
    text: str


def read(files: Sequence[str], options: SourceOptions) -> Iterator[Item]:
    """Groups in order of their first row; `Rejected` rows; `Remark`s at the end.

    Raises:
        SourceError: the margin column is in no row, or `--map` was given.
    """
    if options.mapping:
        raise SourceError("--map belongs to --source mapped and sharegpt; ms_swift has fixed columns")
    check = partial(_check, options=options)
    yield from read_pairs(files, check, columns=COLUMNS, margin_column=options.margin_column)


def _check(row: Row, options: SourceOptions) -> PairRow:
    fields = row.fields
    for column, reason in REFUSED:
        if _is_set(fields.get(column)):
            raise RowError(f"{column!r} is set: {reason}")
    held: dict[str, list[Any]] = {"image": [], "video": []}
    said = _conversation(fields, held)
    asked, answers = _split(said, "the conversation")
    images = pictures_of(_listed(fields, "images", "image", held), "'images'", options.store)
    videos = videos_of(_listed(fields, "videos", "video", held), "'videos'")
    chosen = answer_of(answers, "what follows the last user turn")
    rejected = _rejected(fields, asked)
    if rejected is not None:
        check_different(chosen, rejected)
        _check_rejected_images(fields, images, options)
    prompt = [marked(m.role, m.text, f"message {n}") for n, m in enumerate(_all_placed(asked, images, videos), 1)]
    check_alternate(prompt)
    check_prompt(prompt)
    turns, media, notes = place(prompt, images, videos)
    alone = rejected is None
    if alone and any(message.role == "assistant" for message in prompt):
        notes = (*notes, EARLIER_TURNS)
    return PairRow(
        origin=row.origin,
        id=str(row.origin),
        apart=chosen if alone else "",  # answers that nobody compared are groups of their own
        prompt=turns,
        media=media,
        chosen=chosen,
        rejected=rejected,
        margin=None if alone else margin_of(row, options.margin_column),
        notes=notes,
    )


def _is_set(value: Any) -> bool:
    """Parquet gives an object that no row has all its keys, as nulls."""
    if isinstance(value, dict):
        return any(map(_is_set, value.values()))
    return value is not None and value not in ([], "")


def _conversation(fields: Mapping[str, Any], held: dict[str, list[Any]]) -> list[_Said]:
    """All messages, the system's first; media that stand in them go to `held`."""
    given = [name for name in CONVERSATIONS if fields.get(name) is not None]
    if len(given) != 1:
        both = "both " if given else "no "
        raise RowError(f"the row has {both}{' and '.join(map(repr, given or CONVERSATIONS))}: one is needed")
    if given[0] == "query":
        said = _of_query(fields)
    else:
        if surplus := [name for name in ("response", "history") if fields.get(name) is not None]:
            raise RowError(f"both {given[0]!r} and {surplus[0]!r} are set: keep one")
        said = _messages(fields[given[0]], repr(given[0]), held)
    if said[0].role != "system" and (system := optional_text_of(fields.get("system"), "'system'")) is not None:
        said = [_Said("system", system), *said]
    return said


def _of_query(fields: Mapping[str, Any]) -> list[_Said]:
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise RowError("'history' is not a list of [query, response]")
    turns = [*history, [fields.get("query"), fields.get("response")]]
    said = []
    for number, (query, response) in enumerate(turns, 1):
        last = number == len(turns)
        said.append(_Said("user", text_of(query, "'query'" if last else f"'history'[{number}]")))
        said.append(_Said("assistant", text_of(response, "'response'" if last else f"'history'[{number}]")))
    return said


def _messages(value: Any, where: str, held: dict[str, list[Any]]) -> list[_Said]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{where} is not a list of messages")
    return [_message(message, f"{where}[{number}]", held) for number, message in enumerate(value, 1)]


def _message(message: Any, where: str, held: dict[str, list[Any]]) -> _Said:
    if not isinstance(message, dict):
        raise RowError(f"{where} is not a message with 'role' and 'content'")
    if message.get("tool_calls"):
        raise RowError(f"{where} calls tools: conversations with tools are not read")
    if marks := [key for key in ("loss", "loss_scale") if message.get(key) is not None]:
        raise RowError(f"{where}.{marks[0]} is set: the last answer is trained on, every token alike")
    said, content = _either(message, "role", "from", where), _either(message, "content", "value", where)
    if said is None or content is None:
        raise RowError(f"{where} is not a message with 'role' and 'content'")
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise RowError(f"{where}.role is {said!r:.60}; it may be {', '.join(_ROLES)}")
    text = _tagged(content, f"{where}.content", held) if isinstance(content, list) else content
    text = text_of(text, f"{where}.content")
    if "<img>" in text and "</img>" in text:
        raise RowError(f"{where} holds <img>PATH</img>: list the picture in 'images' and write <image>")
    return _Said(role, text)


def _either(values: Mapping[str, Any], name: str, other: str, where: str) -> Any:
    if values.get(name) is not None and values.get(other) is not None:
        raise RowError(f"{where} has both {name!r} and {other!r}: keep one")
    return values.get(other) if values.get(name) is None else values[name]


def _tagged(parts: Sequence[Any], where: str, held: dict[str, list[Any]]) -> str:
    """Parts as one text with tags, end to end, as ms-swift joins them."""
    text = ""
    for number, part in enumerate(parts, 1):
        at = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text += text_of(part.get("text"), f"{at}.text")
            continue
        name = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}.get(str(kind))
        if name is None:
            raise RowError(f"{at}.type is {str(kind)!r:.40}; parts are text, image, video")
        medium = part.get(kind)
        if str(kind).endswith("_url") and isinstance(medium, dict):
            medium = medium.get("url")
        if medium is not None:
            held[name].append(medium)
        text += f"<{name}>"
    return text


def _listed(fields: Mapping[str, Any], several: str, one: str, held: dict[str, list[Any]]) -> Any:
    beside = _either(fields, several, one, "the row")
    if held[one] and beside:
        raise RowError(f"{one}s stand both in the messages and in {several!r}: keep one")
    return held[one] or beside


def _split(said: Sequence[_Said], where: str) -> tuple[list[_Said], list[Message]]:
    """What is asked, up to the last user turn, and what follows it."""
    last = max((number for number, message in enumerate(said) if message.role == "user"), default=None)
    if last is None:
        raise RowError(f"{where} has no user turn")
    answers = [
        marked(message.role, message.text, f"message {n}") for n, message in enumerate(said[last + 1 :], last + 2)
    ]
    return list(said[: last + 1]), answers


def _rejected(fields: Mapping[str, Any], asked: Sequence[_Said]) -> str | None:
    """The rejected answer, to the same prompt as the chosen one; None in a supervised row."""
    response, messages = fields.get("rejected_response"), fields.get("rejected_messages")
    if response is not None and messages is not None:
        raise RowError("both 'rejected_response' and 'rejected_messages' are set: keep one")
    held: dict[str, list[Any]] = {"image": [], "video": []}
    if messages is not None:
        said = _messages(messages, "'rejected_messages'", held)
        if said[0].role != "system" and asked[0].role == "system":
            said = [asked[0], *said]
        prompt, answers = _split(said, "'rejected_messages'")
        if any(held.values()):
            raise RowError("'rejected_messages' hold pictures or videos: list them beside the messages")
        if prompt != list(asked):
            raise RowError("'rejected_messages' ask something else than the chosen ones: a group has one prompt")
        return answer_of(answers, "'rejected_messages'")
    if response is None:
        return None
    if isinstance(response, list):
        said = _messages(response, "'rejected_response'", held)
        if any(message.role == "user" for message in said):
            raise RowError("'rejected_response' holds a user turn")
    else:
        said = [_Said("assistant", text_of(response, "'rejected_response'"))]
    if any(held.values()):
        raise RowError("'rejected_response' holds a picture or video; they belong in the prompt")
    return answer_of([marked(m.role, m.text, "'rejected_response'") for m in said], "'rejected_response'")


def _check_rejected_images(fields: Mapping[str, Any], images: Sequence[Any], options: SourceOptions) -> None:
    given = fields.get("rejected_images")
    if given is None and fields.get("rejected_messages") is not None and images:
        raise RowError(
            "'rejected_messages' come without 'rejected_images', and ms-swift shows that answer no picture then: "
            "repeat 'images' there"
        )
    if given is not None and pictures_of(given, "'rejected_images'", options.store) != tuple(images):
        raise RowError("'rejected_images' are not 'images': a group's answers are about the same pictures")


def _all_placed(asked: Sequence[_Said], images: Sequence[Any], videos: Sequence[Any]) -> list[_Said]:
    """Tags for media that the messages do not place, before the first message that is not the system's."""
    whole = "\n".join(message.text for message in asked)
    missing = "".join(
        f"<{kind}>" * max(0, len(media) - whole.count(f"<{kind}>"))
        for kind, media in (("video", videos), ("image", images))
    )
    first = next(number for number, message in enumerate(asked) if message.role != "system")
    return [_Said(m.role, missing + m.text) if number == first else m for number, m in enumerate(asked)]

"""Pictures small enough to be part of a page: decoded by the project's own decoder and drawn anew, never passed on."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from mmrlhf_jax.data.media import decode
from mmrlhf_jax.groups import Group
from mmrlhf_jax.report.answers import Prompt
from mmrlhf_jax.report.markup import Markup, element

SIDE = 320  # pixels of the longer side at most
DRAWN = 96  # up to this many pixels a picture is a drawing: kept as it is, and shown enlarged without blur
SHOWN = 4  # pictures of a prompt


class Prompts(Protocol):
    """Groups in order, and each again with the bytes of its pictures: a dataset, or a file of prompts."""

    def with_media(self, row: int, /) -> Group: ...


@dataclass(frozen=True)
class Album:
    """Where the pictures of prompts are, by id and text."""

    places: dict[tuple[str, Prompt], tuple[Prompts, int]]

    def pictures(self, name: str, prompt: Prompt) -> list[Markup]:
        """The pictures of a prompt, none where it is not known. Raises ValueError for a damaged one."""
        place = self.places.get((name, prompt))
        return [] if place is None else list(pictures_of(place[0].with_media(place[1])))


def album(sources: Iterable[tuple[Prompts, Iterable[Group]]]) -> Album:
    """The album of these sources; of a prompt that is in several the first has the picture."""
    places: dict[tuple[str, Prompt], tuple[Prompts, int]] = {}
    for source, groups in sources:
        for row, group in enumerate(groups):
            places.setdefault((group.id, turns_of(group)), (source, row))
    return Album(places)


def turns_of(group: Group) -> Prompt:
    """A group's prompt as a file of answers holds it."""
    return tuple((turn.role, turn.text) for turn in group.prompt)


def pictures_of(group: Group) -> Iterator[Markup]:
    """The first few pictures of a group that comes with their bytes; of a video the frame in the middle."""
    for number, media in enumerate(group.media[:SHOWN], 1):
        frame = len(media.encoded) // 2
        of = f"Picture {number} of {len(group.media)}" if len(group.media) > 1 else "Picture"
        said = f"Frame {frame + 1} of {len(media.encoded)} of the video" if media.kind == "video" else of
        yield picture(media.encoded[frame], f"{said} of the prompt {group.id}: {media.path}")
    if rest := len(group.media) - SHOWN:
        yield from [element("p", f"and {rest} more pictures", class_="remark")] * (rest > 0)


def picture(encoded: bytes, said: str) -> Markup:
    """An embedded picture with a text alternative. Raises MediaError for bytes that are no picture."""
    image = Image.fromarray(decode(encoded))
    drawn = max(image.size) <= DRAWN
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True) if drawn else image.save(buffer, "JPEG", quality=80)
    kind = "png" if drawn else "jpeg"
    return element(
        "img",
        src=f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        alt=said,
        width=image.width,
        height=image.height,
        class_="drawn" if drawn else "photo",
    )

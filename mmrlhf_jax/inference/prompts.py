"""Prompts to be answered: those of a file, or those of a prepared dataset.

A file is JSON lines, or parquet. A row is one prompt:

    id       names it in the answers; left out: the number of its line
    prompt   a string, before which `<image>` markers (one a picture) may stand; or a list of messages {role, content}
             that ends with the user's, content being a string, whose `<image>` and `<video>` markers place the media,
             or parts {type: "text", text} | {type: "image"} | {type: "video"}. Media that nothing places stand before
             the first user turn
    image    a picture or a list of them: a path under the media root, a data URI, or {bytes, path}
    video    a path under the media root: a file, or a directory of frames
    (neither: text only)

Other columns are not read; the id is what joins an answer to them. Pictures are decoded before anything is answered, so
that a bad one is known by its line at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from etils import epath

from mmrlhf_jax.command import progress_line
from mmrlhf_jax.data.datasets import Dataset
from mmrlhf_jax.data.media import MediaRoot, read_media
from mmrlhf_jax.data.pipeline import GroupSource
from mmrlhf_jax.data.prepare import Proven, prove
from mmrlhf_jax.data.sources.conversation import check_prompt, messages_of, place, placed
from mmrlhf_jax.data.sources.pictures import PictureStore, is_embedded, media_of
from mmrlhf_jax.data.sources.rows import Rejected, Row, RowError, SourceError, id_of, prompt_of, read_rows
from mmrlhf_jax.groups import Group, Media, Origin, Turn

COLUMNS = ("id", "prompt", "image", "video")
# read by other programs; unread, a prompt would go to the model without its pictures
MISTAKEN = {"images": "image", "videos": "video", "messages": "prompt", "conversations": "prompt"}

Unit = Literal["line", "row"]


@dataclass(frozen=True)
class Prompts:
    """Groups without responses and without the bytes of their pictures, which `with_media` brings; a `GroupSource`.

    `places` name them: lines of a file, counted from 1, or rows of a dataset, counted from 0 (`unit` says which).
    `rejected` could not be used; `unread` columns stood in the file, with the number of their rows.
    """

    source: GroupSource
    unit: Unit
    places: tuple[int, ...]
    groups: tuple[Group, ...]
    rejected: tuple[Rejected, ...] = ()
    unread: tuple[tuple[str, int], ...] = ()

    @property
    def path(self) -> str:
        return self.source.path

    def with_media(self, index: int) -> Group:
        """`groups[index]` with the bytes of its pictures. Raises ValueError where they are no longer what they were."""
        return without_responses(self.source.with_media(self.places[index]))

    def without(self, fault: Callable[[Group], str | None]) -> Prompts:
        """Those in which `fault` finds none; the others are `rejected` for what it says."""
        faults = [fault(group) for group in self.groups]
        good = [index for index, found in enumerate(faults) if found is None]
        bad = [Rejected(self._origin(index), found) for index, found in enumerate(faults) if found is not None]
        return dataclasses.replace(
            self,
            places=tuple(self.places[index] for index in good),
            groups=tuple(self.groups[index] for index in good),
            rejected=(*self.rejected, *bad),
        )

    def _origin(self, index: int) -> Origin:
        origins = self.groups[index].origins
        return origins[0] if origins else Origin(self.path, self.places[index])

    def fingerprint(self, *, facts: bool = False) -> str:
        """sha256 over what is asked, under which names and in which order; with the prompts' facts where asked for."""
        hashes = [group.content_hash(facts=facts) for group in self.groups]
        asked = [[p, group.id, found] for p, group, found in zip(self.places, self.groups, hashes, strict=True)]
        return hashlib.sha256(json.dumps([self.unit, asked]).encode()).hexdigest()


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file by line, and where their media lie; a `GroupSource` whose rows are lines."""

    path: str
    groups: Mapping[int, Group]
    media: MediaRoot | None
    embedded: MediaRoot

    def with_media(self, line: int) -> Group:
        """Raises ValueError for media that changed since they were proven."""
        group = self.groups[line]
        return dataclasses.replace(group, media=tuple(self._filled(media, group) for media in group.media))

    def _filled(self, media: Media, group: Group) -> Media:
        root = self.embedded if is_embedded(media) else self.media
        assert root is not None  # a file whose paths have no root is refused
        again = read_media(dataclasses.replace(media, sizes=(), sha256=""), root)
        if again.sha256 != media.sha256:
            raise ValueError(f"{group.origins[0]}: {media.path!r} changed since the start: run the same command again")
        return again


def without_responses(group: Group) -> Group:
    return dataclasses.replace(group, responses=(), pairs=())


def dataset_prompts(dataset: Dataset) -> Prompts:
    """The prompts of a prepared dataset, or of a mixture, row by row; its responses are not looked at.

    Raises:
        ValueError: a group answers several questions.
    """
    groups = []
    for row, group in enumerate(dataset.groups()):
        if not group.one_prompt:
            raise ValueError(
                f"{dataset.path} row {row} holds answers to several questions: prepare without --cross-prompt"
            )
        groups.append(without_responses(group))
    return Prompts(dataset, "row", tuple(range(len(groups))), tuple(groups))


def read_prompts(
    file: str, media: str | None, folder: str, *, frames: int, workers: int = 4, progress: bool = False
) -> Prompts:
    """The prompts of `file`, the format of which is this module's, every picture of them decoded once.

    `media` is the root of their paths; `folder`, a local directory, keeps pictures that stand in rows, and `frames`
    evenly spaced ones of each video file.

    Raises:
        SourceError: the file cannot be read, or paths and `media` do not go together.
    """
    groups, rejected, unread = _rows(file, picture_store(folder))
    numbered = {group.origins[0].line: group for group in groups}
    found = prove_prompts(
        file, "line", numbered, media, folder, frames=frames, workers=workers, progress=progress, rejected=rejected
    )
    return dataclasses.replace(found, unread=unread)


def picture_store(folder: str) -> PictureStore:
    """Where pictures that stand in rows are put for `prove_prompts` to find."""
    return PictureStore(epath.Path(folder) / "pictures")


def prove_prompts(
    path: str,
    unit: Unit,
    groups: Mapping[int, Group],
    media: str | None,
    folder: str,
    *,
    frames: int,
    workers: int = 4,
    progress: bool = False,
    rejected: Sequence[Rejected] = (),
) -> Prompts:
    """Prompts by place, every picture of them decoded once; those with a bad one join the `rejected`.

    The arguments are those of `read_prompts`. Raises SourceError where paths and `media` do not go together.
    """
    bad = list(rejected)
    wanted = list(dict.fromkeys(each for group in groups.values() for each in group.media))
    root = _root(media, wanted, frames, str(Path(folder) / "frames"))
    embedded = MediaRoot(os.fspath(picture_store(folder).directory))

    def proven(each: Media) -> Proven | str:
        where = embedded if is_embedded(each) else root
        assert where is not None
        return prove(each, where)

    with ThreadPoolExecutor(workers) as pool:  # Pillow's decoders release the GIL
        bar = progress_line(
            pool.map(proven, wanted), desc="media", total=len(wanted), disable=not progress or not wanted
        )
        found = dict(zip(wanted, bar, strict=True))
    kept: dict[int, Group] = {}
    for number, group in groups.items():
        whole = [found[each] for each in group.media]
        if faults := [each for each in whole if isinstance(each, str)]:
            bad.append(Rejected(group.origins[0], "; ".join(faults)))
        else:
            filled = tuple(each.media for each in whole if isinstance(each, Proven))
            kept[number] = dataclasses.replace(group, media=filled)
    bad.sort(key=lambda row: row.origin.line)
    source = PromptFile(path, kept, root, embedded)
    return Prompts(source, unit, tuple(kept), tuple(kept.values()), tuple(bad))


def _rows(file: str, store: PictureStore) -> tuple[list[Group], list[Rejected], tuple[tuple[str, int], ...]]:
    groups: list[Group] = []
    rejected: list[Rejected] = []
    unread: Counter[str] = Counter()
    line_of: dict[str, int] = {}
    lines: set[int] = set()
    for row in read_rows([file]):
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        unread.update(set(row.fields) - set(COLUMNS))
        try:
            group = _group(row, store)
            if row.origin.line in lines:
                raise RowError("another row stands on this line: save the rows as JSON lines")
            if group.id in line_of:
                raise RowError(f"id {group.id!r} is that of line {line_of[group.id]} too")
        except RowError as error:
            rejected.append(Rejected(row.origin, str(error)))
            continue
        line_of[group.id] = row.origin.line
        lines.add(row.origin.line)
        groups.append(group)
    return groups, rejected, tuple(sorted(unread.items()))


def _group(row: Row, store: PictureStore) -> Group:
    fields = row.fields
    if mistaken := [name for name in MISTAKEN if fields.get(name) is not None]:
        raise RowError(f"{mistaken[0]!r} is not read: the column is {MISTAKEN[mistaken[0]]!r}")
    if fields.get("prompt") is None:
        raise RowError(f"column 'prompt' is missing; the row has {', '.join(sorted(fields)) or 'none'}")
    media = media_of(fields.get("image"), fields.get("video"), store)
    turns, media = _turns(fields["prompt"], media)
    stated = fields.get("id")
    name = str(row.origin.line) if stated is None else id_of(stated, "'id'")
    return Group(name, turns, media, (), (), (row.origin,))


def _turns(prompt: object, media: tuple[Media, ...]) -> tuple[tuple[Turn, ...], tuple[Media, ...]]:
    if not isinstance(prompt, list):
        return (Turn("user", prompt_of(prompt, media)),), media
    messages = messages_of(prompt, "'prompt'", markers=bool(media))
    check_prompt(messages)
    images, videos = ([each for each in media if each.kind == kind] for kind in ("image", "video"))
    turns, ordered, _ = place(placed(messages, images, videos), images, videos)
    return turns, ordered


def _root(media: str | None, wanted: Sequence[Media], frames: int, spool: str) -> MediaRoot | None:
    paths = [each for each in wanted if not is_embedded(each)]
    if media is None:
        if paths:
            raise SourceError(f"the rows name pictures or videos ({paths[0].path!r}): give their root with --media")
        return None
    if not epath.Path(media).is_dir():
        raise SourceError(f"{media} is not a directory: correct --media")
    if not paths:
        raise SourceError(f"--media {media} is given, yet no row names a picture or video under it")
    return MediaRoot(media, video_frames=frames, spool=spool)

"""Pictures, paths under a media root, and clips.

Names as in `readers`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import corpus
import mutate
from etils import epath
from texts import Made

from mmrlhf_jax.data import containers, media, video
from mmrlhf_jax.data.media import MediaError, MediaRoot
from mmrlhf_jax.groups import Media

OF_BYTES = "decode,picture_size,_open,_jpeg_scans,_orientation,_rgb,_one_line"
OF_PATHS = (
    "MediaRoot,read_media,verify_media,digest,_naming,_read_file,_read_frames,_frames_of_file,_keep,_frame_names,"
    "_is_unicode"
)
"""The two halves of `data.media`: what looks at a picture, and what looks for one."""


def picture_at(folder: Path) -> list[bytes]:
    return corpus.pictures()


def spoiled_picture(rng: Random, made: list[bytes]) -> Made:
    data = rng.choice(made)
    if rng.random() < 0.9:
        data = mutate.mutated_bytes(rng, data, made)
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:
        data = corpus.png_with_right_sums(data)
    return {"data": data}


def run_picture(_: Any, made: Made) -> Iterable[str]:
    width, height = media.picture_size(made["data"])
    pixels = media.decode(made["data"])
    if pixels.shape != (height, width, 3):
        yield "header and pixels differ"
    assert pixels.dtype == "uint8"
    yield "accepted"


@dataclass
class Places:
    """A media root, the names in it, and what is put into it under new names."""

    root: Path
    names: list[str]
    pictures: list[bytes]
    clips: list[bytes]
    spool: Path


def media_at(folder: Path) -> Places:
    root = corpus.media_root(folder)
    clips = list(corpus.clips(folder).values())
    (root / "many").mkdir()
    for number in range(6):
        (root / "many" / f"{number}.png").symlink_to(root / "a.png")
    _holes(root / "huge.png", media.MAX_FILE_BYTES + 1)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    (root / "heavy").mkdir()
    for number in range(3):
        _holes(root / "heavy" / f"{number}.png", media.MAX_MEDIA_BYTES // 3 + 1)
    return Places(root, [*names, "new.png", "new.mp4"], corpus.pictures(), clips, folder / "spool")


def _holes(file: Path, size: int) -> None:
    """A file of so many bytes that takes no room."""
    with file.open("wb") as empty:
        empty.truncate(size)


def spoiled_path(rng: Random, state: Places) -> Made:
    """A path that was tampered with, or a good one to a file that was."""
    path = rng.choice(state.names) if rng.randrange(2_000) else "heavy"
    new: dict[str, bytes] = {}
    if rng.random() < 0.3:
        path, good = rng.choice(
            (("new.png", state.pictures), ("many/new.png", state.pictures), ("new.mp4", state.clips))
        )
        data = rng.choice(good)
        new = {path: mutate.mutated_bytes(rng, data, good) if rng.random() < 0.7 else data}
        path = rng.choice((path, path.removesuffix("/new.png")))
    else:
        for _ in range(rng.choice((0, 1, 1, 2))):
            at, more = (
                rng.randint(0, len(path)),
                rng.choice((mutate.hostile_text(rng), "../", "/", "..\\", "./", "\ud800", "up/", "linked/")),
            )
            path = rng.choice((path[:at] + more + path[at:], f"{path}/{more}", f"{more}/{path}", more))
    return {
        "media": Media(rng.choice(("image", "video")), path),
        "new": new,
        "frames": rng.choice((1, 4, 40)),
        "deep": rng.random() < 0.5,
        "nowhere": rng.random() < 0.1,
    }


def run_media(state: Places, made: Made) -> Iterable[str]:
    for name in ("new.png", "many/new.png", "new.mp4"):
        (state.root / name).unlink(missing_ok=True)
    shutil.rmtree(state.spool, ignore_errors=True)
    for name, data in made["new"].items():
        (state.root / name).write_bytes(data)
    spool = state.root / "a.png" / "spool" if made["nowhere"] else state.spool  # under a file nothing can be kept
    root = MediaRoot(str(state.root), max_frames=made["frames"], video_frames=2, spool=str(spool))
    read = media.verify_media if made["deep"] else media.read_media
    try:
        filled = read(made["media"], root)
    except ValueError as error:
        if isinstance(error, MediaError) or not made["nowhere"]:
            raise
        yield "frames that cannot be kept: no fault of the row's"
        return
    assert corpus.SECRET not in filled.sizes, "a picture from outside the media root"
    assert media.read_media(made["media"], root).sha256 == filled.sha256, "read again, from where frames are kept"
    yield "accepted"


def clips_at(folder: Path) -> dict[str, Any]:
    made = corpus.clips(folder)
    return {"clips": [*made.values(), _of_64_bits(made["a.mp4"])], "path": folder / "clip.mp4"}


def _of_64_bits(clip: bytes) -> bytes:
    """The box of frames with its size in eight bytes, over the empty box that FFmpeg leaves in front for it."""
    at = clip.index(b"mdat") - 4
    size = int.from_bytes(clip[at : at + 4])
    assert clip[at - 8 : at] == b"\0\0\0\x08free"
    return clip[: at - 8] + b"\0\0\0\1mdat" + (size + 8).to_bytes(8) + clip[at + 8 :]


_BOX = b"\0\0\0\x08free"
_EXTREMES = (
    (b"", 0),
    (_BOX * (containers.MAX_BOXES + 1), 0),
    (b"RIFF\4\0\0\0AVI " * (containers.MAX_BOXES + 1), 0),
    (_BOX, video.MAX_FILE_BYTES + 1),
    (b"\x08\0\0\0moov", containers.MAX_INDEX_BYTES * 2),
    (b"\0\0\0\x18moovstsz\0\0\0\0\0\0\0\0\x7f\0\0\0", 0),
    (b"\0\0\0\x18moovstsz\0\0\0\0\0\0\0\1\x7f\0\0\0", 0),
    (b"\x1a\x45\xdf\xa3\x80" + b"\xec\x80" * (containers.MAX_BOXES + 1), 0),
    (b"\x1a\x45\xdf\xa3\x80\xec\xff" + bytes(20), 0),
)
"""Beginnings of files, and sizes up to which there is nothing more: beyond each bound of a container."""


def spoiled_clip(rng: Random, state: dict[str, Any]) -> Made:
    if rng.randrange(200) == 0:
        start, size = rng.choice(_EXTREMES)
        with state["path"].open("wb") as file:
            file.write(start)
            file.truncate(max(size, len(start)))
        return {"bytes": len(start)}
    data = rng.choice(state["clips"])
    kind = rng.random()
    if kind < 0.5:
        data = mutate.mutated_bytes(rng, data, state["clips"])
    elif kind < 0.95:  # at the fields of some box
        names = [
            m.end()
            for m in re.finditer(
                rb"ftyp|moov|mdat|moof|traf|trun|tfhd|stsz|stz2|stco|stsc|stts|stsd|tkhd|elst|mdhd|avih|strh|strf|idx1|movi|\x1f\x43\xb6\x75|\xae",
                data,
            )
        ]
        at = rng.choice(names or [0]) + rng.choice((-8, -4, 0, 4, 8, 12, 16, 24, 32))
        number = mutate._number(rng)
        data = data[: max(0, at)] + number + data[max(0, at) + len(number) :]
    state["path"].write_bytes(data)
    return {"bytes": len(data)}


def run_clip(state: dict[str, Any], made: Made) -> Iterable[str]:
    frames = video.read_frames(epath.Path(state["path"]), 3)
    assert video.unpack(video.pack(frames)) == frames
    assert all(media.decode(frame).shape[2] == 3 for frame in frames)
    yield "accepted"

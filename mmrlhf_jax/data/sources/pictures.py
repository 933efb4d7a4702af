"""The media a row names, and the pictures that stand in the row itself.

A picture is
- a string: a path under the media root, unless it starts with `data:`; then it is a data URI (RFC 2397) with base64:
  `data:image/png;base64,iVBOR...`. Nothing else makes a string anything but a path.
- bytes (a binary parquet column): the encoded picture.
- an object with nothing but `bytes` and `path`, the struct that `datasets` writes for its Image feature: `bytes` is the
  picture (bytes in parquet; in JSON a string, which is base64) and `path` then only a name; with `bytes` null or absent
  `path` is a path under the media root.

Pictures found in rows are put aside at once (`PictureStore`), so that a file of any size is read in bounded memory.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from mmrlhf_jax.data.media import MAX_FILE_BYTES
from mmrlhf_jax.data.sources.rows import MAX_MEDIA, RowError, text_of
from mmrlhf_jax.groups import Media

EMBEDDED = "embedded:"  # Media.path of a picture that stood in a row: this and the sha256 of its bytes

Store = Callable[[bytes], Media]

_DATA_URI = re.compile(r"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)


@dataclass(frozen=True)
class PictureStore:
    """Keeps encoded pictures under `directory`, each content once, in a file that `Media.path` names."""

    directory: epath.Path
    _kept: set[str] = field(default_factory=set)

    def __call__(self, encoded: bytes) -> Media:
        name = EMBEDDED + hashlib.sha256(encoded).hexdigest()
        if name not in self._kept:
            if not self._kept:
                self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / name).write_bytes(encoded)
            self._kept.add(name)
        return Media("image", name)


def is_embedded(media: Media) -> bool:
    """Whether the picture stood in a row, and lies in a `PictureStore`."""
    return media.path.startswith(EMBEDDED)


def media_of(image: Any, video: Any, store: Store | None) -> tuple[Media, ...]:
    """`image`: a picture or a list of them; `video`: a path; null or neither: text only."""
    if image is not None and video is not None:
        raise RowError("both 'image' and 'video' are set: keep one")
    if video is not None:
        return (video_of(video, "'video'"),)
    if image is None:
        return ()
    pictures = image if isinstance(image, list) else [image]
    if not pictures:
        raise RowError("'image' is an empty list: name a picture or leave it out")
    _check_count(pictures, "'image'")
    return tuple(picture_of(picture, "'image'", store) for picture in pictures)


def pictures_of(value: Any, where: str, store: Store | None) -> tuple[Media, ...]:
    """A list of pictures, or one; null and an empty list are none."""
    return tuple(picture_of(each, where, store) for each in _listed(value, where))


def videos_of(value: Any, where: str) -> tuple[Media, ...]:
    """A list of videos, or one; null and an empty list are none."""
    return tuple(video_of(each, where) for each in _listed(value, where))


def _listed(value: Any, where: str) -> list[Any]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    _check_count(values, where)
    return values


def _check_count(values: list[Any], where: str) -> None:
    if len(values) > MAX_MEDIA:
        raise RowError(f"{where} lists {len(values)}, more than {MAX_MEDIA}: no model takes so many")


def video_of(value: Any, where: str) -> Media:
    return Media("video", _path_of(value, where))


def picture_of(value: Any, where: str, store: Store | None) -> Media:
    """A picture by path, or put into `store`.

    Raises:
        RowError: it is none of the forms that the module names, or larger than a picture file may be.
    """
    if isinstance(value, dict):
        if unknown := sorted(set(value) - {"bytes", "path"}):
            raise RowError(f"{where} is an object with {', '.join(unknown)}; a picture has 'bytes' or 'path'")
        encoded = value.get("bytes")
        if encoded is None:
            return Media("image", _path_of(value.get("path"), f"{where}.path"))
        if isinstance(encoded, str):
            encoded = _base64(encoded, f"{where}.bytes")
        return _put(encoded, f"{where}.bytes", store)
    if isinstance(value, bytes):
        return _put(value, where, store)
    if isinstance(value, str) and value.startswith("data:"):
        head = _DATA_URI.match(value)
        if head is None:
            raise RowError(f"{where} is a data URI, but not data:image/...;base64,...")
        return _put(_base64(value[head.end() :], where), where, store)
    return Media("image", _path_of(value, where))


def _path_of(value: Any, where: str) -> str:
    path = text_of(value, where)
    if path.startswith(EMBEDDED):
        raise RowError(f"{where} starts with {EMBEDDED!r}, which no path may: rename the file")
    return path


def _base64(text: str, where: str) -> bytes:
    if len(text) > (MAX_FILE_BYTES + 2) // 3 * 4:
        raise _too_large(len(text) // 4 * 3, where)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"{where} is not base64: {error}") from error


def _put(encoded: Any, where: str, store: Store | None) -> Media:
    if not isinstance(encoded, bytes):
        raise RowError(f"{where} is neither bytes nor base64")
    if not encoded:
        raise RowError(f"{where} is empty")
    if len(encoded) > MAX_FILE_BYTES:
        raise _too_large(len(encoded), where)
    if store is None:
        raise RowError(f"{where} is an embedded picture, and there is no place to put it")
    return store(encoded)


def _too_large(count: int, where: str) -> RowError:
    return RowError(f"{where} has {count} bytes, more than {MAX_FILE_BYTES}: shrink the picture")

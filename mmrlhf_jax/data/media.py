"""Safe decoding of still pictures, and reading of the media a dataset names.

Pictures come from strangers: they are bounded by their header before a pixel is decoded, only still-picture formats
are opened, a truncated file is refused, and a path that leaves the media root is never followed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from etils import epath
from PIL import ExifTags, Image, ImageFile

from mmrlhf_jax import storage
from mmrlhf_jax.data import video
from mmrlhf_jax.groups import Media

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 89_478_485  # where Pillow itself begins to speak of decompression bombs: 256 MiB as RGB
MAX_FILE_BYTES = 256 * 2**20
MAX_FRAMES = 512
MAX_MEDIA_BYTES = 512 * 2**20  # encoded, of the frames in one directory and of a group: they are held together
MAX_JPEG_SCANS = 100  # an encoder writes about ten; each may touch all pixels and take but a few bytes
LARGE_PIXELS = 2**24  # from here on one picture is decoded at a time: decoded and converted, it takes 12 bytes a pixel

_large = threading.Lock()
_JPEG_MARKER = re.compile(
    rb"\xff([^\x00\xff\xd0-\xd7])"
)  # in entropy-coded data, where ff is followed by 00 or restarts

# EXIF orientation -> how to turn the stored pixels (CIPA DC-008, tag 0x0112); 1 is upright.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class MediaError(ValueError):
    """A picture or video that cannot be used: one line that names it and the cure."""


def decode(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded picture -> u8 RGB [height, width, 3], upright (EXIF orientation applied).

    The first frame of an animation. Transparency is dropped as `PIL.Image.convert("RGB")` drops it, which is what
    the model families' own processors see; 16-bit gray is scaled to 8 bits, not clipped.

    Raises:
        MediaError: not a whole picture of a known format, or more than `max_pixels`.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise MediaError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so a truncated picture would pass as whole: leave it False"
        )
    image = _open(encoded, max_pixels)
    orientation = _orientation(image)
    try:
        with _large if image.width * image.height > LARGE_PIXELS else contextlib.nullcontext():
            image.load()
            if orientation in _TRANSPOSE:
                image = image.transpose(_TRANSPOSE[orientation])
            return _rgb(image)
    except MediaError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise MediaError(f"picture cannot be decoded ({_one_line(error)}): replace the file or drop the row") from error


def picture_size(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) as `decode` would return them, from the header alone.

    Raises:
        MediaError: not a picture of a known format, or more than `max_pixels`.
    """
    image = _open(encoded, max_pixels)
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def suffix_of(encoded: bytes) -> str:
    """What the name of a file with this picture ends in, such as `.png`.

    Raises:
        MediaError: not a picture of a known format.
    """
    form = str(_open(encoded, MAX_PIXELS).format).lower()
    return {"jpeg": ".jpg", "tiff": ".tif", "mpo": ".jpg"}.get(form, f".{form}")


@dataclass(frozen=True, slots=True)
class MediaRoot:
    """The directory (local or gs://) under which every media path must lie, and the bounds on what is read."""

    path: str
    max_frames: int = MAX_FRAMES  # of a directory
    max_pixels: int = MAX_PIXELS
    video_frames: int = video.FRAMES  # taken from a video file
    spool: str | None = None  # a directory that keeps these, so that a second reading decodes nothing

    def resolve(self, relative: str) -> epath.Path:
        """The path under the root.

        Raises:
            MediaError: absolute, `..`, through a symlink that leaves the root, or missing.
        """
        parts = PurePosixPath(relative.replace("\\", "/")).parts
        if not parts or "\0" in relative or "://" in relative or not _is_unicode(relative):
            raise MediaError(f"{relative!r} is not a path relative to the media root: correct the row")
        if parts[0] == "/" or ".." in parts or parts[0].endswith(":"):
            raise MediaError(f"{relative!r} leaves the media root: name a path relative to {self.path}, without '..'")
        path = epath.Path(self.path).joinpath(*PurePosixPath(relative).parts)
        self.check_inside(path, relative)
        try:
            there = path.exists()
        except OSError as error:  # a name too long, a directory that may not be entered
            raise MediaError(f"{relative[:200]!r} cannot be looked for ({error.strerror}): correct the row") from error
        if not there:
            raise MediaError(f"{relative!r} is not under the media root {self.path}: add the file or correct --media")
        return path

    def check_inside(self, path: epath.Path, name: str) -> None:
        """Refuse symlinks out of a local root; buckets have none."""
        if "://" in self.path:
            return
        root, real = os.path.realpath(self.path), os.path.realpath(os.fspath(path))
        if os.path.commonpath([root, real]) != root:
            raise MediaError(f"{name!r} is a symlink that leaves the media root {self.path}: copy the file there")


def read_media(media: Media, root: MediaRoot) -> Media:
    """`media` with `encoded`, `sizes` and `sha256` filled; headers are checked, pixels are not decoded.

    A video is a directory of frame pictures in lexicographic order of file name (the released loader's order, so
    zero-pad the numbers); hidden files and files without a picture suffix are passed over. Or it is a video file, of
    which `root.video_frames` are taken, see `data.video`. A video's `sha256` is that of its frames' digests.

    Raises:
        MediaError: naming the path and the cure.
    """
    path = root.resolve(media.path)
    encoded: tuple[bytes, ...]
    if media.kind == "image":
        encoded = (_read_file(path, media.path),)
    elif video.is_video_name(media.path) and not path.is_dir():
        encoded = _frames_of_file(path, media.path, root)
    else:
        names = _frame_names(path, media.path, root.max_frames)
        for name in names:
            root.check_inside(path / name, f"{media.path}/{name}")
        encoded = tuple(_read_frames(path, names, media.path))
    sizes = []
    for index, data in enumerate(encoded):
        with _naming(media, index):
            sizes.append(picture_size(data, max_pixels=root.max_pixels))
    return dataclasses.replace(media, encoded=encoded, sizes=tuple(sizes), sha256=digest(encoded, media.kind))


def verify_media(media: Media, root: MediaRoot) -> Media:
    """`read_media`, and decode every picture: only the pixels prove that a file is whole."""
    filled = read_media(media, root)
    for index, (data, size) in enumerate(zip(filled.encoded, filled.sizes, strict=True)):
        with _naming(media, index):
            height, width, _ = decode(data, max_pixels=root.max_pixels).shape
            if (width, height) != size:
                raise MediaError(f"header says {size[0]}x{size[1]}, pixels are {width}x{height}: re-save the picture")
    return filled


def digest(encoded: tuple[bytes, ...], kind: str) -> str:
    """sha256 of a picture's bytes; of a video, sha256 over its frames' sha256, in order."""
    frames = [hashlib.sha256(data).digest() for data in encoded]
    return frames[0].hex() if kind == "image" else hashlib.sha256(b"".join(frames)).hexdigest()


@contextlib.contextmanager
def _naming(media: Media, index: int) -> Iterator[None]:
    """Puts the path (and frame) in front of a MediaError that knows only bytes."""
    try:
        yield
    except MediaError as error:
        frame = "" if media.kind == "image" else f" frame {index}"
        raise MediaError(f"{media.path!r}{frame}: {error}") from error


def _read_file(path: epath.Path, name: str) -> bytes:
    if storage.is_remote(path):
        return _read_object(path, name)
    if path.is_dir():
        raise MediaError(f"{name!r} is a directory, a picture was expected: frames belong under 'video'")
    stat = path.stat()
    if stat.length > MAX_FILE_BYTES:
        raise MediaError(f"{name!r} has {stat.length} bytes, more than {MAX_FILE_BYTES}: shrink the picture")
    if "://" not in os.fspath(path) and not os.path.isfile(path):
        raise MediaError(f"{name!r} is not a regular file: replace it by a picture")
    try:
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"{name!r} cannot be read ({_one_line(error)}): check its permissions") from error


def _read_frames(path: epath.Path, names: list[str], name: str) -> Iterator[bytes]:
    total = 0
    for frame in names:
        data = _read_file(path / frame, f"{name}/{frame}")
        total += len(data)
        if total > MAX_MEDIA_BYTES:
            raise MediaError(f"{name!r} has frames of more than {MAX_MEDIA_BYTES} bytes: shrink or thin them")
        yield data


def _read_object(path: epath.Path, name: str) -> bytes:
    """Of a bucket, in one request: to look at the object first would take eight, for every picture."""
    try:
        data = storage.read_bytes(path, MAX_FILE_BYTES + 1)
    except OSError as error:
        raise MediaError(f"{name!r} cannot be read ({_one_line(error)}): check the object") from error
    if len(data) > MAX_FILE_BYTES:
        raise MediaError(f"{name!r} has more than {MAX_FILE_BYTES} bytes: shrink the picture")
    return data


def _frames_of_file(path: epath.Path, name: str, root: MediaRoot) -> tuple[bytes, ...]:
    kept = root.spool and epath.Path(root.spool) / hashlib.sha256(os.fsencode(name)).hexdigest()
    if kept and kept.exists():
        return video.unpack(kept.read_bytes())
    try:
        frames = video.read_frames(path, root.video_frames, max_pixels=root.max_pixels)
    except video.VideoError as error:
        raise MediaError(f"{name!r}: {error}") from error
    except OSError as error:
        raise MediaError(f"{name!r} cannot be read ({_one_line(error)}): check its permissions") from error
    if kept:
        _keep(kept, video.pack(frames))
    return frames


def _keep(path: epath.Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:  # no fault of the row's
        raise ValueError(f"frames cannot be kept in {path.parent} ({_one_line(error)}): make room there") from error


def _frame_names(path: epath.Path, name: str, max_frames: int) -> list[str]:
    if not path.is_dir():
        raise MediaError(
            f"{name!r} is not a directory: a video is a directory of frame pictures, or a file ending in "
            f"{', '.join(sorted(video.SUFFIXES))}"
        )
    names = sorted(
        child.name
        for child in path.iterdir()
        if not child.name.startswith(".") and PurePosixPath(child.name).suffix.lower() in SUFFIXES
    )
    if not names:
        raise MediaError(f"{name!r} holds no pictures: extract the video's frames there")
    if len(names) > max_frames:
        raise MediaError(f"{name!r} has {len(names)} frames, more than {max_frames}: raise --max-frames or thin them")
    return names


def _open(encoded: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"picture is too large to decode ({_one_line(error)}): shrink the picture") from error
    except Exception as error:  # Pillow's parsers raise a dozen types on damaged headers
        raise MediaError(f"not a {', '.join(FORMATS)} picture: replace the file or drop the row") from error
    width, height = image.size
    if width * height > max_pixels:
        raise MediaError(f"picture has {width}x{height} pixels, more than {max_pixels}: shrink the picture")
    if encoded.startswith(b"\xff\xd8") and (scans := _jpeg_scans(encoded)) > MAX_JPEG_SCANS:
        raise MediaError(f"picture has {scans} or more scans, more than {MAX_JPEG_SCANS}: re-save the picture")
    return image


def _jpeg_scans(encoded: bytes) -> int:
    """How many scans a JPEG has (ITU-T T.81, B.1), counted no further than is refused."""
    at, scans = 2, 0
    while scans <= MAX_JPEG_SCANS and (found := _JPEG_MARKER.search(encoded, at)) is not None:
        at, marker = found.end(), found[1][0]
        if marker == 0xD9:  # end of image; what follows is no part of it
            break
        if marker not in (0x01, 0xD8):  # all others state their length
            scans += marker == 0xDA
            at += max(2, int.from_bytes(encoded[at : at + 2]))
    return scans


def _orientation(image: Image.Image) -> int:
    # Pillow turns a TIFF itself, in `size` and in `load`. The base class's getexif is asked because PNG's own would
    # decode the whole file to look for a tag behind the pixels. EXIF that cannot be parsed turns nothing: viewers
    # show such a picture as it is stored.
    if image.format == "TIFF":
        return 1
    try:
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint32)
        gray = ((deep + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257: rounds to the nearest of 256 levels
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise MediaError(f"picture has {image.mode!r} pixels of unknown range (32 bits): save it with 8 or 16 bits")
    image.info.pop("transparency", None)  # Pillow warns about it, then drops it
    return np.asarray(image.convert("RGB"))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate names no file
        return False
    return True


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

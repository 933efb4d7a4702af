"""Evenly spaced frames of a video file as encoded pictures, through PyAV (the `video` extra).

Decoded once, when a dataset is prepared (which proves all media before it writes any: between the two the frames wait
on disk, see `MediaRoot.spool`); training reads pictures. Frames are numbered as they are shown; with n of
them, those at linspace(0, n - 1, N) cut to integers are stored, all of a shorter clip: the rule of the released
loader, and of the renderer, which later takes its own `frames` of the stored ones by the same rule. (Store as many as
a run takes, and it sees just what the released loader saw.)

Stored as JPEG of quality 95 with full chroma. A frame comes out of a codec that has thrown far more away, so the
loss is below what can be seen or what a tower's resizing keeps, at a quarter of the bytes of PNG or less. Chroma is
not halved once more: after the codec's 4:2:0 that would blur coloured edges a second time.

Rotation and mirroring stated by the file are applied; a pixel that is not square stays one pixel, as the released
loader leaves it. Video files come from strangers: only three containers and the common codecs are opened, from a
file handle and nothing a file names; sizes are bounded before a frame is decoded, the numbers of packets, frames and
pixels as they come; nothing a header says about the number of frames is believed. What has an error in it is refused
whole.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from etils import epath
from PIL import Image

from mmrlhf_jax.data.containers import Container, VideoError, check_container

if TYPE_CHECKING:
    import av
    import av.container
    import av.video

SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"})
CODECS = frozenset(
    {"h264", "hevc", "av1", "libdav1d", "vp8", "libvpx", "vp9", "libvpx-vp9"}
    | {"mpeg4", "msmpeg4v2", "msmpeg4", "h263", "mpeg1video", "mpeg2video", "mjpeg"}
)
FRAMES = 32  # stored of a clip unless told otherwise: what the released scoring takes
MAX_FILE_BYTES = 2 * 2**30
MAX_SIDE = 16_384
MAX_PIXELS = 8192 * 4320  # of a frame: 8K
MAX_FRAMES = 36_000  # decoded of a clip: 20 minutes at 30 a second
MAX_DECODED_PIXELS = MAX_FRAMES * 1920 * 1080  # of a clip: as many in full HD
MAX_PACKETS = 1_000_000  # of all streams
JPEG_QUALITY, FULL_CHROMA = 95, 0


def is_video_name(name: str) -> bool:
    """Whether a path ends as video files do."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def read_frames(path: epath.Path, count: int, *, max_pixels: int = MAX_PIXELS) -> tuple[bytes, ...]:
    """At most `count` evenly spaced frames of the file at `path`, upright, each a JPEG file; the same file gives the
    same bytes.

    Raises:
        VideoError: PyAV is missing, or the file is no whole video within the bounds; the message leaves the path out.
        OSError: the file cannot be read.
    """
    _require_av()
    size = _checked_size(path)
    bound = min(max_pixels, MAX_PIXELS)
    with path.open("rb") as file:
        container = check_container(file, size)
        with _one_line_errors():
            # Packets are cheap to count and mostly are frames. Where they are not (fields, frames never shown), the
            # first decoding has counted, and a second one picks.
            guess = _count_packets(file, container, bound)
            frames, found = _decode(file, container, evenly(guess, count), bound)
            if found != guess:
                frames, _ = _decode(file, container, evenly(found, count), bound)
    return tuple(frames)


def pack(frames: Sequence[bytes]) -> bytes:
    """Frames as one file, a zip without compression."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, frame in enumerate(frames):
            archive.writestr(f"{number:06}.jpg", frame)
    return buffer.getvalue()


def unpack(packed: bytes) -> tuple[bytes, ...]:
    """Inverse of `pack`."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        return tuple(archive.read(name) for name in archive.namelist())


def evenly(total: int, count: int) -> list[int]:
    """Numbers of `count` frames of `total`, first and last included; all when there are no more."""
    return list(range(total)) if total <= count else np.linspace(0, total - 1, count).astype(int).tolist()


def _require_av() -> None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise VideoError(
            "reading video files needs PyAV: pip install 'mmrlhf-jax[video]', or extract the frames into a directory"
        ) from error


def _checked_size(path: epath.Path) -> int:
    if "://" not in os.fspath(path) and not os.path.isfile(path):  # a pipe would never end
        raise VideoError("not a regular file: replace it by a video")
    size = path.stat().length
    if not size:
        raise VideoError("the file is empty: copy or download it again")
    if size > MAX_FILE_BYTES:
        raise VideoError(f"{size} bytes, more than {MAX_FILE_BYTES}: cut or shrink the video")
    return size


def _count_packets(file: BinaryIO, container: Container, max_pixels: int) -> int:
    """Packets of the video stream."""
    count = 0
    with _opened(file, container, max_pixels) as (opened, stream):
        for number, packet in enumerate(opened.demux()):
            if number >= MAX_PACKETS:
                raise VideoError(f"more than {MAX_PACKETS} packets: cut the video")
            if packet.stream.index != stream.index or not packet.size:
                continue
            if packet.is_corrupt:
                raise VideoError(f"packet {count} is damaged or cut off: copy or download the file again")
            count += 1
            if count > MAX_FRAMES:
                raise VideoError(_too_long())
    return count


def _decode(file: BinaryIO, container: Container, wanted: Collection[int], max_pixels: int) -> tuple[list[bytes], int]:
    """The frames `wanted`, encoded, and how many there are in all."""
    taken, frames, number, pixels = set(wanted), [], 0, 0
    with _opened(file, container, max_pixels) as (opened, stream):
        for frame in opened.decode(stream):
            pixels += _check_size(frame.width, frame.height, max_pixels)
            if number >= MAX_FRAMES or pixels > MAX_DECODED_PIXELS:
                raise VideoError(_too_long())
            if frame.is_corrupt:
                raise VideoError(f"frame {number} is damaged: copy or download the file again")
            if number in taken:
                frames.append(_encode(frame))
            number += 1
    if not number:
        raise VideoError("its video stream holds no frame: replace the file or drop the row")
    return frames, number


@contextlib.contextmanager
def _opened(
    file: BinaryIO, container: Container, max_pixels: int
) -> Iterator[tuple[av.container.InputContainer, av.video.VideoStream]]:
    """The file in FFmpeg's hands, and the stream that is the video: the first that is not a cover picture."""
    import av

    file.seek(0)
    # Decoders get a bound too, for sizes that stand inside the stream: opening a file decodes some. It is a wider one,
    # because they count borders and scratch space.
    bounds = {"max_pixels": str(2 * max_pixels + 2**16)}
    with av.open(
        file,
        mode="r",
        format=container,
        options={**bounds, "codec_whitelist": ",".join(sorted(CODECS))},
        metadata_errors="replace",
        io_open=_refuse_to_open,
    ) as opened:
        videos = [s for s in opened.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not videos:
            raise VideoError("holds no video stream: replace the file or drop the row")
        stream, codec = videos[0], videos[0].codec_context
        if codec is None or codec.name not in CODECS:
            name = "of an unknown kind" if codec is None else codec.name
            raise VideoError(f"its video is {name}, which is not read: re-encode it as H.264 (in .mp4)")
        _check_size(codec.width, codec.height, max_pixels)
        codec.options = bounds
        codec.thread_count = 1  # with more, what becomes of a damaged frame depends on which thread comes first
        yield opened, stream


def _refuse_to_open(url: str, *_: Any) -> Any:
    raise VideoError("names another file to read from: copy the video itself")


def _check_size(width: int, height: int, max_pixels: int) -> int:
    """Pixels of a frame."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= max_pixels):
        raise VideoError(
            f"frames of {f'{width}x{height} pixels' if width and height else 'no readable size'}; at most "
            f"{max_pixels} pixels, {MAX_SIDE} a side, are read: shrink the video"
        )
    return width * height


def _too_long() -> str:
    return (
        f"more than {MAX_FRAMES} frames, or {MAX_DECODED_PIXELS} pixels in all: cut it into shorter clips, or extract "
        "frames into a directory"
    )


def _encode(frame: av.VideoFrame) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(_upright(frame.to_ndarray(format="rgb24"), frame))
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=FULL_CHROMA)
    return buffer.getvalue()


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """The frame as its display matrix shows it: u8 [height, width, 3].

    The matrix is nine i32, of which [0], [1] and [3], [4] say where the stored x and y axes point on the screen
    (ISO/IEC 14496-12, 8.3.2; both y axes point down).
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if not ((b == c == 0 and a and d) or (a == d == 0 and b and c)):
        raise VideoError("turned by no multiple of 90 degrees: re-encode the video upright")
    if a == d == 0:
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1])


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    import av

    try:
        yield
    except VideoError:
        raise
    except Exception as error:  # FFmpeg and PyAV raise a dozen types on damaged files
        # FFmpeg asks a file for places that no file has where a damaged index names them
        nowhere = isinstance(error, OSError) and error.errno == errno.EINVAL
        if isinstance(error, OSError) and not isinstance(error, av.FFmpegError) and not nowhere:
            raise  # the file's own
        said = getattr(error, "strerror", None) or str(error)  # strerror leaves out the path on this machine
        reason = " ".join(said.split()) or type(error).__name__
        raise VideoError(f"cannot be decoded ({reason}): replace the file or drop the row") from error

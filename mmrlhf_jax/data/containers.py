"""Which container a video file is by its own first bytes, and whether all of it is there.

A cut-off download still plays: decoders give the frames that arrived and call it the end. The outermost sizes a
container states are compared with the file instead, before a decoder sees it; and the numbers for which FFmpeg would
make room unseen are bounded. Naming the container here also keeps FFmpeg from guessing: among what it would guess are
playlists, which name other files and addresses.

Formats: ISO/IEC 14496-12 (boxes), the RIFF and OpenDML AVI descriptions, RFC 8794 (EBML) and RFC 9559 (Matroska).
"""

from __future__ import annotations

import re
from typing import BinaryIO, Literal

Container = Literal["mov", "avi", "matroska"]

MAX_BOXES = 100_000  # top-level parts of a file that are looked at; a fragment of an MP4 stream is two
MAX_INDEX_BYTES = 64 * 2**20
MAX_SAMPLES = 2_000_000  # in the index, of all tracks
SOUND_SAMPLES = 32  # samples of one size that count as one: uncompressed sound has 48,000 a second

_TABLES, _TABLES_OF_FRAGMENTS = re.compile(rb"stsz|stz2"), re.compile(rb"stsz|stz2|trun")
_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"})
_BOXES_OF_FRAMES = frozenset({b"moov", b"moof", b"mdat"})
_BOXES_NOT_READ = frozenset({b"mdat", b"free", b"skip"})
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


class VideoError(ValueError):
    """A video file that cannot be used: what is wrong and the cure, in one line without the path."""


def check_container(file: BinaryIO, size: int) -> Container:
    """The container of `file`, which has `size` bytes, as FFmpeg names it.

    Raises:
        VideoError: another container, or the file is shorter than it says.
    """
    file.seek(0)
    head = file.read(12)
    if head[4:8] in _FIRST_BOXES:
        container, promised = "mov", _end_of_boxes(file, size)
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        container, promised = "avi", _end_of_riff(file, size)
    elif int.from_bytes(head[:4]) == _EBML:
        container, promised = "matroska", _end_of_segment(file, size)
    else:
        raise VideoError("not an MP4, MOV, AVI, MKV or WEBM file, whatever its name says: replace it or drop the row")
    if promised > size:
        raise VideoError(f"truncated: {size} bytes of {promised}: copy or download the file again")
    return container  # type: ignore[return-value]


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box that holds frames or their index ends. Junk after the boxes is passed over, as players do."""
    at = end = samples = 0
    fragments = False
    for _ in range(MAX_BOXES):
        if at + 8 > size:
            return end
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4]), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16])
        if length == 0:
            length = size - at  # the last box
        if length < 8:
            return end
        fragments |= kind == b"moof"
        if kind not in _BOXES_NOT_READ:
            samples += _promised_samples(file, at, min(length, size - at), size, fragments)
        if samples > MAX_SAMPLES:
            raise VideoError(f"an index of more than {MAX_SAMPLES} samples: cut or re-encode the video")
        at += length
        if kind in _BOXES_OF_FRAMES:
            end = at
    raise VideoError(f"more than {MAX_BOXES} top-level boxes: re-encode the video")


def _promised_samples(file: BinaryIO, at: int, length: int, size: int, fragments: bool) -> int:
    """How many samples the tables in a box say there are.

    A sample table (stsz, stz2) or a run of a fragment (trun) may state any number without listing as many, and FFmpeg
    makes room for all when it reads the number: a few bytes could ask for all memory. Tables are found by their names
    wherever they stand, since FFmpeg takes them in more places than the standard. Where no fragment has begun, the
    letters of `trun` are a word's in some title, and a fragment's header is refused. Raises VideoError at what no
    honest file states.
    """
    if length > MAX_INDEX_BYTES:
        raise VideoError(f"an index of {length} bytes, more than {MAX_INDEX_BYTES}: cut or re-encode the video")
    file.seek(at)
    box = file.read(length)
    if b"cmov" in box or (b"tfhd" in box and not fragments):
        raise VideoError("its index is compressed, or in a place where none belongs: re-encode the video")
    samples = 0
    for match in (_TABLES_OF_FRAGMENTS if fragments else _TABLES).finditer(box):
        fields = box[match.end() + 4 : match.end() + 12].ljust(8, b"\0")
        first, second = int.from_bytes(fields[:4]), int.from_bytes(fields[4:])
        if match[0] == b"trun":
            samples += first
        elif match[0] == b"stsz" and first:  # all of one size
            if first * second > size:
                raise VideoError("its index promises more than the file holds: copy or download the file again")
            samples += second // SOUND_SAMPLES
        else:
            samples += second
    return samples


def _end_of_riff(file: BinaryIO, size: int) -> int:
    """Where the last RIFF chunk (of which a large AVI has several) ends."""
    at = end = 0
    for _ in range(MAX_BOXES):
        file.seek(at)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if len(head) < 8 or head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):  # sizes a recorder never filled in
            return end
        at += 8 + length + length % 2
        end = at - 8 - length % 2  # some writers count the eight bytes of the chunk's head, and drop the padding
    raise VideoError(f"more than {MAX_BOXES} RIFF chunks: re-encode the video")


def _end_of_segment(file: BinaryIO, size: int) -> int:
    """Where the Matroska segment ends; 0 where its size is not stated, as in live recordings."""
    at = 0
    for _ in range(MAX_BOXES):
        if at >= size:
            break
        file.seek(at)
        head = file.read(12)
        id_length, _ = _vint(head)
        length_length, length = _vint(head[id_length:])
        unknown = length == 2 ** (7 * length_length) - 1
        found = int.from_bytes(head[:id_length]) == _SEGMENT
        at += id_length + length_length + (0 if unknown else length)
        if found:
            return 0 if unknown else at
        if unknown:
            break
    raise VideoError("truncated or damaged: no Matroska segment in it: copy or download the file again")


def _vint(data: bytes) -> tuple[int, int]:
    """Length in bytes and value, marker removed, of the EBML number at the start of `data`."""
    length = 9 - data[0].bit_length() if data else 9
    if length > 8 or len(data) < length:
        raise VideoError("truncated or damaged: no Matroska segment in it: copy or download the file again")
    return length, int.from_bytes(data[:length]) & (2 ** (7 * length) - 1)

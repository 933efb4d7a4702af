from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import SHARED, picture, row, write_rows
from etils import epath
from PIL import Image
from small_world import ROOT, metrics

from mmrlhf_jax.command import CommandError
from mmrlhf_jax.data import containers, video
from mmrlhf_jax.data.dataset import DatasetError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.media import MediaError, MediaRoot, decode, read_media, verify_media
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.groups import Media
from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.training.recipe import read_recipe
from mmrlhf_jax.training.train import train

av = pytest.importorskip("av")

SIZE = (64, 48)
REAL = SHARED / "data" / "sharegpt_demo" / "mllm_demo_data"


def write_clip(
    path: Path, frames: int = 20, size: tuple[int, int] = SIZE, codec: str = "mpeg4", **options: Any
) -> Path:
    """Frame i is gray of level 10 i, so that a frame says its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [np.full((size[1], size[0], 3), 10 * i % 250, np.uint8) for i in range(frames)]
    return write_pictures(path, pictures, codec, **options)


def write_pictures(path: Path, pictures: list[np.ndarray], codec: str = "mpeg4", **options: Any) -> Path:
    height, width, _ = pictures[0].shape if pictures else (48, 64, 3)
    with av.open(str(path), "w", options=options) as out:
        # the threshold: grays that jump would make a key frame of every frame
        stream = out.add_stream(codec, rate=10, bit_rate=4_000_000, options={"sc_threshold": "1000000000"})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "rgb24" if codec == "png" else "yuv420p"
        if not pictures:
            out.start_encoding()  # else only the first packet writes the header
        for pixels in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        out.mux(stream.encode())
    return path


def write_long(path: Path, frames: int, shown: dict[int, int]) -> Path:
    """As many frames of 16 x 16 pixels, black but for those of `shown`: frame -> gray. Each picture is encoded once."""
    encoded = {}
    for gray in {0, *shown.values()}:
        buffer = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), gray, np.uint8)).save(buffer, "JPEG")
        encoded[gray] = buffer.getvalue()
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        out.start_encoding()
        for number in range(frames):
            packet = av.Packet(encoded[shown.get(number, 0)])
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, stream.time_base, number, number
            packet.duration = 1
            out.mux(packet)
    return path


@contextlib.contextmanager
def bounded(seconds: float, megabytes: float) -> Iterator[None]:
    """What runs within takes no longer, and at no moment more memory beyond what the process has already."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731
    before, seen, ended = resident(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            seen.append(resident() - before)

    watcher, began = threading.Thread(target=watch), time.process_time()
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert time.process_time() - began < seconds
    assert max(seen) < megabytes * 1e6


def write_sound(path: Path, cover: bool = False) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        stream.layout = "mono"
        front = out.add_stream("mjpeg") if cover else None
        if front is not None:
            front.width, front.height, front.pix_fmt = 64, 48, "yuvj420p"
            front.disposition = av.stream.Disposition.attached_pic.value
            out.start_encoding()
            out.mux(front.encode(av.VideoFrame(64, 48, "yuvj420p")))
        for i in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, 1024 * i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def patch(path: Path, box: bytes, at: int, data: bytes) -> Path:
    """Overwrite bytes of the header, counted from the end of a box's four-letter name."""
    whole = bytearray(path.read_bytes())
    start = whole.rindex(box) + 4 + at
    whole[start : start + len(data)] = data
    path.write_bytes(bytes(whole))
    return path


def numbers(media: Media) -> list[int]:
    """Which frames these are, told from their gray."""
    return [round(float(decode(data).mean()) / 10) for data in media.encoded]


@pytest.fixture
def root(tmp_path: Path) -> MediaRoot:
    (tmp_path / "media").mkdir()
    return MediaRoot(str(tmp_path / "media"), video_frames=8)


def clip(root: MediaRoot, name: str = "clip.mp4", **options: Any) -> Path:
    return write_clip(Path(root.path) / name, **options)


def refusal(root: MediaRoot, name: str = "clip.mp4") -> str:
    """The one line that refuses the file."""
    with pytest.raises(MediaError) as caught:
        read_media(Media("video", name), root)
    message = str(caught.value)
    assert message.startswith(f"'{name}'")
    assert "\n" not in message
    return message


# Which frames, and how they are kept.


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.mp4", "mpeg4"),
        ("CLIP.MP4", "mpeg4"),
        ("clip.m4v", "mpeg4"),
        ("clip.mov", "mjpeg"),
        ("clip.avi", "mpeg4"),
        ("clip.mkv", "mpeg4"),
        ("clip.webm", "libvpx"),
        ("clip.mp4", "libx264"),
        ("clip.mkv", "libx265"),
    ],
)
def test_evenly_spaced_frames_of_every_container_are_kept(root: MediaRoot, name: str, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    clip(root, name, codec=codec)
    media = verify_media(Media("video", name), root)
    assert numbers(media) == [0, 2, 5, 8, 10, 13, 16, 19] == np.linspace(0, 19, 8).astype(int).tolist()
    assert media.sizes == (SIZE,) * 8


def test_all_frames_of_a_shorter_clip_are_kept(root: MediaRoot) -> None:
    clip(root, frames=8)
    clip(root, "one.mp4", frames=1)
    assert numbers(read_media(Media("video", "clip.mp4"), root)) == list(range(8))
    assert numbers(read_media(Media("video", "one.mp4"), root)) == [0]


def test_frames_shown_are_counted_where_packets_are_something_else(root: MediaRoot) -> None:
    """An edit list that starts late: its first frames are in the file, but are not shown."""
    media_time = len(b"elst") - 4 + 12  # version, entries, duration
    file = clip(root)
    with av.open(str(file)) as opened:
        ticks = opened.streams.video[0].duration // 20
    patch(file, b"elst", media_time, struct.pack(">i", 5 * ticks))
    assert numbers(read_media(Media("video", "clip.mp4"), root)) == [5, 7, 9, 11, 13, 15, 17, 19]


def test_the_same_file_gives_the_same_bytes(root: MediaRoot) -> None:
    clip(root)
    once, again = (read_media(Media("video", "clip.mp4"), root) for _ in range(2))
    assert once.encoded == again.encoded
    assert once == again


def test_what_storing_a_frame_loses_cannot_be_seen(root: MediaRoot) -> None:
    """Coloured stripes, where a second halving of the chroma would show."""
    stripes = np.zeros((48, 64, 3), np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = stripes[:, 2::8] = stripes[:, 3::8] = (220, 30, 40)
    file = write_pictures(Path(root.path) / "clip.mp4", [stripes])
    (stored,) = (decode(data) for data in read_media(Media("video", "clip.mp4"), root).encoded)
    with av.open(str(file)) as opened:
        shown = next(opened.decode(video=0)).to_ndarray(format="rgb24")
    error = np.square(stored.astype(float) - shown).mean()
    assert 10 * np.log10(255**2 / error) > 40


# stored x and y axes -> where they point on the screen
TURNS = {
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): np.rot90,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
}


def turn(file: Path, a: int, b: int, c: int, d: int) -> None:
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    patch(file, b"tkhd", 40, matrix)


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_stand_upright(root: MediaRoot, matrix: tuple[int, int, int, int]) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(picture(size=SIZE))).convert("RGB"))
    turn(write_pictures(Path(root.path) / "clip.mp4", [pixels]), *matrix)
    media = verify_media(Media("video", "clip.mp4"), root)
    upright = TURNS[matrix](pixels)
    assert np.abs(decode(media.encoded[0]).astype(int) - upright).mean() < 6
    assert media.sizes == ((upright.shape[1], upright.shape[0]),)


# Refusals.


def test_a_turn_by_another_angle_is_refused(root: MediaRoot) -> None:
    turn(clip(root), 1, 1, -1, 1)
    assert "turned by no multiple of 90 degrees: re-encode the video upright" in refusal(root)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.mkv", "clip.mov"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(root: MediaRoot, name: str, kept: float) -> None:
    data = clip(root, name, frames=60).read_bytes()
    (Path(root.path) / name).write_bytes(data[: int(len(data) * kept)])
    assert "truncated" in refusal(root, name)


def test_a_file_truncated_behind_its_index_is_refused(root: MediaRoot) -> None:
    """The index in front promises all frames, and players show those that are there."""
    data = clip(root, frames=60, movflags="faststart").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    (Path(root.path) / "clip.mp4").write_bytes(data[:-1])
    assert f"truncated: {len(data) - 1} bytes of {len(data)}: copy or download the file again" in refusal(root)


def test_junk_behind_the_last_box_is_passed_over(root: MediaRoot) -> None:
    file = clip(root)
    file.write_bytes(file.read_bytes() + b"\xff\xff\xff\xffjunk")
    assert len(read_media(Media("video", "clip.mp4"), root).encoded) == 8


def test_a_missing_index_is_refused(root: MediaRoot) -> None:
    file = clip(root)
    file.write_bytes(file.read_bytes()[: file.read_bytes().index(b"moov") - 4])
    assert "cannot be decoded" in refusal(root)
    assert "replace the file or drop the row" in refusal(root)


def test_a_damaged_frame_is_refused_not_painted_over(root: MediaRoot) -> None:
    file = clip(root, size=(320, 240))
    whole = bytearray(file.read_bytes())
    start = whole.index(b"mdat") + 200
    whole[start : start + 400] = bytes(400)
    file.write_bytes(bytes(whole))
    assert "frame 0 is damaged" in refusal(root) or "cannot be decoded" in refusal(root)


def test_a_frame_is_bounded_by_its_header(root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(root, size=(640, 480))
    monkeypatch.setattr(video, "_decode", lambda *_: pytest.fail("a frame was decoded"))
    small = MediaRoot(root.path, max_pixels=300_000)
    assert "frames of 640x480 pixels; at most 300000 pixels, 16384 a side, are read: shrink" in refusal(small)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mjpeg", "libvpx"])
def test_a_frame_larger_than_its_header_says_is_not_decoded(
    root: MediaRoot, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    bounded = MediaRoot(root.path, max_pixels=140_000)
    small, large = (struct.pack(">HHHH", 0xB082, w, 0xBA82, h) for w, h in ((512, 256), (768, 512)))  # Matroska's
    clip(root, frames=2, size=(768, 512), codec=codec, name="large.mkv")
    clip(root, frames=2, size=(512, 256), codec=codec, name="small.mkv")
    assert read_media(Media("video", "small.mkv"), bounded).sizes == ((512, 256),) * 2
    data = (Path(root.path) / "large.mkv").read_bytes()
    assert data.count(large) == 1
    (Path(root.path) / "liar.mkv").write_bytes(data.replace(large, small))
    monkeypatch.setattr(video, "_encode", lambda *_: pytest.fail("a frame was decoded"))
    assert re.search("cannot be decoded|no readable size|frames of 768x512 pixels", refusal(bounded, "liar.mkv"))
    monkeypatch.setattr(video, "_check_size", lambda width, height, bound: width * height)  # the decoder's bound alone
    assert "cannot be decoded" in refusal(bounded, "liar.mkv")


def test_the_number_of_frames_is_bounded(root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(root)
    message = "more than 19 frames, or .* pixels in all: cut it into shorter clips, or extract frames"
    monkeypatch.setattr(video, "MAX_FRAMES", 19)
    with pytest.raises(MediaError, match=message):
        read_media(Media("video", "clip.mp4"), root)
    monkeypatch.setattr(video, "_count_packets", lambda *_: 1)  # were there more frames than packets
    with pytest.raises(MediaError, match=message):
        read_media(Media("video", "clip.mp4"), root)


LONGEST = 36_000


@pytest.mark.parametrize("name", ["clip.avi", "clip.mkv"])
def test_a_clip_of_65_537_frames_is_refused_by_name_at_once(root: MediaRoot, name: str) -> None:
    write_long(Path(root.path) / name, 65_537, {})
    with bounded(seconds=5, megabytes=64):
        message = refusal(root, name)
    assert "more than 36000 frames, or " in message
    assert "cut it into shorter clips, or extract frames into a directory" in message


def test_the_longest_clip_that_is_read_gives_the_right_frames(root: MediaRoot) -> None:
    """Twenty minutes. Its neighbours are black: a frame further on or back would show."""
    wanted = np.linspace(0, LONGEST - 1, 8).astype(int).tolist()
    assert wanted[1] == 5142
    write_long(Path(root.path) / "clip.mkv", LONGEST, {frame: 10 * (k + 1) for k, frame in enumerate(wanted)})
    with bounded(seconds=30, megabytes=64):
        media = read_media(Media("video", "clip.mkv"), root)
    assert numbers(media) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_number_of_pixels_is_bounded(root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(root)
    monkeypatch.setattr(video, "MAX_DECODED_PIXELS", 20 * 64 * 48 - 1)
    assert "pixels in all: cut it into shorter clips" in refusal(root)


def test_the_number_of_packets_is_bounded_whatever_they_are_of(
    root: MediaRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip(root)
    monkeypatch.setattr(video, "MAX_PACKETS", 10)
    assert "more than 10 packets: cut the video" in refusal(root)


def test_the_number_of_boxes_is_bounded(root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_BOXES", 50)
    (Path(root.path) / "clip.mp4").write_bytes(struct.pack(">I4s", 8, b"free") * 60)
    (Path(root.path) / "clip.avi").write_bytes(struct.pack("<4sI4s", b"RIFF", 4, b"AVI ") * 60)
    assert "more than 50 top-level boxes: re-encode" in refusal(root)
    assert "more than 50 RIFF chunks: re-encode" in refusal(root, "clip.avi")


def test_the_size_of_the_file_is_bounded(root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(root)
    monkeypatch.setattr(video, "MAX_FILE_BYTES", 1000)
    assert "bytes, more than 1000: cut or shrink the video" in refusal(root)


@pytest.mark.parametrize("claimed", [0, 3, 2**31 - 1])
def test_a_header_that_lies_about_its_frame_count_is_not_believed(root: MediaRoot, claimed: int) -> None:
    file = clip(root, "clip.avi")
    patch(file, b"strh", 4 + 32, struct.pack("<I", claimed))
    patch(file, b"avih", 4 + 16, struct.pack("<I", claimed))
    assert numbers(read_media(Media("video", "clip.avi"), root)) == [0, 2, 5, 8, 10, 13, 16, 19]


@pytest.mark.parametrize(
    ("each", "count", "message"),
    [
        (0, 2**27, "an index of more than 2000000 samples: cut or re-encode the video"),
        (1, 2**27, "its index promises more than the file holds: copy or download the file again"),
        (0, 2000, "its video stream holds no frame|cannot be decoded|damaged or cut off"),
    ],
)
def test_no_room_is_made_for_an_index_that_lies(root: MediaRoot, each: int, count: int, message: str) -> None:
    patch(clip(root), b"stsz", 4, struct.pack(">II", each, count))
    assert re.search(message, refusal(root))


def test_no_room_is_made_for_fragments_that_lie(root: MediaRoot) -> None:
    clip(root, movflags="frag_keyframe+empty_moov")
    assert len(read_media(Media("video", "clip.mp4"), root).encoded) == 8
    file = Path(root.path) / "clip.mp4"
    honest = file.read_bytes()
    patch(file, b"trun", 4, struct.pack(">I", 2**27))
    assert "an index of more than 2000000 samples" in refusal(root)
    file.write_bytes(honest.replace(b"moof", b"moov"))
    assert "in a place where none belongs: re-encode the video" in refusal(root)


def test_words_in_a_title_are_no_index(root: MediaRoot) -> None:
    file = clip(root)
    file.write_bytes(file.read_bytes() + struct.pack(">I4s", 40, b"uuid") + b"a truncated elephant's trunk....")
    assert len(read_media(Media("video", "clip.mp4"), root).encoded) == 8


def test_a_stream_without_frames_is_refused(root: MediaRoot) -> None:
    clip(root, "clip.avi", frames=0)
    assert "its video stream holds no frame: replace the file or drop the row" in refusal(root, "clip.avi")


def test_sound_alone_is_refused_with_or_without_a_cover_picture(root: MediaRoot) -> None:
    write_sound(Path(root.path) / "sound.mp4")
    write_sound(Path(root.path) / "cover.mp4", cover=True)
    for name in ("sound.mp4", "cover.mp4"):
        assert "holds no video stream: replace the file or drop the row" in refusal(root, name)


def test_codecs_hardly_anyone_uses_are_not_opened(root: MediaRoot) -> None:
    clip(root, "clip.mov", codec="png")
    assert "its video is png, which is not read: re-encode it as H.264 (in .mp4)" in refusal(root, "clip.mov")


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\nhttp://127.0.0.1:9/x.ts\n"


@pytest.mark.parametrize(
    "data",
    [PLAYLIST, b"ffconcat version 1.0\nfile 'other.mp4'\n", b"hello", picture(format="GIF"), b"RIFF    WAVEfmt "],
)
def test_a_file_is_what_its_bytes_say_and_names_no_other(root: MediaRoot, data: bytes) -> None:
    clip(root, "other.mp4")
    (Path(root.path) / "clip.mp4").write_bytes(data)
    assert "not an MP4, MOV, AVI, MKV or WEBM file, whatever its name says" in refusal(root)


def test_no_file_that_cannot_end_or_has_not_begun_is_read(root: MediaRoot) -> None:
    (Path(root.path) / "empty.mp4").write_bytes(b"")
    os.mkfifo(Path(root.path) / "pipe.mp4")
    assert "the file is empty: copy or download it again" in refusal(root, "empty.mp4")
    assert "not a regular file: replace it by a video" in refusal(root, "pipe.mp4")


@pytest.mark.parametrize("path", ["../clip.mp4", "/clip.mp4", "http://example.org/clip.mp4"])
def test_paths_of_videos_are_held_to_the_root(root: MediaRoot, tmp_path: Path, path: str) -> None:
    write_clip(tmp_path / "clip.mp4")
    os.symlink(tmp_path / "clip.mp4", Path(root.path) / "link.mp4")
    assert "media root" in refusal(root, path)
    assert "symlink that leaves the media root" in refusal(root, "link.mp4")


def test_a_gif_is_no_video_file(root: MediaRoot) -> None:
    (Path(root.path) / "clip.gif").write_bytes(picture(format="GIF"))
    assert "a video is a directory of frame pictures, or a file ending in .avi, .m4v, .mkv" in refusal(root, "clip.gif")


def test_without_pyav_the_extra_is_named(root: MediaRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(root)
    monkeypatch.setitem(sys.modules, "av", None)
    assert "reading video files needs PyAV: pip install 'mmrlhf-jax[video]', or extract the frames" in refusal(root)


def test_a_directory_may_be_named_like_a_file(root: MediaRoot) -> None:
    (Path(root.path) / "clip.mp4").mkdir()
    (Path(root.path) / "clip.mp4" / "1.png").write_bytes(picture())
    assert read_media(Media("video", "clip.mp4"), root).encoded == (picture(),)


# Prepared, and trained on.


def options(tmp_path: Path, **changes: Any) -> PrepareOptions:
    rows = [row(id=name, image=None, video=name) for name in ("a.mp4", "b.webm", "broken.mp4")]
    defaults = {"source": "mm_rlhf", "inputs": (write_rows(tmp_path / "in.jsonl", rows),), "max_rejected": 0.5}
    where = {"media": str(tmp_path / "media"), "output": str(tmp_path / "out")}
    return PrepareOptions(**{**defaults, **where, **changes})


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    write_clip(tmp_path / "media" / "a.mp4", frames=40)
    write_clip(tmp_path / "media" / "b.webm", frames=5, codec="libvpx")
    (tmp_path / "media" / "broken.mp4").write_bytes(b"no video")
    return tmp_path


def test_a_prepared_video_is_its_frames_and_a_broken_one_costs_its_own_row(clips: Path) -> None:
    report = prepare(options(clips, video_frames=12))
    assert (report.videos, report.frames) == (2, 17)
    (rejected,) = report.rejected
    assert rejected.origin.line == 3
    assert rejected.reason.startswith("'broken.mp4': not an MP4")
    first, second = (open_dataset(clips / "out").with_media(i).media[0] for i in range(2))
    assert numbers(first)[:3] == [0, 3, 7]
    assert len(second.encoded) == 5


def test_a_video_is_decoded_once_and_nothing_is_left_behind(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    read = video.read_frames

    def counted(path: Any, count: int, **bounds: Any) -> tuple[bytes, ...]:
        decoded.append(path.name)
        return read(path, count, **bounds)

    monkeypatch.setattr(video, "read_frames", counted)
    (clips / ".out.frames").mkdir()  # a run that was killed here had another a.mp4
    (clips / ".out.frames" / hashlib.sha256(b"a.mp4").hexdigest()).write_bytes(video.pack([picture()]))
    assert prepare(options(clips)).frames == 37
    assert sorted(decoded) == ["a.mp4", "b.webm", "broken.mp4"]
    assert sorted(path.name for path in clips.iterdir()) == ["in.jsonl", "media", "out"]


def test_a_full_disk_is_not_the_fault_of_a_row(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(epath.Path(clips)), "write_bytes", full)
    with pytest.raises(CommandError, match=r"out: No space left on device .*frames cannot be kept.*make room there"):
        prepare(options(clips))


def test_how_many_frames_are_stored_is_part_of_the_dataset(clips: Path) -> None:
    prepare(options(clips))
    with pytest.raises(DatasetError, match="different: video_frames"):
        prepare(options(clips, video_frames=12))


@pytest.mark.slow
def test_a_run_trains_on_video_files(clips: Path, small_world: Any) -> None:
    prepare(options(clips, video_frames=12))
    for file in (clips / "media").iterdir():
        file.unlink()  # a run reads what was stored
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    asked = {"model": small_world.model, "dataset": str(clips / "out"), "reference": "online"}
    train(dataclasses.replace(tiny, render=RenderOptions(frames=4), **asked), clips / "run")
    (record,) = metrics(clips / "run")
    assert record["rows"] == [0, 1]
    assert record["loss/preference"] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.skipif(not REAL.exists(), reason="needs the demo clips in the shared folder beside the repository")
def test_real_clips_are_read_whole_and_the_same_each_time() -> None:
    root = MediaRoot(str(REAL))
    for name, size in {"1.mp4": (640, 360), "3.mp4": (640, 360), "4.mp4": (224, 224)}.items():
        media = verify_media(Media("video", name), root)
        assert media.sizes == (size,) * 32
        assert len(set(media.encoded)) == 32
        assert media.sha256 == read_media(Media("video", name), root).sha256

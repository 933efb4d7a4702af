"""Small valid files of every format that a reader of data takes, which together use all that the readers know."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

SIZE = (12, 9)
SECRET = (7, 5)  # size of the picture outside the media root: whoever returns it has left the root


def pictures() -> list[bytes]:
    """Every format, mode and compression that `media.FORMATS` admits, and a few that it does not."""
    made = [_saved(mode, format, **options) for mode, format, options in _FORMS]
    upright = Image.Exif()
    for turn in (3, 6):
        upright[0x0112] = turn
        made += [_saved("RGB", format, exif=upright) for format in ("JPEG", "PNG", "WEBP", "TIFF")]
    notes = PngImagePlugin.PngInfo()
    notes.add_text("note", "x" * 500, zip=True)
    notes.add_itxt("note", "y" * 300, "en", "note", zip=True)
    frames = [Image.new("P", SIZE, color) for color in range(3)]
    made += [
        _jpeg_of_scans(120),
        _saved("RGB", "PNG", pnginfo=notes),
        png_bomb(),
        png_of(60_000, 60_000),
        gif_of(65_535, 65_535),
    ]
    made += [
        _bytes(frames[0], format, save_all=True, append_images=frames[1:]) for format in ("GIF", "WEBP", "TIFF", "PNG")
    ]
    return made


_FORMS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("RGB", "JPEG", {}),
    ("RGB", "JPEG", {"progressive": True}),
    ("L", "JPEG", {}),
    ("CMYK", "JPEG", {}),
    ("RGB", "PNG", {}),
    ("RGBA", "PNG", {}),
    ("LA", "PNG", {}),
    ("P", "PNG", {"transparency": 0}),
    ("1", "PNG", {}),
    ("I;16", "PNG", {}),
    ("RGB", "WEBP", {}),
    ("RGBA", "WEBP", {"lossless": True}),
    ("RGB", "BMP", {}),
    ("L", "BMP", {}),
    ("1", "BMP", {}),
    ("P", "GIF", {}),
    ("L", "GIF", {"interlace": 1}),
    ("RGB", "TIFF", {}),
    ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    ("RGB", "TIFF", {"compression": "tiff_deflate"}),
    ("RGB", "TIFF", {"compression": "jpeg"}),
    ("1", "TIFF", {"compression": "group4"}),
    ("F", "TIFF", {}),
    ("I;16", "TIFF", {}),
    ("CMYK", "TIFF", {}),
    ("RGB", "PPM", {}),
    ("RGB", "ICO", {}),
    ("RGB", "JPEG2000", {}),
)


def _saved(mode: str, format: str, **options: Any) -> bytes:
    ramp = Image.linear_gradient("L").resize(SIZE)
    image = ramp.convert("RGB") if mode == "I;16" else ramp.convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[::-1]) * 500)
    return _bytes(image, format, **options)


def _bytes(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def _jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan stands in it so many times."""
    whole = _saved("RGB", "JPEG", progressive=True)
    at = whole.rindex(b"\xff\xda")
    return whole[:at] + whole[at:-2] * count + whole[-2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says so many gray pixels, whatever there is of them."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def png_bomb() -> bytes:
    """A small picture whose one text would be 64 MiB."""
    whole = png_of(*SIZE, bytes((SIZE[0] + 1) * SIZE[1]))
    text = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(64 * 2**20), 9))
    return whole[:33] + text + whole[33:]


def png_with_right_sums(data: bytes) -> bytes:
    """A damaged PNG whose checksums are right again, so that the damage is looked at."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = min(int.from_bytes(data[at : at + 4]), len(data) - at - 12)
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out


def gif_of(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"


def clips(folder: Path) -> dict[str, bytes]:
    """A clip of every container, several codecs, sound, a turned and a fragmented one."""
    made = {}
    for name, codec, options in (
        ("a.mp4", "mpeg4", {}),
        ("frag.mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
        ("h264.mp4", "libx264", {}),
        ("a.mov", "mjpeg", {}),
        ("a.avi", "mpeg4", {}),
        ("b.avi", "mpeg2video", {}),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx", {}),
        ("png.mov", "png", {}),
        ("live.mkv", "mpeg4", {"live": "1"}),
    ):
        try:
            made[name] = _clip(folder / name, codec, options)
        except (ValueError, OSError):  # this build of FFmpeg cannot write it
            continue
    made["turned.mp4"] = _turned(made["a.mp4"])
    made["compact.mp4"] = _compact(made["a.mp4"])
    made["long.mp4"] = made["a.mp4"][:-8] + made["a.mp4"][-8:]
    return made


def _clip(path: Path, codec: str, options: dict[str, str]) -> bytes:
    import av

    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height = 32, 16
        stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
        for level in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 32, 3), 40 * level, np.uint8), "rgb24")))
        out.mux(stream.encode())
    data = path.read_bytes()
    path.unlink()
    return data


def _turned(data: bytes) -> bytes:
    """The display matrix of the track turned by a quarter."""
    at = data.index(b"tkhd") + 4 + 40
    return data[:at] + struct.pack(">5i", 0, 0x10000, 0, -0x10000, 0) + data[at + 20 :]


def _compact(data: bytes) -> bytes:
    """Sizes of samples in the other of the two tables there are."""
    return data.replace(b"stsz", b"stz2")


def text_rows() -> dict[str, list[Any]]:
    """Good rows by source; those of one source are about the same few pictures."""
    encoded = _saved("RGB", "PNG")
    uri = "data:image/png;base64," + base64.b64encode(encoded).decode()
    struct_of = {"bytes": base64.b64encode(encoded).decode(), "path": "a.png"}
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "text", "text": "Say."}]
    user, said = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "good"}
    pair = {"prompt": "What?", "chosen": "good", "rejected": "bad"}
    bench = {**pair, "id": "q1", "image": "mcq/a.png", "chosen_reason": "sees", "rejected_reason": "blind"}
    return {
        "mm_rlhf": [
            {**pair, "id": "q", "image": "a.png", "margin": 1.5},
            {**pair, "id": "q", "image": "a.png", "rejected": "worse", "margin": 2},
            {**pair, "id": "q", "image": "a.png", "chosen": "worse", "rejected": "bad", "margin": 1},
            {
                **pair,
                "id": 7,
                "image": ["a.png", "b.png"],
                "prompt": "<image>\n<image>\nWhat?",
                "is_tie": True,
                "margin": 0,
            },
            {**pair, "id": "v", "video": "clip", "chosen_reason": "sees", "rejected_reason": None, "margin": -1},
            {**pair, "id": "t", "margin": 0.5, "unknown": 1},
            {**pair, "id": "t", "margin": 0.5},
            {**pair, "id": "u", "image": uri, "margin": 1},
            {**pair, "id": "loop", "chosen": "a", "rejected": "b", "margin": 1},
            {**pair, "id": "loop", "chosen": "b", "rejected": "a", "margin": 1},
            {**pair, "id": "s", "image": struct_of, "margin": 3},
        ],
        "trl": [
            pair,
            {**pair, "images": ["a.png", "b.png"]},
            {**pair, "image": "a.png", "prompt": "<image>What?"},
            {**pair, "videos": ["clip"]},
            {"prompt": [user], "chosen": [said], "rejected": [{**said, "content": "bad"}]},
            {"chosen": [user, said], "rejected": [user, {**said, "content": "bad"}], "images": [uri]},
            {
                "prompt": "x",
                "chosen": [user, said, user, said],
                "rejected": [user, said, user, {**said, "content": "no"}],
            },
            {
                "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}],
                "chosen": "good",
                "rejected": "bad",
                "images": [struct_of],
                "margin": 1,
            },
            {
                "prompt": [{"role": "user", "content": "<video>\nWhat? <image>"}],
                "chosen": "a",
                "rejected": "b",
                "image": "a.png",
                "video": "clip",
            },
        ],
        "sharegpt": [
            {
                "conversations": [{"from": "human", "value": "<image>What?"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
                "images": ["a.png"],
                "id": "1",
            },
            {"messages": [user, said], "system": "Be brief.", "images": []},
            {"messages": [{"role": "system", "content": "Be."}, user, said, user, said], "videos": None, "tools": ""},
            {
                "conversations": [{"from": "system", "value": "Be."}, {"from": "human", "value": "<video>What?"}],
                "chosen": said,
                "rejected": {**said, "content": "bad"},
                "videos": ["clip"],
                "margin": 2,
            },
        ],
        "ms_swift": [
            *_golden("ms_swift"),
            {"query": "What?", "response": "good", "rejected_response": "bad", "margin": 1, "history": [["Hm?", "so"]]},
            {"query": "What?", "response": "good", "history": ["Hm?"]},
            {"system": "Be brief.", "messages": [user, said], "rejected_messages": [user, {**said, "content": "bad"}]},
            {"messages": [user, {**said, "loss": False}], "rejected_response": ["bad"], "tools": {"a": None}},
            {"messages": [user, said], "objects": {"ref": ["a"]}},
            {"messages": [user, said], "response": "good"},
            {"messages": [{"from": "user", "value": "<video>What?"}, said], "videos": ["clip"]},
            {"messages": [{**user, "content": "<img>a.png</img>What?"}, said], "rejected_response": "bad"},
            {"messages": [user, said], "rejected_messages": [{**user, "content": parts}, said]},
            {"messages": [user, said], "rejected_response": [user, {**said, "content": "bad"}]},
            {"messages": [user, said], "rejected_response": [{**said, "content": parts}]},
            {"messages": [user, said], "rejected_response": "bad", "rejected_messages": [user, said]},
            {"messages": [user, {**said, "tool_calls": ["f"]}]},
            {"messages": [{**user, "value": "What?"}, said]},
            {"messages": [{**user, "content": parts}, said], "images": ["a.png"]},
        ],
        "vlfeedback": [
            *_golden("vlfeedback"),
            {
                "id": "a",
                "prompt": "What?",
                "img_path": "a.png",
                "completions": [_rated("good", "5"), _rated("bad", 1.5)],
            },
            {
                "id": "a",
                "prompt": "What?",
                "image": struct_of,
                "completions": [_rated("good", "2"), _rated("good", "4")],
            },
            {"id": "a", "prompt": "What?", "img_path": "/unpacked/a.jpg", "completions": [_rated("good", "N/A")]},
        ],
        "rlhf_v": [
            {"image": struct_of, "question": "What?", "chosen": "good", "rejected": "bad", "idx": 1},
            {
                "image_path": "a.png",
                "text": '{"question": "What?", "chosen": "good", "rejected": "bad"}',
                "ds_name": "x",
                "margin": 1,
            },
            {"image": uri, "question": "<image>\nWhat?", "chosen": "a", "rejected": "b"},
        ],
        "mapped": [
            {
                "q": "What?",
                "a": ["x", "y", "z"],
                "r": [1, 2, 2],
                "s": [3.5, 1, None],
                "why": ["good", None, " "],
                "by": [{"kind": 1, "brief": 0.5}, None, {"kind": None}],
                "known": ["A cat.", "A mat."],
                "pic": "a.png",
                "n": {"id": 5},
            },
            {
                "q": "<image>What?",
                "a": {"m1": "x", "m2": "y"},
                "r": {"m1": 2, "m2": 1},
                "s": {"m2": 1, "m1": 0},
                "why": None,
                "pic": uri,
                "n": {"id": "i"},
            },
            {
                "q": "What?",
                "a": ["x", "y", "x"],
                "r": "[2>1=3]",
                "s": [0, 1, 0],
                "why": ["a", "b", "a"],
                "pic": None,
                "clip": "clip",
                "n": {"id": "k"},
            },
            {
                "q": "What?",
                "a": [{"t": "x", "r": 1, "s": 2, "by": {"kind": 2}}, {"t": "y", "r": 2, "s": 1, "by": {}}],
                "known": "A cat.",
                "r": [1, 2],
                "pic": "b.png",
                "n": {"id": 6},
            },
        ],
        "prompts": [
            {"prompt": "What?", "id": "1", "image": "a.png"},
            {"prompt": "<image>What?", "image": [uri, "b.png"]},
            {"prompt": "Hm?", "video": "clip"},
            {"prompt": [user, said, {"role": "user", "content": "<image>Why?"}], "image": "a.png", "extra": 1},
            {"prompt": [{"role": "user", "content": parts}], "image": struct_of, "id": 9},
            {"prompt": "What?", "images": None},
        ],
        "reward_bench": [
            bench,
            {**bench, "rejected": "worse"},
            {**bench, "id": 2, "image": None, "video": "video/clip"},
            {**bench, "id": "3", "image": uri, "chosen": ""},
            {**bench, "id": "4", "image": struct_of, "rejected": "good"},
            {**bench, "id": "5", "image": ["long/a.png", "b.png"]},
        ],
        "vl_reward_bench": [
            {"id": "RLHF-V-1", "query": "What?", "response": ["a", "b"], "human_ranking": [0, 1], "image": struct_of},
            {
                "id": "mmmu_1",
                "query": "<image>What?",
                "response": ["a", "a"],
                "human_ranking": [1, 0],
                "image_path": "a.png",
            },
            {"id": "wildvision-2", **pair, "image": "a.png"},
            {"id": "VLFeedback-3", "query": "Q", "response": ["", "b"], "human_ranking": [1, 0], "image": uri},
        ],
        "mixture": [
            {
                "seed": 3,
                "parts": [{"dataset": "vqa", "weight": 1.5, "limit": 3, "subset": "short/*"}, {"dataset": "chat"}],
            },
            {
                "parts": [
                    {"dataset": "vqa", "subset": "long/*"},
                    {"dataset": "vqa", "weight": 0.5},
                    {"dataset": "./chat", "limit": None},
                ]
            },
        ],
    }


def _golden(name: str) -> list[Any]:
    """Rows that the format's own program has read."""
    rows = json.loads((Path(__file__).parents[1] / "data" / f"{name}_golden.json").read_text())["rows"]
    return [each.get("row", each) for each in rows]


def _rated(response: str, rating: Any) -> dict[str, Any]:
    aspects = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
    return {"response": response, "annotations": {name: {"Rating": rating, "Rationale": "so"} for name in aspects}}


def media_root(folder: Path) -> Path:
    """`media` with pictures, frames, a clip, links that loop and leave, a pipe and a device; `outside` beside it."""
    root, outside = folder / "media", folder / "outside"
    for place in (
        root / "clip",
        root / "frames",
        root / "mcq",
        root / "long",
        root / "video" / "clip",
        root / "empty",
        outside,
    ):
        place.mkdir(parents=True)
    picture = _saved("RGB", "PNG")
    for name in (
        "a.png",
        "b.png",
        "clip/1.png",
        "clip/2.png",
        "mcq/a.png",
        "long/a.png",
        "video/clip/1.png",
        "frames/1.png",
    ):
        (root / name).write_bytes(picture)
    (root / "bad.png").write_bytes(picture[:50])
    (root / "text.png").write_text("hello")
    (root / "clip.mp4").write_bytes(clips(folder).get("a.mp4", b""))
    (outside / "secret.png").write_bytes(_bytes(Image.new("RGB", SECRET), "PNG"))
    for name, target in (
        ("link.png", outside / "secret.png"),
        ("linked", outside),
        ("loop.png", root / "loop.png"),
        ("zero.png", Path(os.devnull)),
        ("frames/2.png", outside / "secret.png"),
        ("inside.png", root / "a.png"),
        ("passwd", Path("/etc/passwd")),
        ("up", folder),
    ):
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.png")
    return root


def some(rng: Random, values: list[Any]) -> list[Any]:
    """One to four of them, now and then the same twice."""
    return [rng.choice(values) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))]

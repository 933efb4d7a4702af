"""Small preference files, pictures and a renderer that only counts words, for tests of the data side."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from mmrlhf_jax.data.sources.rows import Item, Rejected, Remark
from mmrlhf_jax.groups import Group, Lengths, Media

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30), format: str = "PNG", **save: Any) -> bytes:
    """A left-to-right, top-to-bottom gradient, so that a turned picture is seen as turned."""
    width, height = size
    ramp = Image.linear_gradient("L").resize((width, height))
    image = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), ramp)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format=format, **save)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def write_media(root: Path, **files: bytes) -> Path:
    """`a__b=bytes` becomes root/a/b.png."""
    for name, data in files.items():
        path = root / (name.replace("__", "/") + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def row(**fields: Any) -> dict[str, Any]:
    """A good MM-RLHF row; a field given as None is left out."""
    base = {"id": "q", "image": "a.png", "prompt": "What?", "chosen": "good", "rejected": "bad"}
    return {key: value for key, value in {**base, **fields}.items() if value is not None}


def write_rows(path: Path, rows: list[Any]) -> str:
    """JSON lines; a row that is a str or bytes is written as it stands."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: Any = None, **options: Any) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    whole = [{name: row.get(name) for name in names} for row in rows]  # pyarrow looks at the first row's names alone
    pq.write_table(pa.Table.from_pylist(whole, schema=schema), path, **options)
    return str(path)


def sorted_out(items: Iterable[Item]) -> tuple[list[Group], dict[int, str], dict[str, int]]:
    """Groups, line -> reason of rejection, remark -> rows."""
    items = list(items)
    groups = [item for item in items if isinstance(item, Group)]
    rejected = {item.origin.line: item.reason for item in items if isinstance(item, Rejected)}
    remarks = {item.text: item.rows for item in items if isinstance(item, Remark)}
    return groups, rejected, remarks


def embedded(data: bytes) -> Media:
    """What a picture that stands in a row is read as."""
    return Media("image", f"embedded:{hashlib.sha256(data).hexdigest()}")


class WordCounter:
    """Implements `Renderer.measure`: a word is a token, a picture or frame ten."""

    fingerprint = "words"
    tile_size = 42
    tokens_per_tile = 10
    max_positions = 10**6

    def measure(self, group: Group) -> Lengths:
        tiles = sum(len(media.sizes) for media in group.media)
        words = sum(len(turn.text.split()) for turn in group.prompt)
        return Lengths(tiles, words + 10 * tiles, tuple(len(r.text.split()) for r in group.responses))

    def render(self, group: Group, decode: object) -> Any:
        raise AssertionError("preparing a dataset renders nothing")

"""The small files of a MODEL directory, which may come from a stranger: bounded before they are read, inside the
directory, and JSON with one meaning. No jax.

Checks of numbers live here too: a size in a config.json is a claim, and what is made of it (lists, declarations,
buffers) must not be made before the claim is seen to be sane.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from typing import Any

from etils import epath

MIB = 2**20
JSON_BYTES = 4 * MIB  # configs; json.loads makes up to 25 bytes of one
TEMPLATE_BYTES = MIB

Bounds = Mapping[str, tuple[int, int]]


def shown(value: object) -> str:
    """A value from a file, for a message: its repr, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of more digits than Python writes
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def check_file(path: epath.Path, most: int | None = None) -> int:
    """The size in bytes of a file of a model directory.

    Raises ValueError where it is more than `most`, no plain file (a pipe would be waited for), or a link that leaves
    the directory; links into the hub's own cache, which keeps the files of its snapshots aside, are followed.
    """
    if "://" in os.fspath(path):
        size = int(path.stat().length)
    else:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: not a plain file")
        _check_inside(os.fspath(path))
        size = found.st_size
    if most is not None and size > most:
        raise ValueError(f"{path}: {size} bytes; such a file has {most} at most")
    return size


def _check_inside(path: str) -> None:
    directory = os.path.realpath(os.path.dirname(path))
    roots = [directory]
    if os.path.basename(os.path.dirname(directory)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(directory)), "blobs"))
    lies = os.path.realpath(path)
    if not any(lies.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
        raise ValueError(f"{path}: a link that leaves its directory; put the file itself there")


def read_file(path: epath.Path, most: int) -> bytes:
    """Raises ValueError as `check_file` does, OSError for a file that cannot be read."""
    check_file(path, most)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: grew beyond {most} bytes while it was read")
    return data


def read_text(path: epath.Path, most: int = TEMPLATE_BYTES) -> str:
    try:
        return read_file(path, most).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error


def read_json(path: epath.Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, and for what readers disagree about: a name that stands
    twice, NaN and infinities."""
    return parse_json(path, read_file(path, most))


def parse_json(path: epath.Path, text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(out := dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return out


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def size_problems(part: Mapping[str, Any], bounds: Bounds, within: str = "") -> list[str]:
    """What is wrong with the whole numbers that `part` states, each named with its bounds; absent ones are fine."""
    return [
        f"{within}{name} = {shown(part[name])}, a whole number from {low:,} to {high:,} is needed"
        for name, (low, high) in bounds.items()
        if name in part and not (type(part[name]) is int and low <= part[name] <= high)
    ]


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value from a file is a finite number in [low, high]; true and false are none."""
    return type(value) in (int, float) and low <= value <= high and math.isfinite(value)  # type: ignore[operator, arg-type]


def check_model_name(name: Any, where: object = "") -> str:
    """The name of a MODEL, from the command line or from a file `where` a stranger wrote it. Raises ValueError for one
    that can be none: control characters, or another place than this machine, gs:// and the hub."""
    prefix = f"{where}: " if where else ""
    if not isinstance(name, str) or not 0 < len(name) <= 4096 or not name.isprintable():
        raise ValueError(f"{prefix}{shown(name)} names no MODEL")
    if "://" in name and not name.startswith("gs://"):
        raise ValueError(f"{prefix}{shown(name)}: a remote MODEL lies on gs://")
    return name

"""Structure-aware mutations of valid files: a node of a JSON document changed into what a stranger would write, its
text as no writer writes it, a file replaced by what is none."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 255, 2**31, 2**53, 2**63, 10**12, 10**400, 0.5, -0.0, 1e-300, 1e308)
TEXTS = (
    "", "x", "../../outside/secret", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "<|im_end|>", "x" * 5000, "{{ 7 }}",
    "http://127.0.0.1:9/x", "gs://bucket/x", "-rf", "NaN", "9" * 5000,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": {}}, [1, 2], ["x"] * 3)


def strange(rng: Random) -> Any:
    """A value that is seldom where it is expected."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind == 5:
        deep: Any = 0
        for _ in range(rng.choice((3, 40, 400))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    if kind == 6:
        return [rng.choice(NUMBERS) for _ in range(rng.choice((1, 2, 3, 9, 300)))]
    return copy.deepcopy(rng.choice(OTHERS))


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every node of a document but its root."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    if not isinstance(document, (dict, list)):
        return []
    out = []
    for key, value in items:
        out += [(*at, key), *places(value, (*at, key))] if isinstance(value, (dict, list)) else [(*at, key)]
    return out


def mutate_document(rng: Random, document: Any, times: int = 1, among: list[tuple[Any, ...]] | None = None) -> Any:
    """A copy with `times` nodes changed. `among`: the paths to choose from, where a document has too many to list."""
    try:
        document = copy.deepcopy(document)
        for _ in range(times):
            found = among or places(document)
            if not found:
                return document
            *parents, last = rng.choice(found)
            holder = document
            try:
                for parent in parents:
                    holder = holder[parent]
                _change(rng, document, holder, last, found)
            except (KeyError, IndexError, TypeError):  # an earlier change took that place away
                continue
    except RecursionError:  # a copy of what is deeper than Python copies
        pass
    return document


def _change(rng: Random, document: Any, holder: Any, last: Any, found: list[tuple[Any, ...]]) -> None:
    kind = rng.randrange(10)
    if kind < 4:
        holder[last] = strange(rng)
    elif kind < 6 and type(holder[last]) in (int, float) and abs(holder[last]) < 1e100:
        holder[last] = holder[last] * rng.choice((-1, 0, 2, 3, 1000, 10**9, 0.5)) + rng.choice((0, 1, -1))
    elif kind == 6:
        del holder[last]
    elif kind == 7 and isinstance(holder, dict):
        holder[str(rng.choice(TEXTS))] = holder.pop(last)
    elif kind == 8:
        other = document
        for step in rng.choice(found):
            other = other[step]
        holder[last] = copy.deepcopy(other)
    elif isinstance(holder, list):
        holder += copy.deepcopy(holder[last : last + 1]) * rng.choice((1, 2, 50))
    else:
        holder[last] = [holder[last]]


def mutate_json_text(rng: Random, text: bytes) -> bytes:
    """What JSON's readers disagree about, or no JSON."""
    kind = rng.randrange(7)
    if kind == 0:
        return text.replace(b": 1", b": NaN", 1) if b": 1" in text else b'{"a": Infinity}'
    if kind == 1 and text[:1] == b"{":
        name = json.dumps(next(iter(json.loads(text)), "a"))
        return b"{" + name.encode() + b": 0, " + text[1:]
    if kind == 2:
        return text[: rng.randrange(len(text) + 1)]
    if kind == 3:
        return b"[" * rng.choice((10, 100_000)) + text
    if kind == 4:
        return b"\xef\xbb\xbf" + text
    return mutate_bytes(rng, text)


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(5)
        if kind == 0 and data:
            at %= len(data)
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.randbytes(rng.choice((1, 4, 64))) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + rng.choice((1, 4, 64)) :]
        elif kind == 3:
            data = data[:at]
        else:
            data = data[:at] + data[max(0, at - 40) : at] * 2 + data[at:]
    return data


def dumps(document: Any) -> bytes:
    try:
        return json.dumps(document).encode()
    except RecursionError:  # deeper than Python writes
        return b"[" * 5000 + b"]" * 5000


def local(text: bytes) -> bytes:
    """For what names other directories: a bucket would be asked, over the network, and for long where there is none."""
    return text.replace(b"gs://", b"gs:/")


def mutate_file(
    rng: Random,
    path: Path,
    change: Callable[[Random, Any], Any],
    document: Any,
    written: Callable[[bytes], bytes] = bytes,
) -> None:
    """Writes `document` to `path`: changed as a document, `written`, then changed as text, or something that is no
    such file."""
    kind = rng.randrange(40)
    if kind == 0:
        return
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.symlink(rng.choice(("../outside/secret", "/etc/passwd", "/dev/zero", path.name)), path)
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        with path.open("wb") as file:
            file.truncate(rng.choice((0, 2**20, 2**36)))
    else:
        text = written(dumps(change(rng, document)))
        path.write_bytes(mutate_json_text(rng, text) if kind < 12 else text)

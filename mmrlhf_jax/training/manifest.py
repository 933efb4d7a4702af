"""What a checkpoint consists of, noted once it is whole, so that a torn or altered one is known before it is used.

RUN/checkpoints/N/manifest.json   the size and checksum of every file, and in how many seconds they were written
RUN/damaged/N/                    a checkpoint that was not what its manifest says, or could not be read

On a disk the checksum is zlib's crc32 of what is read back; in a bucket it is the crc32c that the store keeps, which
costs a listing. A run copied from one to the other is checked by sizes. A checkpoint without a manifest (of an older
run, or of one that was killed between the two) is known to be whole only by reading it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.models.files import is_number, read_json, shown

MANIFEST = "manifest.json"
_MOST_METADATA = 16 * 2**20  # of one file; a 70B's has less than a million bytes
_READ_WHOLE = ("metadata", "_METADATA", "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt", MANIFEST)
_MOST_NAME, _MOST_SIZE, _MOST_SECONDS = 1024, 2**60, 1e9


@dataclass(frozen=True)
class Written:
    """A checkpoint's bytes, and the seconds between the decision to save it and its being whole."""

    bytes: int
    seconds: float


def seal(checkpoint: epath.Path, seconds: float) -> Written:
    """Writes the manifest of a checkpoint that has just become whole."""
    files = {name: stamp for name, stamp in storage.stamps(checkpoint).items() if name != MANIFEST}
    written = Written(sum(size for size, _ in files.values()), seconds)
    document = {"bytes": written.bytes, "seconds": written.seconds, "files": files}
    storage.write_whole(checkpoint / MANIFEST, (json.dumps(document, indent=1) + "\n").encode())
    return written


def written(checkpoint: epath.Path) -> Written | None:
    """How the checkpoint was written, where it has a manifest."""
    document = _read(checkpoint)
    return None if document is None else Written(document["bytes"], document["seconds"])


def damage(checkpoint: epath.Path) -> str | None:
    """What differs from the manifest; None where nothing does, or there is none. And what no checkpoint holds: a pipe,
    which would be waited for, or metadata that do not fit in memory."""
    if not storage.is_remote(checkpoint) and (odd := _oddity(Path(checkpoint))):
        return odd
    document = _read(checkpoint)
    if document is None:
        return None
    found = storage.stamps(checkpoint, {name: size for name, (size, _) in document["files"].items()})
    wrong = []
    for name, (size, checksum) in document["files"].items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif found[name][0] != size:
            wrong.append(f"{name} has {found[name][0]} bytes of {size}")
        elif _kind(found[name][1]) == _kind(checksum) and found[name][1] != checksum:
            wrong.append(f"{name} has other content ({found[name][1]}, was {checksum})")
    more = f" and {len(wrong) - 3} files more" if len(wrong) > 3 else ""
    return "; ".join(wrong[:3]) + more if wrong else None


def set_aside(checkpoint: epath.Path, place: epath.Path) -> epath.Path:
    """Moves a checkpoint into the directory `place`, under its own name or one like it; returns where it is."""
    place.mkdir(parents=True, exist_ok=True)
    target, number = place / checkpoint.name, 1
    while target.exists():
        number += 1
        target = place / f"{checkpoint.name}-{number}"
    storage.move(checkpoint, target)
    return target


def _kind(checksum: str) -> str:
    return checksum.partition(":")[0]


def _oddity(checkpoint: Path) -> str | None:
    """Of the files on a disk that orbax would read whole, and of all that are none."""
    return next((odd for path in sorted(checkpoint.rglob("*")) if (odd := _odd_file(path, checkpoint))), None)


def _odd_file(path: Path, within: Path) -> str | None:
    name = path.relative_to(within).as_posix()
    if not path.exists() or not (path.is_file() or path.is_dir()):
        return f"{shown(name)} is not a plain file"
    if (path.name in _READ_WHOLE or path.parent.name == "array_metadatas") and path.stat().st_size > _MOST_METADATA:
        return f"{shown(name)} has {path.stat().st_size} bytes; such a file has {_MOST_METADATA} at most"
    return None


def _read(checkpoint: epath.Path) -> dict[str, Any] | None:
    """None where there is none that can be read: a machine may have died while it was written."""
    try:
        document = read_json(checkpoint / MANIFEST, _MOST_METADATA)
    except (FileNotFoundError, ValueError):
        return None
    return document if _is_manifest(document) else None


def _is_manifest(document: dict[str, Any]) -> bool:
    """Whether it is of the kind that `seal` writes; the checkpoint may be a stranger's."""
    files = document.get("files")
    return (
        is_number(document.get("bytes"), 0, _MOST_SIZE)
        and is_number(document.get("seconds"), 0, _MOST_SECONDS)
        and isinstance(files, dict)
        and all(_is_name(name) and _is_stamp(stamp) for name, stamp in files.items())
    )


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and len(text) <= _MOST_NAME and text.isprintable()


def _is_stamp(stamp: Any) -> bool:
    return isinstance(stamp, list) and len(stamp) == 2 and is_number(stamp[0], 0, _MOST_SIZE) and _is_name(stamp[1])

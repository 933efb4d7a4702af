"""Preference files by format. A new format is one file here and one line in `SOURCES`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmrlhf_jax.data.sources import mapped, mm_rlhf, ms_swift, rlhf_v, sharegpt, trl, vlfeedback
from mmrlhf_jax.data.sources.rows import Item, Source, SourceError, SourceOptions

SOURCES: dict[str, Source] = {
    "mm_rlhf": mm_rlhf.read,
    "trl": trl.read,
    "sharegpt": sharegpt.read,
    "ms_swift": ms_swift.read,
    "rlhf_v": rlhf_v.read,
    "vlfeedback": vlfeedback.read,
    "mapped": mapped.read,
}


def read_source(name: str, files: Sequence[str], options: SourceOptions | None = None) -> Iterator[Item]:
    """Read `files` in the format `name`: good rows as groups, bad ones as `Rejected`, in order of first row.

    Raises:
        SourceError: unknown format, unreadable file, or an option the files cannot satisfy.
    """
    if name not in SOURCES:
        raise SourceError(f"unknown source {name!r}: choose one of {', '.join(sorted(SOURCES))}")
    return SOURCES[name](files, options or SourceOptions())

"""gs:// paths without a network: a file system in memory that remembers in which order its files were written."""

from __future__ import annotations

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FakeBucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012 - fsspec's memory is the class's
    pseudo_dirs: list = [""]  # noqa: RUF012
    written: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        for prefix in ("gs://", "gcs://"):
            path = path.removeprefix(prefix)
        return super()._strip_protocol(path)

    def open(self, path, mode="rb", **options):
        if "w" in mode:
            self.written.append(path.rsplit("/", 1)[-1])
        return super().open(path, mode, **options)


def install() -> type[FakeBucket]:
    """Makes gs:// this; empty."""
    for name in FakeBucket.protocol:
        fsspec.register_implementation(name, FakeBucket, clobber=True)
    FakeBucket.store.clear()
    FakeBucket.pseudo_dirs[:] = [""]
    FakeBucket.written.clear()
    return FakeBucket

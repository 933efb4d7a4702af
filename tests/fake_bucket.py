"""gs:// paths without a network: a file system in memory that remembers in which order its files were written."""

from __future__ import annotations

import os

from etils.epath import backend
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


def install(monkeypatch) -> FakeBucket:
    """Makes gs:// an empty bucket for one test."""
    bucket, others = FakeBucket(), backend.fsspec_backend.fs
    bucket.store.clear()
    bucket.pseudo_dirs[:] = [""]
    bucket.written.clear()
    monkeypatch.setattr(
        backend.fsspec_backend, "fs", lambda path: bucket if os.fspath(path).startswith("gs://") else others(path)
    )
    return bucket

"""An output that cannot be written (a full disk, one that is read-only or gone), as one message: what is wrong, where,
and what to do."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

from mmrlhf_jax import storage
from mmrlhf_jax.command import CommandError

FULL = "make room there, or raise the quota"
SHUT = "give this user leave to write there, or name another --output"
GONE = "mount or restore it"

# by the system's own words, which libraries that are not Python's put into errors of theirs
CURES = {
    os.strerror(number): cure
    for number, cure in (
        (errno.ENOSPC, FULL),
        (errno.EDQUOT, FULL),
        (errno.EFBIG, "raise the limit on the size of files (ulimit -f)"),
        (errno.EROFS, SHUT),
        (errno.EACCES, SHUT),
        (errno.EPERM, SHUT),
        (errno.EIO, "look at the disk, or the network it is on"),
        (errno.ENOENT, GONE),
        (errno.ESTALE, GONE),
        (errno.ENOTCONN, GONE),
    )
}


@contextmanager
def explained_writing(output: storage.PathLike) -> Iterator[None]:
    """Turns the failure to write `output` into a CommandError; other errors, and those about other files, pass."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        if (message := explain(error, os.fspath(output))) is None:
            raise
        raise CommandError(message) from error


def explain(error: BaseException, output: str) -> str | None:
    """None where the error, and none that it came from, is about writing `output`."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        text = " ".join(str(error).split())
        names = (text, str(getattr(error, "filename", "")), str(getattr(error, "filename2", "")))
        for words, cure in CURES.items():
            if words in text and (cure == FULL or any(output in name for name in names)):
                said = shorten(text, 240, placeholder=" ...")
                return (
                    f"{_place(error, output)}: {words} ({said}). Earlier checkpoints and parts are as they were: "
                    f"{cure}, then run the same command to go on"
                )
        error = error.__cause__ or error.__context__ or error
    return None


def _place(error: BaseException, output: str) -> str:
    """Which disk an error is about: the output's, unless it names a file elsewhere. What goes to a bucket passes
    through local disks, and only those are ever full."""
    named = getattr(error, "filename", None)
    if isinstance(named, str) and output not in named:
        return named
    if storage.is_remote(output) and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"a local disk on the way to {output}, such as {tempfile.gettempdir()} (TMPDIR) or a cache's"
    return output

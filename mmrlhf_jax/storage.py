"""Where local disks and object stores differ: whole writes, uploads, and copies for code that reads local files only.

`epath.Path` names both, and most calls are the same. But in a bucket (gs://) there are no directories, renaming copies,
and appending REPLACES what was there; an object appears whole when its upload ends, and not before. gs:// needs the
`gcs` extra. Importing this module settles two things for every epath and fsspec user in the process:

* Directory listings are not cached. gcsfs keeps them for good, so a process would never see what another one writes,
  and would cut a grown object at its old length.
* TensorFlow is not used for gs://, even where it is installed: every host then goes through the same code.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from etils import epath

from mmrlhf_jax.command import progress_line

os.environ.setdefault("EPATH_USE_TF", "false")
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)

CACHE_VARIABLE = "MMRLHF_CACHE"
TRANSFERS = 8  # files at a time
PATIENCE = 5.0  # seconds before a transfer shows its progress

PathLike = str | os.PathLike[str]


class StorageError(ValueError):
    """Files that cannot be reached, or that did not arrive whole."""


@contextmanager
def _as_os_errors(path: PathLike) -> Iterator[None]:
    """What a store answers when it does not do as asked, as the OSError that a disk would raise."""
    try:
        yield
    except (OSError, StorageError):
        raise
    except Exception as error:  # gcsfs, its transport and its sign-in have errors of their own
        raise OSError(f"{os.fspath(path)}: {error}") from error


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """An object: its name below the directory, bytes, and a version that every overwriting changes."""

    name: str
    size: int
    version: str


def is_remote(path: PathLike) -> bool:
    """Whether `path` is in an object store."""
    return "://" in os.fspath(path)


def to_path(path: PathLike) -> epath.Path:
    """`path` for use with epath.

    Raises:
        StorageError: what reads this kind of path is not installed.
    """
    if is_remote(path):
        _file_system(path)
    try:
        return epath.Path(path)
    except KeyError as error:  # epath: protocol not known
        raise StorageError(f"{os.fspath(path)} is neither a local path nor gs://") from error


def read_bytes(path: PathLike, limit: int) -> bytes:
    """The first `limit` bytes of an object, in one request (epath takes nine to look and read).

    Raises:
        OSError: it does not exist or cannot be read.
    """
    file_system, name = _file_system(path)
    with _as_os_errors(path):
        try:
            return file_system.cat_file(name, start=0, end=limit)
        except Exception as error:
            if "not satisfiable" in str(error):  # HTTP 416: an empty object has no first byte
                return b""
            raise


def open_read(path: PathLike) -> io.BufferedReader | BinaryIO:
    """A binary stream. fsspec's own streams know no `readline(size)`, without which a line has no bound."""
    stream = to_path(path).open("rb")
    return io.BufferedReader(stream, 2**20) if is_remote(path) else stream


def write_whole(path: epath.Path, data: bytes) -> None:
    """A reader sees no file, the old one or all of the new one, whenever this process ends.

    The name aside is the same each time, so a killed run leaves one at most. In a bucket the upload itself is atomic;
    `path.open("wb")` is not, since it completes the object even when left by an exception.
    """
    if is_remote(path):
        file_system, name = _file_system(path)
        with _as_os_errors(path):
            file_system.pipe_file(name, data)
        return
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a machine that dies may keep the new name without the content
    aside.replace(path)


def create_whole(path: epath.Path, data: bytes) -> bool:
    """Makes a remote object unless there is one; returns whether it did. Of several that try at once, one does."""
    file_system, name = _file_system(path)
    try:
        with _as_os_errors(path):
            file_system.pipe_file(name, data, mode="create")
    except FileExistsError:
        return False
    return True


def remove(path: epath.Path) -> None:
    """Removes a file or object, if it is there."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    file_system, name = _file_system(path)
    with suppress(FileNotFoundError), _as_os_errors(path):
        file_system.rm_file(name)


@contextmanager
def new_directory(output: epath.Path, last: Sequence[str]) -> Iterator[Path]:
    """A local directory to fill, which becomes `output`. On a disk `output` appears only when whole; to a bucket the
    files are copied, those named `last`, without which the others are nothing, at the end.

    A killed run leaves one directory aside at most, which the next one replaces.
    """
    if is_remote(output):
        with tempfile.TemporaryDirectory() as local:
            yield Path(local)
            _copy_up(Path(local), output, last)
        return
    partial = Path(output.with_name(f".{output.name}.partial"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(output)


def _copy_up(local: Path, output: epath.Path, last: Sequence[str]) -> None:
    names = sorted(file.name for file in local.iterdir() if file.name not in last)
    output.mkdir(parents=True, exist_ok=True)
    for name in (*names, *(name for name in last if (local / name).exists())):
        epath.Path(local / name).copy(output / name)
        (local / name).unlink()  # a shard less on the disk


def list_files(directory: PathLike) -> list[RemoteFile]:
    """The objects directly under a remote `directory`, by name; none where it does not exist."""
    file_system, name = _file_system(directory)
    try:
        with _as_os_errors(directory):
            found = file_system.ls(name, detail=True)
    except FileNotFoundError:
        return []
    files = [
        RemoteFile(os.path.basename(one["name"]), one["size"], str(one.get("generation") or one.get("mtime")))
        for one in found
        if one["type"] == "file" and not one["name"].endswith("/")  # some tools make an empty object of a directory
    ]
    return sorted(files, key=lambda file: file.name)


def stamps(directory: PathLike, sizes: Mapping[str, int] | None = None) -> dict[str, tuple[int, str]]:
    """Size and checksum of every file anywhere under `directory`, by its name there: of a local file the crc32 of its
    content, which is read; of an object the crc32c that its store keeps (empty where it keeps none). With `sizes`, a
    local file that is not of the size it has there is not read; its checksum is empty."""
    if is_remote(directory):
        file_system, name = _file_system(directory)
        with _as_os_errors(directory):
            found = file_system.find(name, detail=True)
        return {
            path.removeprefix(f"{name}/"): (one["size"], f"crc32c:{one['crc32c']}" if "crc32c" in one else "")
            for path, one in found.items()
        }
    root = Path(directory)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = [file.relative_to(root).as_posix() for file in files]

    def stamp(name: str, file: Path) -> tuple[int, str]:
        size = file.stat().st_size
        return _stamp(file) if sizes is None or sizes.get(name) == size else (size, "")

    with ThreadPoolExecutor(TRANSFERS) as pool:  # zlib and reading release the GIL
        return dict(zip(names, pool.map(stamp, names, files), strict=True))


def _stamp(file: Path) -> tuple[int, str]:
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, f"crc32:{checksum:08x}"


def move(source: epath.Path, target: epath.Path) -> None:
    """Gives a directory another name; in a bucket its objects are copied there by the store, then removed."""
    if is_remote(source):
        file_system, name = _file_system(source)
        with _as_os_errors(source):
            file_system.mv(name, _file_system(target)[1], recursive=True)
    else:
        source.rename(target)


def upload(source: Path, target: PathLike, *, last: str, marker: str) -> None:
    """Make the objects directly under a remote `target` the files of the local directory `source`.

    The file `last` is uploaded after all others have arrived whole: who sees it sees everything. Until then the
    object `marker` says that `target` is half an upload, which a later one clears away.

    Raises:
        StorageError: a file did not arrive whole.
    """
    file_system, name = _file_system(target)
    write_whole(epath.Path(target) / marker, b"")
    for stale in list_files(target):
        if stale.name != marker:
            remove(epath.Path(target) / stale.name)
    files = sorted(file for file in source.iterdir() if file.name != last)
    _transfer(lambda file: _put(file_system, name, file), files, [f.stat().st_size for f in files], f"to {target}")
    arrived = {file.name: file.size for file in list_files(target)}
    for file in files:
        if arrived.get(file.name) != file.stat().st_size:
            raise StorageError(
                f"{target}/{file.name} has {arrived.get(file.name)} bytes after uploading {file.stat().st_size}: run "
                "the same command again"
            )
    _put(file_system, name, source / last)
    remove(epath.Path(target) / marker)


def local_copy(directory: PathLike, wanted: Callable[[str], bool]) -> Path:
    """A local directory with the objects directly under a remote `directory` whose names are `wanted`.

    Copies are kept under MMRLHF_CACHE (default: mmrlhf_jax in XDG_CACHE_HOME or ~/.cache), keyed by the directory and
    the names, sizes and versions of its objects, so an overwritten object is never taken for its predecessor. The
    processes of a host may ask at the same time: one copies, the others wait. An interrupted copy goes on where it
    was. Nothing is ever removed there.

    Raises:
        StorageError: the disk is too small, or a file did not arrive whole.
    """
    file_system, name = _file_system(directory)
    files = [file for file in list_files(directory) if wanted(file.name)]
    stated = repr([os.fspath(directory).rstrip("/"), *((file.name, file.size, file.version) for file in files)])
    target = cache_directory() / f"{os.path.basename(name)}-{hashlib.sha256(stated.encode()).hexdigest()[:16]}"
    target.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_name(target.name + ".lock")):
        missing = [file for file in files if _size(target / file.name) != file.size]
        _check_room(target, directory, sum(file.size for file in missing))
        fetch = partial(_get, file_system, name, target)
        _transfer(fetch, missing, [file.size for file in missing], f"from {os.fspath(directory)}")
    return target


def cache_directory() -> Path:
    """Where copies of remote files are kept."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrlhf_jax"


def _file_system(path: PathLike) -> tuple[Any, str]:
    """The fsspec file system of `path`, and its name for `path`."""
    text = os.fspath(path)
    try:
        return fsspec.core.url_to_fs(text)
    except ImportError as error:
        cure = "pip install 'mmrlhf-jax[gcs]'" if text.startswith("gs://") else str(error)
        raise StorageError(f"{text} needs a package that is not installed: {cure}") from error
    except ValueError as error:  # fsspec: protocol not known
        raise StorageError(f"{text} is neither a local path nor gs://: {error}") from error


def _put(file_system: Any, directory: str, file: Path) -> None:
    with _as_os_errors(f"{directory}/{file.name}"):
        file_system.put_file(str(file), f"{directory}/{file.name}")


def _get(file_system: Any, directory: str, target: Path, file: RemoteFile) -> None:
    aside = target / f".{file.name}.writing"
    with _as_os_errors(f"{directory}/{file.name}"):
        file_system.get_file(f"{directory}/{file.name}", str(aside))
    if aside.stat().st_size != file.size:
        raise StorageError(
            f"{directory}/{file.name}: {aside.stat().st_size} of {file.size} bytes arrived; run the same command again"
        )
    aside.replace(target / file.name)


def _transfer(one: Callable[[Any], None], files: list[Any], sizes: list[int], label: str) -> None:
    with (
        ThreadPoolExecutor(TRANSFERS) as pool,
        progress_line(total=sum(sizes), desc=label, unit="B", unit_scale=True, delay=PATIENCE) as bar,
    ):
        for _, size in zip(pool.map(one, files), sizes, strict=True):
            bar.update(size)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _check_room(target: Path, directory: PathLike, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        raise StorageError(
            f"{os.fspath(directory)} needs {needed / 2**30:.1f} GiB in {target.parent}, which has {free / 2**30:.1f} "
            f"GiB free: set {CACHE_VARIABLE} to a directory on a larger disk"
        )


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of this host at a time; the kernel gives the lock back when its holder dies."""
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

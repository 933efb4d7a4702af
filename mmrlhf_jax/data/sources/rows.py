"""Rows of JSON-lines, JSON-array and parquet files, one at a time, each with its line; a bad row costs only itself."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from mmrlhf_jax import storage
from mmrlhf_jax.data.sources.parquet import ParquetError, parquet_rows
from mmrlhf_jax.groups import Group, Media, Origin

MAX_ROW_BYTES = 64 * 2**20
MAX_ROW_VALUES = 2_000_000  # in one row: each takes up to 350 bytes as Python's, of five in the file
MAX_DEPTH = 100  # lists and objects in each other: within every recursion limit, and more than any format has
MAX_REASON = 1_000  # characters: rows quote themselves in reasons, and a row may be a name of 60 MB
MAX_RESPONSES = 256  # of one prompt: K (K - 1) / 2 pairs are written out
MAX_MEDIA = 256  # of one row: each is read, held and stored, however often it is named

_CHUNK = 2**20  # characters of a JSON array that are read at a time
_SPACE = re.compile(r"[ \t\r\n]*")
_MARKER = re.compile(r"<image>\n?")


class SourceError(ValueError):
    """The input as a whole cannot be read as asked."""


class RowError(ValueError):
    """One row cannot be used; the message is the reason."""


class MissingField(RowError):
    """The row lacks a field that the user named."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """One row that became part of no group. A `duplicate` adds nothing and is not held against the file.

    A `reason` over `MAX_REASON` characters is shortened.
    """

    origin: Origin
    reason: str
    duplicate: bool = False

    def __post_init__(self) -> None:
        if len(self.reason) > MAX_REASON:
            object.__setattr__(self, "reason", f"{self.reason[: MAX_REASON - 4]} ...")


@dataclass(frozen=True, slots=True)
class Remark:
    """Something true of `rows` rows that the user should know."""

    text: str
    rows: int


Item = Group | Rejected | Remark


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What the user says about the files, and where pictures go.

    mapping         target -> path in the row (`mapped`), or column (`sharegpt`)
    margin_column   column of pair margins (formats with a pair a row)
    by_score        responses with scores and without ranks are ranked by their scores (`mapped`)
    store           takes the bytes of a picture that stands in a row; without it such rows are rejected
    """

    mapping: Mapping[str, str] = field(default_factory=dict)
    margin_column: str | None = None
    by_score: bool = False
    store: Callable[[bytes], Media] | None = None


class Source(Protocol):
    def __call__(self, files: Sequence[str], options: SourceOptions) -> Iterator[Item]: ...


@dataclass(frozen=True, slots=True)
class Row:
    origin: Origin
    fields: dict[str, Any]


def read_rows(files: Sequence[str]) -> Iterator[Row | Rejected]:
    """Rows of each file in turn: parquet where the name ends in `.parquet` (`line` is then the row's number), one JSON
    array where the file starts with `[` and is no `.jsonl`, else JSON lines.

    Raises:
        SourceError: a file is missing, or a parquet file or JSON array is broken (there is no next line to go on from).
    """
    for file in files:
        path = storage.to_path(file)
        if not path.exists():
            raise SourceError(f"{file} does not exist: correct --input")
        if path.is_dir():
            raise SourceError(f"{file} is a directory: name the files in it")
        with storage.open_read(file) as stream:
            if path.suffix.lower() == ".parquet":
                yield from _parquet_rows(file, stream)
                continue
            array = "jsonl" not in path.name and _first_byte(stream) == b"["
            yield from _array_rows(file, stream) if array else _line_rows(file, stream)


def _first_byte(stream: BinaryIO) -> bytes:
    head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    stream.seek(0)
    return head[:1]


def _line_rows(file: str, stream: BinaryIO) -> Iterator[Row | Rejected]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        origin = Origin(file, number)
        if len(line) > MAX_ROW_BYTES:
            while not line.endswith(b"\n") and (line := stream.readline(2**20)):
                pass  # pass over the rest of the line without holding it
            yield Rejected(origin, f"row is over {MAX_ROW_BYTES} bytes: large pictures belong in files")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _parse(origin, line.rstrip(b"\r\n"))


def _parse(origin: Origin, line: bytes) -> Row | Rejected:
    if _values(line) > MAX_ROW_VALUES:
        return Rejected(origin, f"row has over {MAX_ROW_VALUES} values or commas: large arrays belong in files")
    try:
        return Row(origin, _object(_DECODER.decode(line.decode("utf-8"))))
    except UnicodeDecodeError as error:
        return Rejected(origin, f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Rejected(origin, f"invalid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Rejected(origin, "invalid JSON: nested too deeply")
    except ValueError as error:
        return Rejected(origin, str(error))


def _values(row: bytes | str) -> int:
    """An upper bound on the values in a row's text."""
    if len(row) <= MAX_ROW_VALUES:
        return 0
    marks = (b",", b"[", b"{") if isinstance(row, bytes) else (",", "[", "{")
    return sum(map(row.count, marks))  # type: ignore[arg-type]


def _array_rows(file: str, stream: BinaryIO) -> Iterator[Row | Rejected]:
    text = _ArrayText(file, stream)
    found = text.after_space(past="[")
    while found != "]":
        origin = Origin(file, text.line)
        try:
            row = text.value()
            if (found := text.after_space()) not in (",", "]"):
                raise RowError("expected ',' or ']'")
        except (ValueError, RecursionError) as error:
            if isinstance(error, SourceError):
                raise
            said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise SourceError(
                f"{origin}: broken JSON array ({said:.200}); save the rows as JSON lines, where one bad row costs one "
                "row"
            ) from error
        yield _parse(origin, row.encode("utf-8", "surrogatepass"))
        if found == ",":
            found = text.after_space(past=",")
    if text.after_space(past="]"):
        raise SourceError(f"{file}: text after the JSON array; save the rows as JSON lines")


class _ArrayText:
    """The text of a JSON array, of which a row and what was read along with it are held."""

    def __init__(self, file: str, stream: BinaryIO):
        self._file, self._stream = file, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._line, self._ended, self._bytes = "", 0, 1, False, 0

    @property
    def line(self) -> int:
        """That of the next character, from 1."""
        return self._line + self._text.count("\n", 0, self._at)

    def after_space(self, past: str = "") -> str:
        """The next character that is no space, which stays the next one; first past an expected one. "" at the end."""
        if past:
            self.after_space()
            self._at += 1
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def value(self) -> str:
        """The text of the next JSON value. Raises ValueError, RecursionError: there is none."""
        decoder = json.JSONDecoder()
        while True:
            held = len(self._text) - self._at
            if _values(self._text) > 2 * MAX_ROW_VALUES:  # those of the rows behind it are counted too
                raise RowError(f"a row of over {MAX_ROW_VALUES} values or commas")
            try:
                _, end = decoder.raw_decode(self._text, self._at)
            except ValueError:
                if held > MAX_ROW_BYTES:
                    raise RowError(f"a row of over {MAX_ROW_BYTES} bytes, or a text without an end") from None
                if not self._read():
                    raise
                continue
            if end < len(self._text) or not self._read():  # what ends with the text read so far may go on, as 1 and 15
                value, self._at = self._text[self._at : end], end
                return value

    def _read(self) -> bool:
        """Read as much again as is held; whether there was more."""
        if self._ended:
            return False
        self._line = self.line
        self._text, self._at = self._text[self._at :], 0
        data = self._stream.read(max(_CHUNK, len(self._text)))
        self._ended = not data
        try:
            self._text += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            where = self._bytes + error.start
            raise SourceError(f"{self._file} is not UTF-8 near byte {where}: re-save it as UTF-8") from error
        self._bytes += len(data)
        return True


def _parquet_rows(file: str, stream: BinaryIO) -> Iterator[Row | Rejected]:
    try:
        for number, fields in enumerate(parquet_rows(stream), 1):
            origin = Origin(file, number)
            try:
                if isinstance(fields, str):
                    raise RowError(fields)
                checked = _object(fields)
                if _characters(checked) > MAX_ROW_BYTES:
                    raise RowError(f"texts of the row are over {MAX_ROW_BYTES} characters")
                yield Row(origin, checked)
            except RowError as error:
                yield Rejected(origin, str(error))
    except ParquetError as error:
        raise SourceError(f"{file}: {error}") from error


def _characters(value: Any) -> int:
    """Of all texts in it; bytes are pictures, which have a bound of their own."""
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 0


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object, as strictly as a row is read.

    Raises:
        RowError, json.JSONDecodeError: it is none.
    """
    if _values(text) > MAX_ROW_VALUES:
        raise RowError(f"over {MAX_ROW_VALUES} values or commas")
    try:
        return _object(_DECODER.decode(text))
    except RecursionError:
        raise RowError("nested too deeply") from None
    except (RowError, json.JSONDecodeError):
        raise
    except ValueError as error:  # a number of more digits than Python turns into one
        raise RowError(str(error)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RowError(f"key {key[:80]!r} appears twice")
            seen.add(key)
    return fields


def _no_constant(name: str) -> Any:
    raise RowError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"row is {_kind(value)}, an object was expected")
    _check_strings(value)
    return value


def is_readable(text: str) -> bool:
    """Whether a source takes the text: it holds neither a NUL character nor a lone surrogate."""
    try:
        _check_strings(text)
    except RowError:
        return False
    return True


def _check_strings(value: Any, at: tuple[str, ...] = ()) -> None:
    """`at` are the keys that lead to the value, each list's an empty one; they become text only where it is needed."""
    if isinstance(value, str):
        if "\0" in value:
            raise RowError(f"NUL character in {_named(at)}")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise RowError(f"lone surrogate in {_named(at)}") from None
    elif isinstance(value, dict | list | tuple):
        if len(at) >= MAX_DEPTH:
            raise RowError(f"nested over {MAX_DEPTH} deep in {_named(at)}")
        for key, inner in value.items() if isinstance(value, dict) else (("", inner) for inner in value):
            _check_strings(key)
            if isinstance(inner, str | dict | list | tuple):
                _check_strings(inner, (*at, key))


def _named(at: tuple[str, ...]) -> str:
    return ".".join(key[:80] for key in at if key) or "a key"


# Fields, checked. `where` is the name shown to the user.


def text_of(value: Any, where: str) -> str:
    """A string with something in it, verbatim."""
    if not isinstance(value, str):
        raise RowError(f"{where} is {_kind(value)}, a string was expected")
    if not value.strip():
        raise RowError(f"{where} is empty")
    return value


def optional_text_of(value: Any, where: str) -> str | None:
    """None where the value is null or blank."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text_of(value, where)


def number_of(value: Any, where: str) -> float:
    """A finite number; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{where} is {_kind(value)}, a number was expected")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(f"{where} is not finite")
    return number


def id_of(value: Any, where: str) -> str:
    """A string, or an integer written out."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_of(value, where)


def prompt_of(value: Any, media: Sequence[Media], where: str = "'prompt'") -> str:
    """The question, without the `<image>` markers (one a picture) that stand before it.

    The released loader strips them too; a marker elsewhere is text.
    """
    text, start, found = text_of(value, where), 0, 0
    while found < max(1, len(media)) and (marker := _MARKER.match(text, start)):
        start, found = marker.end(), found + 1
    if found and not media:
        raise RowError(f"{where} starts with <image> but the row names no picture")
    return text_of(text[start:], where)


_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    bytes: "bytes",
    list: "a list",
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "an object")

"""Rows of a parquet file, a few at a time: columns of pictures may be far larger than memory.

What is held at once is a batch of rows and, of each column, one page; a page is never more than a row group, and
`datasets` writes row groups of some hundred pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

BATCH_BYTES = 32 * 2**20  # about what is held at once, by the sizes the file states
BATCH_ROWS = 128
DICTIONARY_BYTES = 512 * 2**20  # at most, of a batch whose rows all point at the largest value there can be


class ParquetError(ValueError):
    """The file cannot be read (on) as parquet."""


def parquet_rows(stream: BinaryIO) -> Iterator[dict[str, Any] | str]:
    """Each row as Python values, null ones included; a str says why a row cannot be read.

    Raises:
        ParquetError: pyarrow is not there, or the file is no whole parquet file.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ParquetError("parquet needs pyarrow: pip install 'mmrlhf-jax[parquet]'") from error
    read = 0
    try:
        # A buffer, and no prefetch: otherwise pyarrow reads whole column chunks at once.
        file = pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ParquetError("two columns have the same name: rename one")
        for group in range(file.num_row_groups):
            size = _batch_rows(file.metadata.row_group(group))
            for batch in file.iter_batches(size, row_groups=[group], use_threads=False):
                for number in range(batch.num_rows):
                    read += 1
                    yield _row(batch.slice(number, 1))
    except ParquetError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:  # names that are no text, and such
        where = f"after row {read}: " if read else ""
        raise ParquetError(f"{where}not a whole parquet file ({' '.join(str(error).split())[:200]})") from error


def _batch_rows(group: Any) -> int:
    """By the group's own sizes: pyarrow ends the process over spoiled statistics when it is asked about a column."""
    each = max(1, group.total_byte_size // max(1, group.num_rows))
    dictionary = max(1, group.total_byte_size)  # one value may fill it, and every row point at it
    return max(1, min(BATCH_ROWS, BATCH_BYTES // each, DICTIONARY_BYTES // dictionary))


def _row(one: Any) -> dict[str, Any] | str:
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start} of a text"
    except (ValueError, OverflowError, KeyError, RecursionError) as error:
        # structs with the same name twice, dates outside Python's calendar, time zones that are not there
        return f"cannot be read: {error}"

"""The rows of a JSONL or Parquet file as JSON documents, one at a time, in bounded memory.

Owns: how either format holds rows, the limits of a row and of a file's form. Does not own: opening files, what a row
says (`contracts.TrainingRow`), what becomes of it (`uploaded`).

What a Parquet file says of its own sizes may be false: whoever does not know where it is from reads it in a process
that may not have much memory.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_LINE_BYTES: Final = 8 * 2**20
MAX_ROWS: Final = 1_000_000
MAX_COLUMNS: Final = 64
"""Leaves of nested columns counted each."""
MAX_DEPTH: Final = 6
MAX_FOOTER_BYTES: Final = 4 * 2**20
MAX_ROW_GROUP_BYTES: Final = 512 * 2**20
BATCH_ROWS: Final = 64
PARQUET_MAGIC: Final = b"PAR1"
PARQUET_ENCRYPTED: Final = b"PARE"
COMPRESSED: Final = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")

RowFormat = Literal["jsonl", "parquet"]


class Row(NamedTuple):
    line: int
    """From 1 on."""
    document: bytes


class UnreadableFile(ValueError):
    """What is wrong, and in which line; None: with the file as a whole. The text holds nothing of the content."""

    def __init__(self, line: int | None, message: str) -> None:
        super().__init__(line, message)
        self.line, self.message = line, message


def format_of(stream: BinaryIO) -> RowFormat:
    """By its first bytes, not by its name. Raises UnreadableFile."""
    stream.seek(0)
    head = stream.read(1024)
    stream.seek(0)
    if head.startswith(PARQUET_ENCRYPTED):
        raise UnreadableFile(None, "is an encrypted Parquet file")
    if head.startswith(PARQUET_MAGIC):
        return "parquet"
    if head.startswith(COMPRESSED):
        raise UnreadableFile(None, "is compressed: send JSONL as it is, or Parquet")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        raise UnreadableFile(None, "is empty")
    if not text.startswith(b"{"):
        raise UnreadableFile(None, "is neither JSONL, whose lines are JSON objects, nor Parquet")
    return "jsonl"


def rows_of(stream: BinaryIO, form: RowFormat) -> Iterator[Row]:
    """Raises UnreadableFile where reading cannot go on, MemoryError where a batch does not fit."""
    stream.seek(0)
    rows = lines_of(stream) if form == "jsonl" else parquet_rows_of(stream)
    for number, row in enumerate(rows, start=1):
        if number > MAX_ROWS:
            raise UnreadableFile(row.line, f"a file may have at most {MAX_ROWS} rows")
        yield row


def lines_of(stream: BinaryIO) -> Iterator[Row]:
    """Lines end with LF or CRLF; a byte order mark may stand before the first; empty ones are left out."""
    number = 0
    while content := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(content) > MAX_LINE_BYTES:
            raise UnreadableFile(number, f"is longer than {MAX_LINE_BYTES} bytes")
        document = (content.removeprefix(codecs.BOM_UTF8) if number == 1 else content).strip(b" \t\r\n")
        if document:
            yield Row(number, document)


def parquet_rows_of(stream: BinaryIO) -> Iterator[Row]:
    """Row group by row group; a column that is null in a row is not in its document."""
    import pyarrow as pa

    number = 0
    try:
        with _opened(stream) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(number, json.dumps(_without_nulls(row)).encode())
    except pa.ArrowMemoryError as error:
        raise MemoryError from error
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, UnreadableFile):
            raise
        raise UnreadableFile(number + 1, "of the Parquet file cannot be read: it is damaged or cut off") from None


def _opened(stream: BinaryIO) -> pq.ParquetFile:
    """Its form checked, before anything of its size is believed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require_footer(stream)
    limits = {"thrift_string_size_limit": MAX_FOOTER_BYTES, "thrift_container_size_limit": MAX_FOOTER_BYTES // 64}
    try:
        # Reading ahead would hold a row group's columns whole, by threads that may abort the process as it ends
        # (Arrow issue 34314).
        file = pq.ParquetFile(stream, pre_buffer=False, **limits)
    except (pa.ArrowException, OSError, ValueError):
        message = "is a Parquet file whose footer cannot be read: it is damaged, too large or nested too deeply"
        raise UnreadableFile(None, message) from None
    metadata = file.metadata
    if metadata.num_columns > MAX_COLUMNS:
        raise UnreadableFile(None, f"has {metadata.num_columns} columns; at most {MAX_COLUMNS} are read")
    if metadata.num_rows > MAX_ROWS:
        raise UnreadableFile(None, f"a file may have at most {MAX_ROWS} rows")
    largest = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)
    if largest > MAX_ROW_GROUP_BYTES:
        raise UnreadableFile(None, f"has a row group of more than {MAX_ROW_GROUP_BYTES} bytes")
    for field in file.schema_arrow:
        _require_readable(field.type, MAX_DEPTH)
    return file


def _require_footer(stream: BinaryIO) -> None:
    size = stream.seek(0, 2)
    stream.seek(max(0, size - 8))
    length, magic = int.from_bytes(stream.read(4), "little"), stream.read(4)
    stream.seek(0)
    if magic == PARQUET_ENCRYPTED:
        raise UnreadableFile(None, "is an encrypted Parquet file")
    if magic != PARQUET_MAGIC or length > size - 12:
        raise UnreadableFile(None, "is a Parquet file that is cut off: its footer is not there")
    if length > MAX_FOOTER_BYTES:
        raise UnreadableFile(None, f"has a footer of more than {MAX_FOOTER_BYTES} bytes: it describes too many columns")


def _require_readable(kind: pa.DataType, depth: int) -> None:
    import pyarrow as pa

    types = pa.types
    if depth == 0:
        raise UnreadableFile(None, f"has a column nested more than {MAX_DEPTH} deep")
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        _require_readable(kind.value_type, depth - 1)
    elif types.is_struct(kind):
        for i in range(kind.num_fields):
            _require_readable(kind.field(i).type, depth - 1)
    elif types.is_dictionary(kind):
        _require_readable(kind.value_type, depth - 1)
    else:
        readable = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_null)
        if not any(is_kind(kind) for is_kind in readable):
            raise UnreadableFile(None, "has a column that holds neither texts, numbers nor lists or structs of them")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value

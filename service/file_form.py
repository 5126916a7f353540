"""A multipart form with one file in it, written to disk as it arrives.

Owns: the media type, the parts a form may have, the byte limit, how long a sender may be silent. Does not own: what is
in the file (file_check.py), where it is kept (files.py). Nothing here ever repeats a value that was sent.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection
from typing import IO, Final, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from bon_algos.contracts import Record
from service.errors import BodyTimeout, BodyTooLarge, InvalidField, StoreFull, Unparseable, UnsupportedMediaType
from service.json_body import field_error, printable

SILENT_SECONDS: Final = 10.0
"""A sender that says nothing for so long is not waited for."""
MAX_FIELD_BYTES: Final = 256
MAX_PARTS: Final = 8
FORM_BYTES: Final = 16_384
"""Of boundaries, headers and fields around the file."""
MAX_NAME: Final = 255


class Received(NamedTuple):
    filename: str
    num_bytes: int
    digest: str
    """sha256 of the file's content."""
    fields: dict[str, str]


class FileForm(Record):
    """The parts of the form that a file comes in."""

    file: bytes = Field(json_schema_extra={"format": "binary"})
    """JSONL or Parquet, as docs/training-files.md has it."""
    purpose: Literal["fine-tune"]


async def receive(request: Request, target: IO[bytes], model: type[BaseModel], max_bytes: int) -> Received:
    """A form of these fields, its `file` written to `target`.

    Raises UnsupportedMediaType (415), BodyTooLarge (413), BodyTimeout (408), Unparseable (400), InvalidField (422),
    StoreFull (507) where the disk is.
    """
    form = _Form(_boundary(request), target, set(model.model_fields) - {"file"}, max_bytes)
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared) > max_bytes + FORM_BYTES:
        raise form.too_large()
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(SILENT_SECONDS):
                chunk = await anext(stream, None)
            if chunk is None:
                received = form.end()
                model.model_validate({**received.fields, "file": b""})
                return received
            await asyncio.to_thread(form.write, chunk)
    except TimeoutError:
        raise BodyTimeout(f"nothing of the body came for {SILENT_SECONDS:.0f} s") from None
    except ValidationError as error:
        raise field_error(error) from None
    except FormParserError:
        raise Unparseable("the body is not a multipart form") from None
    except OSError as error:
        raise StoreFull(f"the file cannot be written: {error.strerror}", code="disk_full") from error


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise UnsupportedMediaType("the body must be multipart/form-data with a boundary")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaType("the body must not be compressed")
    return options[b"boundary"]


class _Form:
    """What the parser found so far."""

    def __init__(self, boundary: bytes, target: IO[bytes], fields: Collection[str], max_bytes: int) -> None:
        self._target, self._allowed, self._max_bytes = target, fields, max_bytes
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._hash, self._num_bytes, self._num_received = hashlib.sha256(), 0, 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._num_parts, self._is_whole = 0, False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._part,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )

    def write(self, chunk: bytes) -> None:
        self._num_received += len(chunk)
        if self._num_received > self._max_bytes + FORM_BYTES:
            raise self.too_large()
        self._parser.write(chunk)

    def end(self) -> Received:
        self._parser.finalize()
        if not self._is_whole:
            raise Unparseable("the multipart form has no end")
        if self._filename is None:
            raise InvalidField("file is required, with a filename", param="file")
        try:
            fields = {name: bytes(value).decode() for name, value in self._fields.items()}
        except UnicodeDecodeError:
            raise Unparseable("a field of the form is not valid UTF-8") from None
        return Received(self._filename, self._num_bytes, self._hash.hexdigest(), fields)

    def too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"a file must be at most {self._max_bytes} bytes long", param="file")

    def _begin(self) -> None:
        self._num_parts += 1
        self._disposition = b""
        if self._num_parts > MAX_PARTS:
            raise InvalidField(f"a form may have at most {MAX_PARTS} parts", param="body")

    def _header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _part(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file" and b"filename" in options and self._filename is None:
            self._filename = _plain_name(options[b"filename"])
        elif self._name in self._allowed and self._name not in self._fields:
            self._fields[self._name] = bytearray()
        else:
            is_known = self._name in ("file", *self._allowed)
            reason = "is given twice, or without a filename" if is_known else "is not a field known here"
            raise InvalidField(f"a part of the form {reason}", param=printable(self._name))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name in self._fields:
            field = self._fields[self._name]
            field.extend(data[start:end])
            if len(field) > MAX_FIELD_BYTES:
                raise InvalidField(f"{self._name} must be at most {MAX_FIELD_BYTES} bytes long", param=self._name)
            return
        self._num_bytes += end - start
        if self._num_bytes > self._max_bytes:
            raise self.too_large()
        content = data[start:end]
        self._hash.update(content)
        self._target.write(content)

    def _end(self) -> None:
        self._is_whole = True


def _plain_name(filename: bytes) -> str:
    """A label for people, never a path: its last part, printable."""
    last = filename.decode(errors="replace").replace("\\", "/").rsplit("/", 1)[-1]
    name = "".join(character if character.isprintable() else "_" for character in last)[:MAX_NAME]
    if name in ("", ".", ".."):
        raise InvalidField("file needs a filename", param="file")
    return name

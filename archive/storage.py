"""Whole files in a directory or in an object store: put, get, list, delete.

Owns: the address, and that a file is there as a whole or not at all. Does not own: what a file holds. Every failure is
an OSError; a file that is not there is FileNotFoundError.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final, cast
from urllib.parse import parse_qsl, urlsplit

from pyarrow import fs

from bon_algos.crash_points import crash_point

UNFINISHED: Final = ".*.part"
"""Names of files that are being written, or were when their writer died."""
CONNECT_SECONDS: Final = 5.0
REQUEST_SECONDS: Final = 30.0
ATTEMPTS: Final = 3
"""Of one call of an object store, before the caller is told."""
_OPTIONS: Final = ("endpoint_override", "region", "scheme")


class Storage:
    """The files below one root."""

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self._files = filesystem
        self._root = root.rstrip("/")
        self._is_local = isinstance(filesystem, fs.LocalFileSystem)

    def address(self, name: str) -> str:
        """Of a file, for others who read it."""
        return f"{'' if self._is_local else 's3://'}{self._root}/{name}"

    def put(self, name: str, content: bytes) -> None:
        """Write a file, or put another content in its place, so that a reader sees one or the other."""
        if self._is_local:
            put_durably(Path(self._root) / name, content)
            return
        with self._files.open_output_stream(f"{self._root}/{name}", compression=None) as file:
            file.write(content)

    def get(self, name: str) -> bytes:
        with self._files.open_input_stream(f"{self._root}/{name}", compression=None) as file:
            return cast(bytes, file.read())

    def names(self, directory: str) -> list[str]:
        """Every file below a directory, in order; those that are still being written are not among them."""
        chosen = fs.FileSelector(f"{self._root}/{directory}", recursive=True, allow_not_found=True)
        found = (one.path for one in self._files.get_file_info(chosen) if one.is_file)
        names = (path[len(self._root) + 1 :] for path in found)
        return sorted(name for name in names if not name.rpartition("/")[2].startswith("."))

    def delete(self, name: str) -> None:
        """No error when it is gone already."""
        try:
            self._files.delete_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return

    def remove_unfinished(self) -> None:
        """What a process that died was writing. Only for the one that writes."""
        if self._is_local:
            for path in Path(self._root).rglob(UNFINISHED):
                path.unlink(missing_ok=True)


def open_storage(url: str, *, request_seconds: float = REQUEST_SECONDS, attempts: int = ATTEMPTS) -> Storage:
    """A directory, or `s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=…`; keys for it come from the
    environment (AWS_ACCESS_KEY_ID, …) or the machine's role. Raises ValueError for another address."""
    parts = urlsplit(url)
    if parts.scheme == "":
        directory = Path(url).absolute()
        return Storage(fs.LocalFileSystem(), str(directory))
    options = dict(parse_qsl(parts.query))
    if parts.scheme != "s3" or not parts.hostname or "@" in parts.netloc or not set(options) <= set(_OPTIONS):
        raise ValueError(f"the archive is a directory or s3://bucket/prefix, with the options {', '.join(_OPTIONS)}")
    store = fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=request_seconds,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        **options,
    )
    return Storage(store, f"{parts.hostname}/{parts.path.strip('/')}")


def archive_url(setting: str, artefacts: Path) -> str:
    """What is meant by a setting that says nothing: `ledger` in the artefact directory."""
    return setting or str(artefacts / "ledger")


def put_durably(final: Path, content: bytes) -> None:
    """Written aside, synced, renamed, and the directory synced: a kill or a power cut leaves the one or the other."""
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = final.parent / f".{final.name}.{secrets.token_hex(4)}.part"
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        crash_point("content.written")
        aside.rename(final)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

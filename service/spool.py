"""An append-only log on the gateway's own disk: what it has said yes to outlives the process.

Owns: frames, segments, the durable cursor, the cap, the lock (one process per directory). Does not own: what a frame
holds (ledger.py). One write per frame and no fsync: a killed process loses nothing, a power cut the last moments.

    <directory>/lock               held by the process that writes here
    <directory>/00000007.spool     frames: magic, length, CRC-32 of the payload, payload
    <directory>/cursor             where reading goes on: segment, offset, CRC-32 of both

A new process begins a new segment, so that a frame cut short by a crash is never written behind.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple
from zlib import crc32

from bon_algos.crash_points import crash_point

_HEADER: Final = struct.Struct(">4sII")
_CURSOR: Final = struct.Struct(">QQI")
_MAGIC: Final = b"bonS"
SEGMENT_BYTES: Final = 64 * 2**20
READ_BYTES: Final = 4 * 2**20
log = logging.getLogger("bonsai.ledger")


class SpoolLocked(Exception):
    """Another process writes into this directory."""


class Position(NamedTuple):
    """A place in the spool: segment number and byte offset."""

    segment: int
    offset: int


class Frame(NamedTuple):
    payload: bytes
    end: Position
    """Where the next frame begins: what to acknowledge when this one is done."""


class Reading(NamedTuple):
    frames: list[Frame]
    end: Position
    """Where to read on, also when there were only damaged places."""


class Spool:
    """Append, read, acknowledge. All calls are short and synchronous; one thread."""

    def __init__(self, directory: Path, max_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Raises SpoolLocked when another process holds the directory, OSError when it cannot be written."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._max_bytes = max_bytes
        # Only whole segments are deleted: small ones leave room for what is new once the old is delivered.
        self._segment_bytes = min(segment_bytes, max_bytes // 4)
        self._lock = _take_lock(directory)
        self._sizes = {int(path.stem): path.stat().st_size for path in directory.glob("*.spool")}
        self._cursor_file = os.open(directory / "cursor", os.O_RDWR | os.O_CREAT, 0o600)
        self._cursor = self._read_cursor()
        self.active = max([*self._sizes, self._cursor.segment]) + 1
        """The segment that is written; the lower ones are of earlier processes or full."""
        self._file = self._open_segment(self.active)
        self.damaged = 0
        """Places where frames were cut or broken and had to be passed over."""
        self.refusals = 0
        """How often the disk refused to open, read or delete a segment or to write the cursor; frames apart."""
        self._refused: set[str] = set()

    def close(self) -> None:
        for file in (self._file, self._cursor_file, self._lock):
            os.close(file)

    @property
    def cursor(self) -> Position:
        return self._cursor

    @property
    def total_bytes(self) -> int:
        """What the segments take on disk."""
        return sum(self._sizes.values())

    @property
    def pending_bytes(self) -> int:
        """What was written and is not acknowledged."""
        return sum(size for segment, size in self._sizes.items() if segment >= self._cursor.segment) - (
            self._cursor.offset if self._cursor.segment in self._sizes else 0
        )

    def append(self, payload: bytes) -> bool:
        """Write one frame; False when the cap or the disk refuses it, and then nothing of it is there."""
        frame = _HEADER.pack(_MAGIC, len(payload), crc32(payload)) + payload
        if self._sizes[self.active] >= self._segment_bytes:
            with suppress(OSError):  # The full segment takes more until there can be another.
                self._rotate()
        if self.total_bytes + len(frame) > self._max_bytes:
            return False
        before = self._sizes[self.active]
        try:
            written = os.pwrite(self._file, frame, before)
        except OSError:
            written = 0
        if written != len(frame):
            with suppress(OSError):  # What cannot be cut off is written over by the next frame.
                os.ftruncate(self._file, before)
            return False
        self._sizes[self.active] = before + len(frame)
        crash_point("spool.written")
        return True

    def read(self, start: Position) -> Reading:
        """The frames from `start` on, about READ_BYTES of them; none when there is nothing new. Damaged places are
        passed over and counted. Raises OSError."""
        at = start
        frames: list[Frame] = []
        with self._told("read a segment"):
            for segment in sorted(number for number in self._sizes if number >= start.segment):
                frames, at = self._read_segment(at if segment == at.segment else Position(segment, 0))
                if frames:
                    break
        return Reading(frames, at)

    def acknowledge(self, position: Position) -> None:
        """Everything before `position` is done with: never read again, deleted once its segment is behind. Raises
        OSError, and then the cursor stands where it stood: to be called again."""
        with self._told("move the cursor"):
            # In place: a rename over the old file would make the file system flush, and hold up the event loop.
            os.pwrite(self._cursor_file, _CURSOR.pack(*position, _cursor_checksum(position)), 0)
            crash_point("drain.acknowledged")
            for segment in [number for number in self._sizes if number < position.segment]:
                self._path(segment).unlink(missing_ok=True)
                del self._sizes[segment]
        self._cursor = position

    def begin_segment(self) -> int:
        """What is appended from now on stands in a segment of its own, so that what is acknowledged can be deleted. Its
        number. Raises OSError, and then it stands where it stood."""
        if self._sizes[self.active]:
            self._rotate()
        return self.active

    def _read_segment(self, at: Position) -> Reading:
        frames: list[Frame] = []
        size, taken = self._sizes[at.segment], 0
        with self._path(at.segment).open("rb") as file:
            while at.offset < size and taken < READ_BYTES:
                file.seek(at.offset)
                payload = _read_frame(file, size - at.offset)
                if payload is None:
                    self.damaged += 1
                    at = Position(at.segment, _next_frame(file, at.offset + 1, size))
                    continue
                taken += len(payload)
                at = Position(at.segment, at.offset + _HEADER.size + len(payload))
                frames.append(Frame(payload, at))
        return Reading(frames, at)

    def _rotate(self) -> None:
        """Raises OSError. The old file is closed last: a number that is closed may be somebody's socket by the next
        frame."""
        with self._told("begin a segment"):
            opened = self._open_segment(self.active + 1)
            full, self._file, self.active = self._file, opened, self.active + 1
            os.close(full)

    def _open_segment(self, segment: int) -> int:
        opened = os.open(self._path(segment), os.O_WRONLY | os.O_CREAT, 0o600)
        self._sizes[segment] = 0
        return opened

    @contextmanager
    def _told(self, deed: str) -> Iterator[None]:
        """Counts what the disk refuses; logs it once, until the disk obeys again."""
        try:
            yield
        except OSError as error:
            self.refusals += 1
            if deed not in self._refused:
                log.error("the spool cannot %s, and tries again: %s", deed, error)
            self._refused.add(deed)
            raise
        self._refused.discard(deed)

    def _path(self, segment: int) -> Path:
        return self._directory / f"{segment:08d}.spool"

    def _read_cursor(self) -> Position:
        """Without a readable cursor everything is read again: delivery is what makes it once."""
        written = os.pread(self._cursor_file, _CURSOR.size, 0)
        if len(written) == _CURSOR.size:
            segment, offset, checksum = _CURSOR.unpack(written)
            if checksum == _cursor_checksum(Position(segment, offset)):
                return Position(segment, offset)
        return Position(min(self._sizes, default=0), 0)


def _take_lock(directory: Path) -> int:
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise SpoolLocked(
            f"another gateway process writes into {directory}: give each its own directory (BONSAI_SPOOL)"
        ) from None
    return lock


def _cursor_checksum(position: Position) -> int:
    return crc32(b"%d %d" % position)


def _read_frame(file: BinaryIO, available: int) -> bytes | None:
    """The payload of the frame that begins here; None when no intact frame does."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    magic, length, checksum = _HEADER.unpack(header)
    if magic != _MAGIC or _HEADER.size + length > available:
        return None
    payload = file.read(length)
    return payload if crc32(payload) == checksum else None


def _next_frame(file: BinaryIO, offset: int, size: int) -> int:
    """Where the next frame may begin; the segment's size when there is none."""
    file.seek(offset)
    found = file.read(size - offset).find(_MAGIC)
    return size if found < 0 else offset + found

"""Directories that are whole or absent: written aside, synced, renamed; and what it means that there is no room.

Owns the order of system calls that survives a kill and a power cut. Does not own what is written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from bon_algos.crash_points import CrashPoint, crash_point
from worker.errors import DiskFull

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, a quota, the size that a file may have here."""
Points = tuple[CrashPoint, CrashPoint]
"""Passed when all is written and synced, and when it has its name."""


@contextmanager
def staged(
    final: Path,
    *,
    within: Path | None = None,
    confirm: Callable[[], None] | None = None,
    points: Points | None = None,
) -> Iterator[Path]:
    """A directory to fill; on leaving the block it becomes `final`, unless that exists by then.

    Names of things are chosen so that who comes second wanted to write the same: the first one stays. When the
    block or `confirm` raises, or the process dies in it, `final` does not exist.

    within: where it is filled, of the same file system; beside `final` unless told. confirm: called when all is on
    the disk and only the rename is left.
    """
    aside = (within or final.parent) / f".{final.name}.{secrets.token_hex(4)}"
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in sorted(aside.iterdir()):
            sync(path)
        sync(aside)
        _pass(points, 0)
        if confirm is not None:
            confirm()
        final.parent.mkdir(parents=True, exist_ok=True)
        if rename_unless_there(aside, final):
            _pass(points, 1)
            sync(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def rename_unless_there(aside: Path, final: Path) -> bool:
    """Give a filled directory its name; False when another has it."""
    try:
        if not final.exists():
            aside.rename(final)
            return True
    except OSError:
        if not final.exists():  # no loss against another who came between the look and the rename
            raise
    return False


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Raises DiskFull for what could not be written in the block because there was no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DiskFull(f"no room on the disk: {error}") from error
    except SafetensorError as error:
        # It has no number but the one in its text.
        if not any(f"(os error {number})" in str(error) for number in NO_ROOM):
            raise
        raise DiskFull(f"no room on the disk: {error}") from error


def _pass(points: Points | None, which: int) -> None:
    if points is not None:
        crash_point(points[which])


def sync(path: Path) -> None:
    """Have the kernel put a file, or a directory's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()

"""Directories that are whole or absent: written aside, synced, renamed.

Owns the order of system calls that survives a kill and a power cut. Does not own what is written.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A directory beside `final` to fill; on leaving the block it becomes `final`, unless that exists by then.

    Names of things are chosen so that who comes second wanted to write the same: the first one stays. When the
    block raises, or the process dies in it, `final` does not exist.
    """
    aside = final.parent / f".{final.name}.{secrets.token_hex(4)}"
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in sorted(aside.iterdir()):
            sync(path)
        sync(aside)
        if not final.exists():
            aside.rename(final)
            sync(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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

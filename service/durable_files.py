"""Files beside the artefacts that several gateways write: one at a time, whole or not at all.

Owns: the lock of a directory, and what a gateway that was killed was writing there. Does not own: what is written, and
the order of system calls that survives a kill (`archive.storage.put_durably`).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from archive.storage import UNFINISHED


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Of all processes only this one writes into the directory, which is made where there is none; what a dead one was
    writing there is gone. Blocks; raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in directory.glob(UNFINISHED):
            path.unlink(missing_ok=True)
        yield

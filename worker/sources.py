"""Which groups a frozen window was made of: what pins them in the ledger, and what an erasure finds it by.

Owns: the file beside the window. Does not own: the window (dataset.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from archive.storage import open_storage
from bon_algos.contracts import CandidateGroup, subject_digest
from bon_algos.crash_points import crash_point

FILE: Final = "groups.json"
CONTENT: Final = "pools.jsonl.z"


class Source(NamedTuple):
    group_id: str
    subject: str | None
    """Digest of tenant and user, where the request named one."""
    created_at: float


class DamagedSources(OSError):
    """What a window was made of cannot be read."""


def write_sources(directory: Path, groups: Sequence[CandidateGroup]) -> None:
    rows = [Source(one.id, one.user and subject_digest(one.tenant, one.user), one.created_at) for one in groups]
    (directory / FILE).write_text(json.dumps(rows))


def read_sources(window: Path) -> list[Source]:
    """None where there is no window. Raises DamagedSources, OSError."""
    file = window / FILE
    try:
        return [Source(*row) for row in json.loads(file.read_text())] if file.exists() else []
    except (ValueError, TypeError) as error:
        raise DamagedSources(f"{file} cannot be read: {type(error).__name__}") from None


def windows(artefacts: Path) -> list[Path]:
    """The frozen windows of all jobs, each in its job's directory."""
    return [path for path in sorted(artefacts.glob("jobs/*/window")) if path.is_dir()]


def unfinished(artefacts: Path) -> list[Path]:
    """Windows that an attempt was writing when it was killed, or writes now. Whoever wants to see all of a job's looks
    here first: a window is at either place at any time, and goes one way only."""
    return sorted(artefacts.glob("jobs/*/*/.window.*"))


def pinned(artefacts: Path) -> frozenset[str]:
    """Groups that a frozen window was made of. Raises DamagedSources, OSError."""
    return frozenset(one.group_id for window in windows(artefacts) for one in read_sources(window))


def delete_unfinished(window: Path, is_gone: Callable[[Source], bool]) -> None:
    """The whole of it, where it holds what is to go; an attempt that writes it fails, and the next one chooses anew.
    Raises OSError; again is the same."""
    if holds(window, is_gone):
        with suppress(FileNotFoundError):  # it got its name, or its attempt was forgotten
            shutil.rmtree(window)
        crash_point("unfinished.removed")


def holds(window: Path, is_gone: Callable[[Source], bool]) -> bool:
    """Whether an unfinished window does. What is not known to be others' counts."""
    try:
        sources = read_sources(window)
    except DamagedSources:
        return True
    return any(map(is_gone, sources)) or (not sources and (window / CONTENT).exists())


def delete_content(window: Path, erased: Iterable[str]) -> None:
    """What the window holds of anybody; that there was one, and of whom else, is kept. Raises OSError; again is the
    same, and leaves nothing that one which died was writing."""
    files = open_storage(str(window))
    files.remove_unfinished()
    files.delete(CONTENT)
    crash_point("content.removed")
    gone = frozenset(erased)
    kept = [one for one in read_sources(window) if one.group_id not in gone]
    files.put(FILE, json.dumps(kept).encode())
    crash_point("sources.written")

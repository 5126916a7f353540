"""Contents of uploads that no record names: their gateway was killed before one was written, or after it was deleted.

Owns: finding and removing them. Does not own: uploads and their records (files.py).

A Redis that was lost names nothing either. Then everything stays: only that of the registry whose journal lies beside
the artefacts is believed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Final, cast

from pydantic import ValidationError
from redis.asyncio import Redis

from bon_algos.contracts import REGISTRY, FileRecord, files_key
from bon_algos.crash_points import crash_point
from service.errors import StoreFull, StoreUnavailable
from service.journal import UnreadableJournal, read_journal
from service.store import translated

LOST_SECONDS: Final = 86_400.0
"""Since it was last written to: no upload takes as long to arrive, to be checked and to be recorded."""
SWEEP_SECONDS: Final = 3600.0
log = logging.getLogger("bonsai.files")


class LostUploads:
    """Of one Redis and one directory of artefacts."""

    def __init__(self, redis: Redis, artefacts: Path) -> None:
        self._redis = redis
        self._artefacts = artefacts

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await self.sweep()
            except (StoreUnavailable, StoreFull, OSError, UnreadableJournal, ValidationError) as error:
                log.warning("contents of lost uploads stay for now: %s", error)
            await asyncio.sleep(SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Remove what is old and has no record. Raises StoreUnavailable, StoreFull, OSError, UnreadableJournal, and
        ValidationError for a record of another version, which may name any content."""
        old = await asyncio.to_thread(_old, self._artefacts / "files")
        if old and await self._is_known():
            named = {path for tenant in {one.parent.name for one in old} for path in await self._named(tenant)}
            await asyncio.to_thread(_remove, [one for one in old if one not in named])

    async def _is_known(self) -> bool:
        journal = await asyncio.to_thread(read_journal, self._artefacts)
        with translated():
            present = cast("str | None", await self._redis.get(REGISTRY))
        return journal is not None and journal.registry == present

    async def _named(self, tenant: str) -> list[Path]:
        with translated():
            rows = cast("list[str]", await self._redis.hvals(files_key(tenant)))
        return [self._artefacts / FileRecord.model_validate_json(row).path for row in rows]


def _old(root: Path) -> list[Path]:
    found = []
    for path in root.glob("*/*"):
        with suppress(FileNotFoundError):  # another gateway sweeps too
            if time() - path.lstat().st_mtime >= LOST_SECONDS:
                found.append(path)
    return found


def _remove(lost: Sequence[Path]) -> None:
    for path in lost:
        log.warning("the content %s is no file's: removed", path.name[:16])
        path.unlink(missing_ok=True)
        crash_point("content.lost")

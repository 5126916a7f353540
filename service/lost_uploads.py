"""Contents of uploads that no record names: their gateway was killed before one was written, or after it was deleted.

Owns: finding and removing them. Does not own: uploads and their records (files.py).

A Redis that was lost names nothing either, nor does one that was rebuilt: of what was written before it began to keep
records everything stays.
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

from bon_algos.contracts import FILES_SINCE, FileRecord, files_key
from bon_algos.crash_points import crash_point
from service.errors import StoreFull, StoreUnavailable
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
            except (StoreUnavailable, StoreFull, OSError, ValidationError) as error:
                log.warning("contents of lost uploads stay for now: %s", error)
            await asyncio.sleep(SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Remove what is old and has no record. Raises StoreUnavailable, StoreFull, OSError, and ValidationError for a
        record of another version, which may name any content."""
        old = await asyncio.to_thread(_old, self._artefacts / "files")
        since, named = await self._known({path.parent.name for path, _ in old})
        await asyncio.to_thread(_remove, [path for path, at in old if at >= since and path not in named])

    async def _known(self, tenants: set[str]) -> tuple[float, frozenset[Path]]:
        """Since when this Redis has the records of uploads, and what these name. One look at both: a Redis that is lost
        in between names nothing, and has known it for no time."""
        with translated():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.set(FILES_SINCE, repr(time()), nx=True)
                pipe.get(FILES_SINCE)
                for tenant in sorted(tenants):
                    pipe.hvals(files_key(tenant))
                _, since, *rows = cast("tuple[bool, str, *tuple[list[str], ...]]", await pipe.execute())
        records = [FileRecord.model_validate_json(row) for of_tenant in rows for row in of_tenant]
        return float(since), frozenset(self._artefacts / record.path for record in records)


def _old(root: Path) -> list[tuple[Path, float]]:
    """And when it was last written to."""
    found = []
    for path in root.glob("*/*"):
        with suppress(FileNotFoundError):  # another gateway sweeps too
            written_at = path.lstat().st_mtime
            if time() - written_at >= LOST_SECONDS:
                found.append((path, written_at))
    return found


def _remove(lost: Sequence[Path]) -> None:
    for path in lost:
        log.warning("the content %s is no file's: removed", path.name[:16])
        path.unlink(missing_ok=True)
        crash_point("content.lost")

"""What a gateway's disk holds no more: until when all that it logged, and has yet to log, is in the stream, and gone
from the spool.

Owns: making the spool let go of what is delivered, and telling so. Does not own: delivery (ledger.py), who waits for
it: an erasure is proven when every spool has passed the moment it was asked for.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from socket import gethostname
from time import time
from typing import Final

from redis.asyncio import Redis

from bon_algos.contracts import SPOOLS
from service.errors import StoreFull, StoreUnavailable
from service.ledger import Ledger
from service.store import translated

SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.1
log = logging.getLogger("bonsai.ledger")


def spool_name(directory: Path) -> str:
    """The same for every process that has this directory."""
    return f"{gethostname()}:{sha256(str(directory.absolute()).encode()).hexdigest()[:12]}"


class SpoolReport:
    """Of one gateway's spool."""

    def __init__(self, redis: Redis, ledger: Ledger, name: str) -> None:
        self._redis = redis
        self._ledger = ledger
        self._name = name

    async def run(self) -> None:
        """Tell until cancelled. While Redis is away nothing is delivered and nothing told; nor while the disk takes no
        segment."""
        while True:
            with suppress(StoreUnavailable, StoreFull, OSError):
                await self.tell()
            await asyncio.sleep(SECONDS)

    async def tell(self) -> None:
        """Wait until nothing of before is left, and say so: of before the earliest of the requests that are under way,
        whose records are older than when they arrive here. Raises StoreUnavailable, OSError."""
        began = time()
        under_way = self._ledger.awaited_since
        segment = self._ledger.begin_segment()
        while not self._ledger.holds_none_before(segment):
            await asyncio.sleep(LOOK_SECONDS)
        with translated():
            await self._redis.hset(SPOOLS, self._name, str(began if under_way is None else min(began, under_way)))

    async def close(self) -> None:
        """A spool that holds nothing need not be waited for."""
        if self._ledger.status.pending_bytes:
            return
        try:
            with translated():
                await self._redis.hdel(SPOOLS, self._name)
        except (StoreUnavailable, StoreFull) as error:
            log.warning("the spool is left among those that are waited for: %s", error.message)

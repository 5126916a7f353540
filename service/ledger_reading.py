"""Pages of the ledger as they lie: entries of the stream, records of the archive, newest first.

Owns: reading them without holding up requests, and what a store that does not answer means to a caller. Does not own:
how far one looks, which records are wanted, joining one to another (curve.py, dry_run.py, ledger_pages.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, cast

from redis.asyncio import Redis

from archive.reading import Archive, Question
from archive.tables import Stored
from bon_algos.contracts import LEDGER_STREAM
from bon_algos.ledger_entries import EntryId
from service.errors import StoreUnavailable
from service.store import translated

PAGE_ENTRIES: Final = 200
Entry = tuple[bytes, dict[bytes, bytes]]


async def stream_page(redis: Redis, newest: str, oldest: str = "-") -> list[Entry]:
    """The next entries of the stream; none at its end. redis: one that answers in bytes. Raises StoreUnavailable."""
    with translated():
        found: Any = await redis.xrevrange(LEDGER_STREAM, newest, oldest, count=PAGE_ENTRIES)
    return cast("list[Entry]", found)


async def archive_pages(archive: Archive, question: Question) -> AsyncIterator[list[Stored]]:
    """What the archive has of it. Raises StoreUnavailable."""
    found = archive.records(question)
    with _archive_translated():
        while page := await asyncio.to_thread(lambda: list(islice(found, PAGE_ENTRIES))):
            yield page


async def archived_to(archive: Archive) -> EntryId:
    """The last entry of the stream that the archive has; 0-0 for none. Raises StoreUnavailable."""
    with _archive_translated():
        return await asyncio.to_thread(archive.manifest.position)


@contextmanager
def _archive_translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable("the ledger's archive did not answer", code="archive_unavailable") from error

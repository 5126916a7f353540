"""The audit: who did what, when, to what; a chain that shows where it was changed.

Owns: adding to the stream, reading and checking it. Does not own: the form of an entry (bon_algos.audit_entries), when
there is one, which each change says in its own transaction.

Every entry holds the digest of the one before and its own, sha256 over all its other fields. To change, remove or
reorder one is to change all that follow; that the newest ones are missing shows to whoever has kept a later digest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.audit_entries import GENESIS, MOST_TRIES, chained, entry_digest, newest_digest, script_values
from bon_algos.contracts import AUDIT_STREAM
from service.access import Caller
from service.errors import InvalidField, StoreUnavailable
from service.store import translated

SCANNED_AT_ONCE: Final = 500
OVERTAKEN: Final = "overtaken"
"""What a script answers that did nothing, for its entry does not follow the newest one."""
Entry = tuple[str, Mapping[str, str]]
"""Its place in the stream, and its fields."""
_PLACE: Final = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


class AuditBroken(Exception):
    """The audit is not what was written; the text says where and how."""


class AuditHead(NamedTuple):
    """Where a chain ends that was found whole."""

    entries: int
    digest: str
    """Of the newest entry; to be kept elsewhere."""


class AuditChain:
    """The end of the audit as one transaction sees it."""

    def __init__(self, digest: str) -> None:
        self._digest = digest

    @classmethod
    async def open(cls, pipe: Pipeline) -> Self:
        """Watches the audit; before `multi()`."""
        await pipe.watch(AUDIT_STREAM)
        return cls(newest_digest(cast("list[Entry]", await pipe.xrevrange(AUDIT_STREAM, count=1))))

    def append(self, pipe: Pipeline, event: str, by: Caller, **fields: str) -> None:
        """Queue an entry with the writes that it is about. by: GATEWAY for what nobody asked for. fields: never a key,
        never what was said in a request for text."""
        entry = chained(event, tenant=by.tenant, by=by.key_id, previous=self._digest, **fields)
        self._digest = entry["digest"]
        pipe.xadd(AUDIT_STREAM, cast("dict[Any, Any]", entry))


async def audited(
    redis: Redis, run: Callable[[tuple[str, str]], Awaitable[str]], event: str, by: Caller, **fields: str
) -> str:
    """What a script answers that writes this entry together with what the entry is about, as `AUDIT_LUA` says. run: it,
    given the entry; again where it was OVERTAKEN. Raises StoreUnavailable when it always was."""
    for _ in range(MOST_TRIES):
        previous = newest_digest(cast("list[Entry]", await redis.xrevrange(AUDIT_STREAM, count=1)))
        entry = chained(event, tenant=by.tenant, by=by.key_id, previous=previous, **fields)
        if (answer := await run(script_values(entry))) != OVERTAKEN:
            return answer
    raise StoreUnavailable("others wrote to the audit all the time; nothing was changed")


def verified(entries: Iterable[Entry]) -> AuditHead:
    """All entries, the oldest first. Raises AuditBroken at the first one that is not what was written."""
    count, former = 0, GENESIS
    for place, fields in entries:
        if fields.get("previous") != former:
            raise AuditBroken(f"entry {place} does not follow the one before it: some were removed, added or moved")
        if fields.get("digest") != entry_digest(fields):
            raise AuditBroken(f"entry {place} was changed after it was written")
        count, former = count + 1, fields["digest"]
    return AuditHead(count, former)


class Audit:
    """The audit of one Redis, to read."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def page(self, tenant: str, limit: int, after: str | None) -> tuple[Sequence[dict[str, Any]], bool]:
        """A tenant's entries, the oldest first, those behind `after`; and whether there are more. Raises
        InvalidField."""
        if after is not None and not _PLACE.fullmatch(after):
            raise InvalidField("after is not the id of an entry", param="after")
        found: list[dict[str, Any]] = []
        start = "-" if after is None else f"({after}"
        while len(found) <= limit:
            with translated():
                rows = cast("list[Entry]", await self._redis.xrange(AUDIT_STREAM, start, "+", count=SCANNED_AT_ONCE))
            found += [entry_object(place, fields) for place, fields in rows if fields.get("tenant") == tenant]
            if len(rows) < SCANNED_AT_ONCE:
                break
            start = f"({rows[-1][0]}"
        return found[:limit], len(found) > limit


def entry_object(place: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The entry of the API; `about` is what it concerns."""
    own = {"event", "tenant", "by", "at", "data", "previous", "digest"}
    return {
        "id": place,
        "object": "bonsai.audit.entry",
        "event": fields.get("event", ""),
        "by": fields.get("by", ""),
        "at": float(fields.get("at", "0")),
        "about": {name: value for name, value in fields.items() if name not in own},
        "data": _json(fields.get("data")),
        "previous": fields.get("previous", ""),
        "digest": fields.get("digest", ""),
    }


def _json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text

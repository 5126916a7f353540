"""The audit read from Redis and checked.

Owns the reading. Does not own the chain (service/audit.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, cast

import redis

from bon_algos.contracts import AUDIT_STREAM
from service.audit import AuditBroken, AuditHead, Entry, verified

AT_ONCE: Final = 1000


def verified_audit(client: redis.Redis, contains: str | None = None) -> AuditHead:
    """contains: a digest that was noted earlier. Raises AuditBroken."""
    digests: set[str] = set()

    def noting() -> Iterator[Entry]:
        for entry in _entries(client):
            digests.add(entry[1].get("digest", ""))
            yield entry

    head = verified(noting())
    if contains is not None and contains not in digests:
        raise AuditBroken(f"no entry has the digest {contains}: the newest ones were removed")
    return head


def _entries(client: redis.Redis) -> Iterator[Entry]:
    start = "-"
    while rows := cast("list[Entry]", client.xrange(AUDIT_STREAM, start, "+", count=AT_ONCE)):
        yield from rows
        start = f"({rows[-1][0]}"

"""The ledger, read backwards: candidate groups with the rewards that were measured later joined in, and their feedback.

Owns paging. Does not own the join (`bon_algos.ledger_entries`) nor which groups are fit to learn from
(`bon_algos.acceptance`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

import redis

from bon_algos.contracts import DEFAULT_TENANT, LEDGER_STREAM, CandidateGroup, Feedback, RouteName, feedback_key
from bon_algos.ledger_entries import NewestFirst

PAGE_ENTRIES = 200
DELIVERY_SLACK_SECONDS = 86_400.0
"""A spool that waited for Redis delivers late: an entry's own id may be this much younger than its group."""

Entry = tuple[bytes, dict[bytes, bytes]]


def groups_newest_first(
    client: redis.Redis,
    routes: Collection[RouteName],
    *,
    tenant: str = DEFAULT_TENANT,
    since: float | None = None,
    page_entries: int = PAGE_ENTRIES,
) -> Iterator[CandidateGroup]:
    """The groups of a tenant's routes, newest delivery first, each once."""
    newest_first = NewestFirst(tenant, routes)
    for page in _pages(client, since, page_entries):
        yield from newest_first.groups(fields for _, fields in page)


def feedback_on(client: redis.Redis, group_id: str) -> list[Feedback]:
    """What counts of the feedback on a group."""
    rows = cast("list[bytes]", client.hvals(feedback_key(group_id)))
    return [Feedback.model_validate_json(row) for row in rows]


def _pages(client: redis.Redis, since: float | None, page_entries: int) -> Iterator[list[Entry]]:
    oldest = "-" if since is None else str(max(0, round((since - DELIVERY_SLACK_SECONDS) * 1000)))
    newest = "+"
    while page := cast(list[Entry], client.xrevrange(LEDGER_STREAM, newest, oldest, count=page_entries)):
        yield page
        newest = f"({page[-1][0].decode()}"

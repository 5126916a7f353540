"""The ledger, read backwards: candidate groups with the rewards that were measured later joined in, and their feedback.

Owns paging. Does not own the join (`bon_algos.ledger_entries`) nor which groups are fit to learn from
(`bon_algos.acceptance`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

import redis

from archive.reading import DELIVERY_SLACK_SECONDS, Archive, Question
from bon_algos.contracts import (
    DEFAULT_TENANT,
    LEDGER_STREAM,
    CandidateGroup,
    Feedback,
    RouteName,
    feedback_key,
)
from bon_algos.ledger_entries import EntryId, NewestFirst

PAGE_ENTRIES = 200

Entry = tuple[bytes, dict[bytes, bytes]]


def groups_newest_first(
    client: redis.Redis,
    routes: Collection[RouteName],
    *,
    tenant: str = DEFAULT_TENANT,
    since: float | None = None,
    archive: Archive | None = None,
    page_entries: int = PAGE_ENTRIES,
) -> Iterator[CandidateGroup]:
    """The groups of a tenant's routes, newest delivery first, each once: those of the stream, then those of the archive
    that the stream has no more."""
    newest_first = NewestFirst(tenant, routes)
    before: EntryId | None = None
    for page in _pages(client, since, page_entries):
        yield from newest_first.groups(fields for _, fields in page)
        before = EntryId.parse(page[-1][0])
    if archive is not None:
        # Asked after the stream: what was trimmed off it in the meantime is here by now.
        [alone] = routes if len(routes) == 1 else [None]
        question = Question(("groups", "outcomes"), tenant, alone, since=since, before=before)
        yield from newest_first.among(one.record for one in archive.records(question))


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

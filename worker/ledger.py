"""The ledger, read backwards: candidate groups with the rewards that were measured later joined in.

Owns paging, decoding and the join. Does not own which groups are fit to learn from (`dataset`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple, cast

import redis

from archive.reading import DELIVERY_SLACK_SECONDS, Archive, Question
from bon_algos.contracts import DEFAULT_TENANT, LEDGER_STREAM, CandidateGroup, Outcome, RouteName
from bon_algos.ledger_entries import EntryId, UnreadableRecord, record_of, with_outcome

PAGE_ENTRIES = 200

log = logging.getLogger("bonsai.ledger")
Entry = tuple[bytes, dict[bytes, bytes]]
Joined = CandidateGroup | Outcome


class Window(NamedTuple):
    """Which groups are wanted."""

    route: RouteName
    tenant: str = DEFAULT_TENANT
    since: float | None = None


def groups_newest_first(
    client: redis.Redis,
    route: RouteName,
    *,
    tenant: str = DEFAULT_TENANT,
    since: float | None = None,
    archive: Archive | None = None,
    page_entries: int = PAGE_ENTRIES,
) -> Iterator[CandidateGroup]:
    """The groups of a tenant's route, newest delivery first, each once: those of the stream, then those of the archive
    that the stream has no more.

    An outcome is delivered after its group, so on the way back it is met first: one pass joins them.
    """
    outcomes: dict[str, Outcome] = {}
    seen: set[str] = set()
    for record in _records(client, archive, Window(route, tenant, since), page_entries):
        if isinstance(record, Outcome):
            outcomes[record.group_id] = record
        elif (record.tenant, record.route) == (tenant, route) and record.id not in seen:
            seen.add(record.id)
            yield with_outcome(record, outcomes.pop(record.id, None))


def _records(client: redis.Redis, archive: Archive | None, window: Window, page_entries: int) -> Iterator[Joined]:
    oldest = "-" if window.since is None else str(max(0, round((window.since - DELIVERY_SLACK_SECONDS) * 1000)))
    newest: str = "+"
    before: EntryId | None = None
    while page := cast(list[Entry], client.xrevrange(LEDGER_STREAM, newest, oldest, count=page_entries)):
        for _, fields in page:
            if fields[b"kind"] not in (b"group", b"outcome"):
                continue
            try:
                yield cast(Joined, record_of(fields))
            except UnreadableRecord as error:
                # Of another version: it must not take the others from a job.
                log.warning("%s", error)
        before = EntryId.parse(page[-1][0])
        newest = f"({before}"
    if archive is not None:
        # Asked after the stream: what was trimmed off it in the meantime is here by now.
        question = Question(("groups", "outcomes"), window.tenant, window.route, since=window.since, before=before)
        yield from (cast(Joined, one.record) for one in archive.records(question))

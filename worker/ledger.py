"""The ledger, read backwards: candidate groups with the rewards that were measured later joined in.

Owns paging, decoding and the join. Does not own which groups are fit to learn from (`dataset`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import cast

import redis

from bon_algos.contracts import DEFAULT_TENANT, LEDGER_STREAM, CandidateGroup, Outcome, RouteName
from bon_algos.ledger_entries import UnreadableRecord, record_of

PAGE_ENTRIES = 200
DELIVERY_SLACK_SECONDS = 86_400.0
"""A spool that waited for Redis delivers late: an entry's own id may be this much younger than its group."""

log = logging.getLogger("bonsai.ledger")
Entry = tuple[bytes, dict[bytes, bytes]]


def groups_newest_first(
    client: redis.Redis,
    route: RouteName,
    *,
    tenant: str = DEFAULT_TENANT,
    since: float | None = None,
    page_entries: int = PAGE_ENTRIES,
) -> Iterator[CandidateGroup]:
    """The groups of a tenant's route, newest delivery first, each once.

    An outcome is delivered after its group, so on the way back it is met first: one pass joins them.
    """
    outcomes: dict[str, Outcome] = {}
    seen: set[str] = set()
    for record in _records(client, since, page_entries):
        if isinstance(record, Outcome):
            outcomes[record.group_id] = record
        elif (record.tenant, record.route) == (tenant, route) and record.id not in seen:
            seen.add(record.id)
            yield with_outcome(record, outcomes.pop(record.id, None))


def with_outcome(group: CandidateGroup, outcome: Outcome | None) -> CandidateGroup:
    """The group with an outcome's rewards where it had none. An outcome of another reward model, or of another
    number of candidates, is not this group's."""
    if outcome is None or outcome.reward_model_id != group.reward_model_id:
        return group
    if len(outcome.rewards) != len(group.candidates):
        return group
    candidates = tuple(
        candidate if reward is None or candidate.reward is not None else candidate.model_copy(update={"reward": reward})
        for candidate, reward in zip(group.candidates, outcome.rewards, strict=True)
    )
    return group.model_copy(update={"candidates": candidates})


def _records(client: redis.Redis, since: float | None, page_entries: int) -> Iterator[CandidateGroup | Outcome]:
    oldest = "-" if since is None else str(max(0, round((since - DELIVERY_SLACK_SECONDS) * 1000)))
    newest: str = "+"
    while page := cast(list[Entry], client.xrevrange(LEDGER_STREAM, newest, oldest, count=page_entries)):
        for _, fields in page:
            if fields[b"kind"] not in (b"group", b"outcome"):
                continue
            try:
                yield cast(CandidateGroup | Outcome, record_of(fields))
            except UnreadableRecord as error:
                # Of another version: it must not take the others from a job.
                log.warning("%s", error)
        newest = f"({page[-1][0].decode()}"

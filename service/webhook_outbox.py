"""From what happened to what is delivered: every move of a job and every change of a policy, once to each webhook.

Owns: how far both sources have been read, and who is told of what. Does not own: the sources, which are written in the
same script or transaction as what they tell (JOB_LUA, audit.py); the queues (webhook_queue.py).

Reading a source, putting what was read into the queues and noting how far it was read is one transaction: a gateway may
die anywhere, several may do it at one time, and each event is in each queue once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import (
    AUDIT_STREAM,
    JOBS_MOVED,
    WEBHOOKS,
    WEBHOOKS_READ,
    policy_key,
)
from service.store import transact, translated
from service.webhook_events import Event, job_event, policy_changes, policy_event
from service.webhook_queue import put
from service.webhook_record import WebhookRecord
from service.webhooks import MAX_WAITING, Webhooks, read_webhooks, waiting

READ_AT_ONCE: Final = 200
Row = tuple[str, dict[str, str]]


class Happened(NamedTuple):
    tenant: str
    event: Event


class Outbox:
    """The events of one Redis."""

    def __init__(self, redis: Redis, webhooks: Webhooks, clock: Callable[[], float]) -> None:
        self._redis = redis
        self._webhooks = webhooks
        self._clock = clock

    async def empty(self) -> None:
        """Queue all that has happened. Raises StoreUnavailable, StoreFull."""
        while await self._holds_any():
            for webhook_id in await transact(self._redis, (WEBHOOKS, WEBHOOKS_READ), self._spread):
                await self._webhooks.disable(webhook_id, "overfull")

    async def _holds_any(self) -> bool:
        """Without a transaction, of which there would be one a second and gateway for nothing."""
        with translated():
            newest = cast("list[Row]", await self._redis.xrevrange(AUDIT_STREAM, count=1))
            read = cast("str | None", await self._redis.get(WEBHOOKS_READ))
            moved = await self._redis.xlen(JOBS_MOVED)
        return moved > 0 or (bool(newest) and newest[0][0] != read)

    async def _spread(self, pipe: Pipeline) -> Sequence[str]:
        """Returns the webhooks that have no room. Nothing is done then: they are disabled first, for once this was done
        and nobody left to do that, nothing would remind anybody of what they were not told."""
        read = cast("str | None", await pipe.get(WEBHOOKS_READ)) or "0-0"
        moves = cast("list[Row]", await pipe.xrange(JOBS_MOVED, count=READ_AT_ONCE))
        entries = cast("list[Row]", await pipe.xrange(AUDIT_STREAM, f"({read}", "+", count=READ_AT_ONCE))
        happened = [*_of_jobs(moves), *await _of_policies(pipe, entries)]
        # No webhook, no event of anybody's: most installations, most of the time.
        enabled = [one for one in await read_webhooks(pipe) if one.is_enabled] if happened else []
        full = {one.id for one in enabled if await waiting(pipe, one.id) >= MAX_WAITING}
        told = [(one.id, event) for one, event in _pairs(enabled, happened)]
        if overfull := full & {webhook_id for webhook_id, _ in told}:
            return sorted(overfull)
        pipe.multi()  # type: ignore[no-untyped-call]
        for webhook_id, event in told:
            put(pipe, webhook_id, event, self._clock())
        if moves:
            pipe.xdel(JOBS_MOVED, *(place for place, _ in moves))
        # Also where only moves were read: it is watched, so that of several gateways one does this.
        pipe.set(WEBHOOKS_READ, entries[-1][0] if entries else read)
        return ()


def _pairs(enabled: Sequence[WebhookRecord], happened: Sequence[Happened]) -> Iterator[tuple[WebhookRecord, Event]]:
    for tenant, event in happened:
        for record in enabled:
            if record.tenant == tenant and event.type in record.event_types:
                yield record, event


def _of_jobs(moves: Sequence[Row]) -> Iterator[Happened]:
    for place, fields in moves:
        if (event := job_event(place, fields)) is not None:
            yield Happened(fields["tenant"], event)


async def _of_policies(pipe: Pipeline, entries: Sequence[Row]) -> list[Happened]:
    return [
        Happened(await _tenant(pipe, change.policy, entry), policy_event(place, change))
        for place, entry in entries
        for change in policy_changes(entry)
    ]


async def _tenant(pipe: Pipeline, policy_id: str, entry: Mapping[str, str]) -> str:
    """Whose the policy is, which need not be who changed it: the gateway does too."""
    row = cast("str | None", await pipe.hget(policy_key(policy_id), "record"))
    return entry["tenant"] if row is None else str(json.loads(row)["tenant"])

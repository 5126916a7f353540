"""What waits to be delivered to each webhook: put there once, taken by one gateway at a time, never forgotten.

Owns: the queue's keys and scripts, the record of attempts. Does not own: what is put there (webhook_outbox.py), when
the next attempt is due and whether there is one (webhook_delivery.py).

A delivery is lent, not taken out: who claims one may hold it for CLAIM_SECONDS, and if it is not settled by then, its
gateway being dead, the next one to look claims it. So one may arrive twice, under the same id, and none is lost. Times
are the gateways' own: where their clocks differ, one may arrive twice as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, cast

from pydantic import ConfigDict, Field
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import (
    WEBHOOKS_ACCEPTED,
    WEBHOOKS_DUE,
    Record,
    webhook_attempts_key,
    webhook_events_key,
    webhook_queue_key,
)
from service.store import translated
from service.webhook_events import Event

CLAIM_SECONDS: Final = 60.0
"""Well above what an attempt may take."""
ATTEMPTS_KEPT: Final = 1000
"""Of one webhook, about."""
Outcome = Literal["delivered", "retrying", "failed"]

# Both scripts end with it. KEYS[1] queue, KEYS[3] due; ARGV[1] webhook.
_NEXT_DUE: Final = """
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if first[1] then redis.call('ZADD', KEYS[3], first[2], ARGV[1]) else redis.call('ZREM', KEYS[3], ARGV[1]) end
"""

# KEYS: queue, events, due. ARGV: webhook, now, until when a claim holds (ms). Returns the delivery, or false.
_CLAIM: Final = (
    """
local id = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[2], 'LIMIT', 0, 1)[1]
if id then redis.call('ZADD', KEYS[1], ARGV[3], id) end
"""
    + _NEXT_DUE
    + "return id and redis.call('HGET', KEYS[2], id)\n"
)

# KEYS: queue, events, due, attempts, accepted. ARGV: webhook, event, until when the claim held, outcome, when it is
# due next, the delivery, now (ms), most attempts kept, then fields of the attempt. Returns 0 where the delivery is no
# longer ours to judge: it was deleted, or delivered by another gateway, or claimed by one because we took too long.
# That it was delivered is true whoever has it.
_SETTLE: Final = (
    """
local held = redis.call('ZSCORE', KEYS[1], ARGV[2])
if not held or (ARGV[4] ~= 'delivered' and tonumber(held) ~= tonumber(ARGV[3])) then return 0 end
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[8], '*', 'event', ARGV[2], 'outcome', ARGV[4], unpack(ARGV, 9))
if ARGV[4] == 'retrying' then
  redis.call('ZADD', KEYS[1], ARGV[5], ARGV[2])
  redis.call('HSET', KEYS[2], ARGV[2], ARGV[6])
else
  redis.call('ZREM', KEYS[1], ARGV[2])
  redis.call('HDEL', KEYS[2], ARGV[2])
end
if ARGV[4] == 'delivered' then redis.call('HSET', KEYS[5], ARGV[1], ARGV[7]) end
"""
    + _NEXT_DUE
    + "return 1\n"
)


class Delivery(Record):
    """An event on its way to one webhook."""

    # What a later version adds is passed over: gateways of two versions deliver beside each other.
    model_config = ConfigDict(extra="ignore")

    id: str
    """The event's."""
    type: str
    body: str
    attempts: int = Field(0, ge=0)
    """That failed so far."""
    first_at: float | None = None
    """When the first of them was made, Unix seconds."""


class Claimed(NamedTuple):
    delivery: Delivery
    until: int
    """How long it is ours, ms: what tells our claim from another's."""


class DeliveryQueue:
    """The queues of all webhooks of one Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._claim = redis.register_script(_CLAIM)
        self._settle = redis.register_script(_SETTLE)

    async def due(self, now: float) -> Sequence[str]:
        """Webhooks that have something to be delivered at this time."""
        with translated():
            return cast("list[str]", await self._redis.zrangebyscore(WEBHOOKS_DUE, "-inf", _ms(now)))

    async def claim(self, webhook_id: str, now: float) -> Claimed | None:
        """The delivery that is due the longest."""
        until = _ms(now + CLAIM_SECONDS)
        with translated():
            row = await self._claim(keys=_keys(webhook_id), args=[webhook_id, _ms(now), until])
        return None if row is None else Claimed(Delivery.model_validate_json(cast(str, row)), until)

    async def settle(
        self,
        webhook_id: str,
        claimed: Claimed,
        outcome: Outcome,
        *,
        now: float,
        next_at: float | None,
        attempt: Mapping[str, str],
    ) -> None:
        """Say what became of a claimed delivery's attempt. next_at: when it is due again, of one that is. attempt: what
        the list of attempts tells."""
        due = 0 if next_at is None else _ms(next_at)
        row = claimed.delivery.model_dump_json()
        of_claim = (webhook_id, claimed.delivery.id, claimed.until, outcome, due, row, _ms(now), ATTEMPTS_KEPT)
        of_attempt = [text for pair in attempt.items() for text in pair]
        with translated():
            await self._settle(
                keys=[*_keys(webhook_id), webhook_attempts_key(webhook_id), WEBHOOKS_ACCEPTED],
                args=[*of_claim, *of_attempt],
            )

    async def accepted_at(self, webhook_id: str) -> float | None:
        """When it last accepted a delivery."""
        with translated():
            said = cast("str | None", await self._redis.hget(WEBHOOKS_ACCEPTED, webhook_id))
        return None if said is None else int(said) / 1000

    async def attempts(
        self, webhook_id: str, limit: int, after: str | None
    ) -> tuple[Sequence[tuple[str, dict[str, str]]], bool]:
        """Newest first, those that were made before the attempt `after`; and whether there are more."""
        newest = "+" if after is None else f"({after}"
        with translated():
            rows = await self._redis.xrevrange(webhook_attempts_key(webhook_id), newest, "-", count=limit + 1)
        found = cast("list[tuple[str, dict[str, str]]]", rows)
        return found[:limit], len(found) > limit


def put(pipe: Pipeline, webhook_id: str, event: Event, now: float) -> None:
    """Queue an event's delivery, due at once, with the writes that it belongs to."""
    delivery = Delivery(id=event.id, type=event.type, body=event.body)
    pipe.zadd(webhook_queue_key(webhook_id), {event.id: _ms(now)})
    pipe.hset(webhook_events_key(webhook_id), event.id, delivery.model_dump_json())
    pipe.zadd(WEBHOOKS_DUE, {webhook_id: _ms(now)}, lt=True)


def forget(pipe: Pipeline, webhook_id: str) -> None:
    """Queue the end of all that a webhook leaves."""
    pipe.delete(*_keys(webhook_id)[:2], webhook_attempts_key(webhook_id))
    pipe.zrem(WEBHOOKS_DUE, webhook_id)
    pipe.hdel(WEBHOOKS_ACCEPTED, webhook_id)


def _keys(webhook_id: str) -> list[str]:
    return [webhook_queue_key(webhook_id), webhook_events_key(webhook_id), WEBHOOKS_DUE]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def attempt_object(place: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The attempt of the API."""
    return {
        "id": place,
        "object": "bonsai.webhook.attempt",
        "event": fields["event"],
        "type": fields["type"],
        "attempt": int(fields["attempt"]),
        "at": float(fields["at"]),
        "seconds": float(fields["seconds"]),
        "outcome": fields["outcome"],
        "status_code": int(fields["status"]) if fields["status"] else None,
        "error": fields["error"] or None,
        "next_attempt_at": float(fields["next"]) if fields["next"] else None,
    }

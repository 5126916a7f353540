"""Webhooks: made, listed, changed, given another secret, deleted; and disabled where nobody takes what comes.

Owns: the webhooks of one Redis and the rules for them. Does not own: the record of one (webhook_record.py), where it
may lead (webhook_reach.py), its deliveries (webhook_queue.py, webhook_outbox.py, webhook_delivery.py), samples of them
(webhook_samples.py).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from time import time
from typing import Any, Final, cast
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from uuid_utils import uuid7

from bon_algos.contracts import WEBHOOKS, webhook_queue_key
from service.access import GATEWAY, Caller
from service.audit import AuditChain
from service.errors import Conflict, InvalidField, WebhookNotFound
from service.store import transact, translated
from service.webhook_queue import DeliveryQueue, attempt_object, forget
from service.webhook_reach import Reach
from service.webhook_record import Reason, WebhookChange, WebhookRecord, WebhookRequest, once, webhook_object
from service.webhook_signature import hint

MAX_WEBHOOKS: Final = 20
"""Of a tenant."""
MAX_WAITING: Final = 10_000
"""Deliveries of one webhook. One that is so far behind is disabled, and what comes after is not kept for it."""
_ATTEMPT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")
log = logging.getLogger("bonsai.webhooks")

Change = Callable[[WebhookRecord], WebhookRecord]


class Webhooks:
    """The webhooks of one Redis."""

    def __init__(self, redis: Redis, pepper: bytes, reach: Reach, *, clock: Callable[[], float] = time) -> None:
        """clock: Unix seconds."""
        self._redis = redis
        self._pepper = pepper
        self._clock = clock
        self.reach = reach
        self.queue = DeliveryQueue(redis)

    async def create(self, asked: WebhookRequest, by: Caller) -> tuple[dict[str, Any], str]:
        """The webhook and its secret, which nobody is told again. Raises InvalidField, Conflict."""
        await self.reach.require(asked.url)
        now = int(self._clock())
        record = WebhookRecord(
            id=f"wh_{uuid7().hex}",
            tenant=by.tenant,
            name=asked.name,
            url=asked.url,
            event_types=once(asked.event_types),
            created_at=now,
            updated_at=now,
            created_by=by.key_id,
        )

        async def change(pipe: Pipeline) -> None:
            if sum(one.tenant == by.tenant for one in await read_webhooks(pipe)) >= MAX_WEBHOOKS:
                raise Conflict(f"there are {MAX_WEBHOOKS} webhooks already: delete one", code="too_many_webhooks")
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hset(WEBHOOKS, record.id, record.model_dump_json())
            audit.append(pipe, "webhook_create", by, webhook=record.id, data=_told(record))

        await transact(self._redis, (WEBHOOKS,), change)
        return await self._object(record), record.secret(self._pepper)

    async def all(self, tenant: str) -> Sequence[dict[str, Any]]:
        """Newest first."""
        with translated():
            records = await read_webhooks(self._redis)
        own = sorted((one for one in records if one.tenant == tenant), key=lambda one: one.id, reverse=True)
        return [await self._object(one) for one in own]

    async def get(self, webhook_id: str, tenant: str) -> dict[str, Any]:
        """Raises WebhookNotFound."""
        return await self._object(await self.owned(webhook_id, tenant))

    async def change(self, webhook_id: str, asked: WebhookChange, by: Caller) -> dict[str, Any]:
        """What waited while it was disabled is delivered when it is enabled again. Raises WebhookNotFound,
        InvalidField."""
        if asked.url is not None:
            await self.owned(webhook_id, by.tenant)
            await self.reach.require(asked.url)
        return await self._object(
            await self._written(webhook_id, by, "webhook_change", lambda one: one.amended(asked, self._clock()))
        )

    async def rotate(self, webhook_id: str, by: Caller, *, keeps_former: bool) -> tuple[dict[str, Any], str]:
        """The webhook and its new secret. keeps_former: the one before signs beside it for a day; one before that no
        more. Raises WebhookNotFound."""

        def become(one: WebhookRecord) -> WebhookRecord:
            return one.rotated(self._clock(), keeps_former=keeps_former)

        record = await self._written(webhook_id, by, "webhook_rotate", become)
        return await self._object(record), record.secret(self._pepper)

    async def delete(self, webhook_id: str, by: Caller) -> None:
        """With what waits for it. Raises WebhookNotFound."""

        async def change(pipe: Pipeline) -> None:
            record = await _read(pipe, webhook_id, by.tenant)
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hdel(WEBHOOKS, webhook_id)
            forget(pipe, webhook_id)
            audit.append(pipe, "webhook_delete", by, webhook=webhook_id, data=_told(record))

        await transact(self._redis, (WEBHOOKS,), change)

    async def attempts(
        self, webhook_id: str, tenant: str, limit: int, after: str | None
    ) -> tuple[Sequence[dict[str, Any]], bool]:
        """Newest first; and whether there are more. Raises WebhookNotFound, InvalidField."""
        await self.owned(webhook_id, tenant)
        if after is not None and not _ATTEMPT_ID.fullmatch(after):
            raise InvalidField("after is not the id of an attempt", param="after")
        rows, has_more = await self.queue.attempts(webhook_id, limit, after)
        return [attempt_object(place, fields) for place, fields in rows], has_more

    async def disable(self, webhook_id: str, reason: Reason) -> None:
        """What nobody asked for. Nothing where it is gone, or disabled, already."""
        with translated():
            row = cast("str | None", await self._redis.hget(WEBHOOKS, webhook_id))
        record = None if row is None else WebhookRecord.model_validate_json(row)
        if record is None or not record.is_enabled:
            return
        log.error("webhook %s of tenant %s is disabled: %s", webhook_id, record.tenant, reason)
        by = GATEWAY._replace(tenant=record.tenant)
        try:
            await self._written(webhook_id, by, "webhook_disable", lambda one: one.disabled(reason, self._clock()))
        except WebhookNotFound:
            log.info("webhook %s was deleted meanwhile", webhook_id)

    async def enabled(self, webhook_id: str) -> WebhookRecord | None:
        """The webhook, where it is to be delivered to."""
        with translated():
            row = cast("str | None", await self._redis.hget(WEBHOOKS, webhook_id))
        record = None if row is None else WebhookRecord.model_validate_json(row)
        return record if record is not None and record.is_enabled else None

    def secrets(self, record: WebhookRecord, now: float) -> list[bytes]:
        return record.secrets(self._pepper, now)

    async def owned(self, webhook_id: str, tenant: str) -> WebhookRecord:
        """Raises WebhookNotFound."""
        with translated():
            return await _read(self._redis, webhook_id, tenant)

    async def _written(self, webhook_id: str, by: Caller, event: str, become: Change) -> WebhookRecord:
        async def change(pipe: Pipeline) -> WebhookRecord:
            record = become(await _read(pipe, webhook_id, by.tenant))
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hset(WEBHOOKS, webhook_id, record.model_dump_json())
            audit.append(pipe, event, by, webhook=webhook_id, data=_told(record))
            return record

        return await transact(self._redis, (WEBHOOKS,), change)

    async def _object(self, record: WebhookRecord) -> dict[str, Any]:
        with translated():
            count = await waiting(self._redis, record.id)
        secret, *_ = record.secrets(self._pepper, self._clock())
        return webhook_object(record, hint(secret), count, await self.queue.accepted_at(record.id))


async def read_webhooks(redis: Redis) -> list[WebhookRecord]:
    """Of all tenants."""
    rows = cast("Mapping[str, str]", await redis.hgetall(WEBHOOKS))
    return [WebhookRecord.model_validate_json(row) for row in rows.values()]


async def waiting(redis: Redis, webhook_id: str) -> int:
    """How many deliveries wait for it."""
    return await redis.zcard(webhook_queue_key(webhook_id))


async def _read(redis: Redis, webhook_id: str, tenant: str) -> WebhookRecord:
    row = cast("str | None", await redis.hget(WEBHOOKS, webhook_id))
    record = None if row is None else WebhookRecord.model_validate_json(row)
    if record is None or record.tenant != tenant:
        raise WebhookNotFound("no such webhook")
    return record


def _told(record: WebhookRecord) -> str:
    """For the audit: of the URL only where it leads, for its path may hold a secret of the receiver's."""
    parts = urlsplit(record.url)
    told = record.model_dump(mode="json", exclude={"url"})
    return json.dumps({**told, "to": f"{parts.scheme}://{parts.hostname}"})

"""Samples of events: sent to a webhook at once because somebody wants to see what its receiver answers.

Owns: the one attempt. Does not own: what a sample says (webhook_events.py), the request and what it may take
(webhook_http.py), where it may lead (webhook_reach.py).

A sample is no delivery: it waits in no queue, is not tried again, and whatever comes of it changes nothing of the
webhook. So one that is disabled can be tried before it is enabled.
"""

from __future__ import annotations

from collections.abc import Callable
from time import time
from typing import Any

from service.errors import Conflict, ReceiverUnreached
from service.webhook_events import EventType, sample_event
from service.webhook_http import Answer, Sender
from service.webhook_record import WebhookRecord
from service.webhook_signature import signed_headers
from service.webhooks import Webhooks


class Samples:
    """Of one gateway process."""

    def __init__(self, webhooks: Webhooks, sender: Sender, *, clock: Callable[[], float] = time) -> None:
        """clock: Unix seconds."""
        self._webhooks = webhooks
        self._sender = sender
        self._clock = clock
        self._under_way: set[str] = set()

    async def send(self, webhook_id: str, tenant: str, event_type: EventType) -> dict[str, Any]:
        """What the receiver answered, as the API tells it. Raises WebhookNotFound, Conflict, ReceiverUnreached."""
        record = await self._webhooks.owned(webhook_id, tenant)
        # A receiver that hangs holds one connection, however often its owner tries it: deliveries need them too.
        if webhook_id in self._under_way:
            raise Conflict("a test of the webhook is under way already", code="webhook_test_under_way")
        self._under_way.add(webhook_id)
        try:
            answer = await self._post(record, event_type)
        finally:
            self._under_way.discard(webhook_id)
        if answer.status is None:
            raise ReceiverUnreached(f"the receiver gave no answer: {answer.error}")
        return {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": webhook_id,
            "event_type": event_type,
            "success": True,
            "status_code": answer.status,
        }

    async def _post(self, record: WebhookRecord, event_type: EventType) -> Answer:
        now = self._clock()
        event = sample_event(event_type, now)
        body = event.body.encode()
        headers = signed_headers(event.id, int(now), body, self._webhooks.secrets(record, now))
        return await self._sender.post(record.url, body, headers)

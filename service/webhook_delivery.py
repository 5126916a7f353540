"""Deliveries on their way: each due one is sent, and judged by the answer.

Owns: the loop of one gateway, when a delivery is tried again, when it has failed, when its webhook is disabled. Does
not own: what is due (webhook_queue.py), the request (webhook_http.py), its signature (webhook_signature.py).

A webhook's deliveries go one after the other, and after one that failed the others wait for the next round: a receiver
that hangs holds up its own alone. Nothing promises their order: gateways work beside each other, and what failed comes
later.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from time import time
from typing import Final, NamedTuple

from redis.asyncio import Redis

from bon_algos.crash_points import crash_point
from service.errors import StoreFull, StoreUnavailable
from service.loops import running_loops
from service.webhook_http import GONE, Answer, Sender
from service.webhook_outbox import Outbox
from service.webhook_queue import Claimed, Delivery, Outcome
from service.webhook_record import Reason, WebhookRecord
from service.webhook_signature import signed_headers
from service.webhooks import Webhooks

LOOK_SECONDS: Final = 1.0
PAUSES: Final = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0)
"""Seconds before each further attempt, as Standard Webhooks recommends: eight attempts in 31 h 35 min."""
JITTER: Final = 0.1
"""A pause is longer by up to this share of it, so that what failed at one time does not come back at one time."""
MOST_AT_ONCE: Final = 100
"""Webhooks that one gateway delivers to at one time."""
log = logging.getLogger("bonsai.webhooks")


class Verdict(NamedTuple):
    outcome: Outcome
    next_at: float | None = None
    disable: Reason | None = None


class WebhookDelivery:
    """Of one gateway process."""

    def __init__(
        self,
        redis: Redis,
        webhooks: Webhooks,
        sender: Sender,
        *,
        clock: Callable[[], float] = time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """clock: Unix seconds. chance: 0 to 1."""
        self._webhooks = webhooks
        self.outbox = Outbox(redis, webhooks, clock)
        self._sender = sender
        self._clock = clock
        self._chance = chance
        self._busy: set[str] = set()

    async def run(self) -> None:
        """Deliver until cancelled. What is under way then is delivered again, by whoever looks next."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    await self.start(group)
                except (StoreUnavailable, StoreFull) as error:
                    log.warning("webhooks wait: %s", error.message)
                await asyncio.sleep(LOOK_SECONDS)

    async def start(self, group: asyncio.TaskGroup) -> None:
        """One look: queue what has happened, and begin with what is due. Raises StoreUnavailable, StoreFull."""
        await self.outbox.empty()
        due = [one for one in await self._webhooks.queue.due(self._clock()) if one not in self._busy]
        # By chance, so that those whose receivers hang are not always first.
        random.shuffle(due)
        for webhook_id in due[: MOST_AT_ONCE - len(self._busy)]:
            self._busy.add(webhook_id)
            group.create_task(self._deliver_all(webhook_id))

    async def _deliver_all(self, webhook_id: str) -> None:
        """Of what is due for one webhook, up to the first that it does not accept."""
        try:
            while await self._deliver_next(webhook_id):
                pass
        except (StoreUnavailable, StoreFull) as error:
            log.warning("webhook %s waits: %s", webhook_id, error.message)
        finally:
            self._busy.discard(webhook_id)

    async def _deliver_next(self, webhook_id: str) -> bool:
        """Whether there was one, and it was accepted."""
        # Of one that is disabled the queue stays as it is.
        record = await self._webhooks.enabled(webhook_id)
        crash_point("webhook.due")
        claimed = None if record is None else await self._webhooks.queue.claim(webhook_id, self._clock())
        crash_point("webhook.claimed")
        if record is None or claimed is None:
            return False
        began = self._clock()
        answer = await self._post(record, claimed.delivery, began)
        crash_point("webhook.answered")
        await self._settle(record, claimed, answer, began)
        crash_point("webhook.settled")
        return answer.is_accepted

    async def _post(self, record: WebhookRecord, delivery: Delivery, now: float) -> Answer:
        body = delivery.body.encode()
        headers = signed_headers(delivery.id, int(now), body, self._webhooks.secrets(record, now))
        return await self._sender.post(record.url, body, headers)

    async def _settle(self, record: WebhookRecord, claimed: Claimed, answer: Answer, began: float) -> None:
        now = self._clock()
        delivery = claimed.delivery
        tried = delivery.model_copy(update={"attempts": delivery.attempts + 1, "first_at": delivery.first_at or began})
        verdict = judged(tried, answer, now, self._chance(), await self._webhooks.queue.accepted_at(record.id))
        if verdict.disable is not None:
            # First: were it settled and nobody left to do this, nothing would remind anybody of it.
            await self._webhooks.disable(record.id, verdict.disable)
        if not answer.is_accepted:
            log.warning("webhook %s, %s, attempt %d: %s", record.id, tried.id, tried.attempts, answer.error)
        await self._webhooks.queue.settle(
            record.id,
            claimed._replace(delivery=tried),
            verdict.outcome,
            now=now,
            next_at=verdict.next_at,
            attempt={
                "type": tried.type,
                "attempt": str(tried.attempts),
                "at": f"{began:.3f}",
                "seconds": f"{now - began:.3f}",
                "status": "" if answer.status is None else str(answer.status),
                "error": answer.error,
                "next": "" if verdict.next_at is None else f"{verdict.next_at:.3f}",
            },
        )


def judged(tried: Delivery, answer: Answer, now: float, chance: float, accepted_at: float | None) -> Verdict:
    """What an attempt's answer means. tried: with this attempt counted. accepted_at: when the webhook last accepted
    any delivery."""
    if answer.is_accepted:
        return Verdict("delivered")
    if answer.status == GONE:
        return Verdict("failed", disable="gone")
    if tried.attempts <= len(PAUSES):
        pause = PAUSES[tried.attempts - 1] * (1 + JITTER * chance)
        return Verdict("retrying", next_at=now + pause)
    is_silent = accepted_at is None or tried.first_at is None or accepted_at < tried.first_at
    return Verdict("failed", disable="failing" if is_silent else None)


@asynccontextmanager
async def delivering(redis: Redis, webhooks: Webhooks, sender: Sender) -> AsyncGenerator[None]:
    """Deliveries, until the block is left."""
    async with running_loops(WebhookDelivery(redis, webhooks, sender).run()):
        yield

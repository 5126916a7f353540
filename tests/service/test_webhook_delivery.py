"""What happens to a delivery: accepted once, tried again for a day, never lost, never signed wrongly."""

from __future__ import annotations

import asyncio
import hmac
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import time
from typing import Any

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from openai.types.webhooks import FineTuningJobCancelledWebhookEvent
from redis.asyncio import Redis

from bon_algos.contracts import (
    JOBS_MOVED,
    LEDGER_COUNTS,
    WEBHOOKS_ACCEPTED,
    WEBHOOKS_DUE,
    webhook_attempts_key,
    webhook_events_key,
    webhook_queue_key,
)
from service.access import GATEWAY, Caller
from service.jobs import Jobs
from service.store import open_redis
from service.webhook_delivery import JITTER, PAUSES, WebhookDelivery
from service.webhook_events import EventType
from service.webhook_http import open_sender
from service.webhook_queue import CLAIM_SECONDS
from service.webhook_reach import Reach
from service.webhook_record import FORMER_SECRET_SECONDS, OwnWebhookMembers, WebhookChange, WebhookRequest
from service.webhooks import MAX_WAITING, Webhooks
from tests.service.receiver import Receiver
from tests.service.records import job_spec

pytestmark = pytest.mark.anyio
PEPPER = b"p" * 32
CANCELLED: EventType = "fine_tuning.job.cancelled"


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = float(int(time()))

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    """A gateway's part in this, around a Redis and a receiver."""

    redis: Redis
    webhooks: Webhooks
    delivery: WebhookDelivery
    receiver: Receiver
    clock: Clock
    webhook_id: str = ""
    secret: str = ""

    async def subscribe(self, *events: EventType, by: Caller = GATEWAY) -> str:
        asked = WebhookRequest(name="n", url=self.receiver.url, event_types=events or (CANCELLED,))
        webhook, self.secret = await self.webhooks.create(asked, by)
        self.webhook_id = webhook["id"]
        return self.webhook_id

    async def look(self) -> None:
        """What a gateway does once a second, until all it began is done."""
        async with asyncio.TaskGroup() as group:
            await self.delivery.start(group)

    async def attempts(self) -> list[dict[str, Any]]:
        rows, _ = await self.webhooks.attempts(self.webhook_id, GATEWAY.tenant, 100, None)
        return list(rows)

    async def shown(self) -> dict[str, Any]:
        """What OpenAI has no member for."""
        webhook = await self.webhooks.get(self.webhook_id, GATEWAY.tenant)
        return dict(webhook["bonsai"])


@asynccontextmanager
async def world_of(redis_url: str, receiver: Receiver, *, seconds: float = 5.0) -> AsyncIterator[World]:
    reach = Reach(private_addresses=True, plain_http=True)
    async with open_redis(redis_url) as redis, open_sender(reach, seconds=seconds) as sender:
        clock = Clock()
        webhooks = Webhooks(redis, PEPPER, reach, clock=clock)
        delivery = WebhookDelivery(redis, webhooks, sender, clock=clock, chance=lambda: 1.0)
        yield World(redis, webhooks, delivery, receiver, clock)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().listening() as one:
        yield one


@pytest.fixture
async def world(redis_url: str, receiver: Receiver) -> AsyncIterator[World]:
    async with world_of(redis_url, receiver) as one:
        yield one


async def cancelled_job(redis: Redis, tenant: str = "default") -> str:
    """A job that was submitted and cancelled."""
    await redis.hset(LEDGER_COUNTS, "default" if tenant == "default" else f"{tenant}/default", "100")
    jobs = Jobs(redis, n_cap=64, max_lora_rank=32)
    by = GATEWAY._replace(tenant=tenant)
    job_id = (await jobs.submit(job_spec(), by=by)).job_id
    await jobs.grant("cancel", job_id, by)
    return job_id


# --- one that is accepted --------------------------------------------------------------------------------


async def test_openais_client_unwraps_what_it_is_sent(world):
    await world.subscribe()
    job_id = await cancelled_job(world.redis)
    await world.look()
    [came] = world.receiver.received
    client = OpenAI(api_key="none")
    event = client.webhooks.unwrap(came.body, came.headers, secret=world.secret)
    assert isinstance(event, FineTuningJobCancelledWebhookEvent)
    assert (event.data.id, event.id) == (job_id, came.id)
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(came.body + b" ", came.headers, secret=world.secret)


async def test_a_delivery_is_told_once_and_then_forgotten(world):
    await world.subscribe()
    await cancelled_job(world.redis)
    for _ in range(3):
        await world.look()
    assert len(world.receiver.received) == 1
    assert world.receiver.received[0].event["object"] == "event"
    [attempt] = await world.attempts()
    assert (attempt["outcome"], attempt["status_code"], attempt["error"]) == ("delivered", 204, None)
    assert await world.redis.exists(webhook_queue_key(world.webhook_id), webhook_events_key(world.webhook_id)) == 0
    assert await world.redis.exists(WEBHOOKS_DUE) == 0
    assert await world.redis.xlen(JOBS_MOVED) == 0
    assert (await world.shown())["last_accepted_at"] == world.clock.now


async def test_everybody_is_told_what_he_asked_for_and_of_his_own_jobs_alone(world):
    acme = GATEWAY._replace(tenant="acme")
    theirs = await world.subscribe(by=acme)
    unasked = await world.subscribe("fine_tuning.job.failed")
    first, second = await world.subscribe(), await world.subscribe(CANCELLED, "fine_tuning.job.running")
    job_id = await cancelled_job(world.redis)
    await world.look()
    assert [one.event["data"]["id"] for one in world.receiver.received] == [job_id, job_id]
    assert len(set(world.receiver.ids)) == 1
    for webhook_id, told in ((theirs, 0), (unasked, 0), (first, 1), (second, 1)):
        assert await world.redis.xlen(webhook_attempts_key(webhook_id)) == told
    await cancelled_job(world.redis, "acme")
    await world.look()
    assert await world.redis.xlen(webhook_attempts_key(theirs)) == 1


@pytest.mark.parametrize("keeps_former", [True, False])
async def test_after_a_rotation_both_secrets_are_right_for_a_day_if_that_was_asked_for(world, keeps_former):
    await world.subscribe()
    former = world.secret
    _, present = await world.webhooks.rotate(world.webhook_id, GATEWAY, keeps_former=keeps_former)
    for later, count in ((60.0, 1 + keeps_former), (FORMER_SECRET_SECONDS, 1)):
        world.clock.now += later
        await cancelled_job(world.redis)
        await world.look()
        came = world.receiver.received[-1]
        signatures = came.headers["webhook-signature"].split()
        assert len(signatures) == count
        assert [one in signatures for one in (signed(came, present), signed(came, former))] == [True, count == 2]


async def test_of_two_rotations_only_the_second_says_whether_a_former_secret_signs(world):
    await world.subscribe()
    for keeps_former in (True, False):
        await world.webhooks.rotate(world.webhook_id, GATEWAY, keeps_former=keeps_former)
    await cancelled_job(world.redis)
    await world.look()
    assert len(world.receiver.received[0].headers["webhook-signature"].split()) == 1


def signed(came: Any, secret: str) -> str:
    """As the specification has it, by hand."""
    said = f"{came.id}.{came.headers['webhook-timestamp']}.".encode() + came.body
    return "v1," + b64encode(hmac.digest(b64decode(secret.removeprefix("whsec_")), said, "sha256")).decode()


# --- one that is not ------------------------------------------------------------------------------------


async def test_500_and_then_200_under_the_same_id(world):
    await world.subscribe()
    await cancelled_job(world.redis)
    world.receiver.script = [500]
    await world.look()
    await world.look()
    assert len(world.receiver.received) == 1
    world.clock.now += PAUSES[0]
    await world.look()
    assert len(world.receiver.received) == 1
    world.clock.now += PAUSES[0] * JITTER
    await world.look()
    first, second = world.receiver.received
    assert (first.id, first.body) == (second.id, second.body)
    assert first.headers["webhook-timestamp"] != second.headers["webhook-timestamp"]
    assert [one["outcome"] for one in await world.attempts()] == ["delivered", "retrying"]


FAULTS: dict[str, tuple[Any, int | None, str]] = {
    "an error": (503, 503, "it did not accept"),
    "a refusal": (400, 400, "it did not accept"),
    "a redirect": ("redirects", 307, "it redirects, which is not followed"),
    "a broken connection": ("breaks", None, "the connection broke"),
}


@pytest.mark.parametrize(("behaviour", "status", "error"), FAULTS.values(), ids=FAULTS.keys())
async def test_what_is_no_acceptance_is_tried_again(world, behaviour, status, error):
    await world.subscribe()
    await cancelled_job(world.redis)
    world.receiver.script = [behaviour]
    await world.look()
    [attempt] = await world.attempts()
    assert (attempt["outcome"], attempt["status_code"], attempt["error"]) == ("retrying", status, error)
    assert attempt["next_attempt_at"] == pytest.approx(world.clock.now + PAUSES[0] * (1 + JITTER), abs=0.01)
    assert [one.path for one in world.receiver.received] == ["/hooks"]
    assert (await world.shown())["waiting"] == 1


async def test_a_receiver_that_hangs_holds_up_its_own_alone(redis_url, receiver):
    with Receiver().listening() as other:
        async with world_of(redis_url, receiver, seconds=0.3) as world:
            receiver.script = ["hangs"]
            await world.subscribe()
            world.receiver = other
            await world.subscribe()
            for _ in range(3):
                await cancelled_job(world.redis)
            await world.look()
            assert (len(receiver.received), len(other.received)) == (1, 3)


async def test_an_answer_without_end_is_not_read(redis_url, receiver):
    async with world_of(redis_url, receiver) as world:
        receiver.script = ["endless"]
        await world.subscribe()
        await cancelled_job(world.redis)
        async with asyncio.timeout(2):
            await world.look()
        assert [one["outcome"] for one in await world.attempts()] == ["delivered"]


async def test_nobody_listens(world):
    await world.subscribe()
    await world.webhooks.change(world.webhook_id, WebhookChange(url="http://127.0.0.1:1/"), GATEWAY)
    await cancelled_job(world.redis)
    await world.look()
    assert [(one["status_code"], one["error"]) for one in await world.attempts()] == [(None, "no connection")]


async def test_gone_ends_it_and_what_waits_is_delivered_when_it_is_enabled_again(world):
    await world.subscribe()
    world.receiver.script = [410]
    for _ in range(2):
        await cancelled_job(world.redis)
    await world.look()
    shown = await world.shown()
    assert (shown["enabled"], shown["disabled_reason"], shown["waiting"]) == (False, "gone", 1)
    await cancelled_job(world.redis)  # of which it is not told
    await world.look()
    assert len(world.receiver.received) == 1
    await world.webhooks.change(world.webhook_id, WebhookChange(bonsai=OwnWebhookMembers(enabled=True)), GATEWAY)
    await world.look()
    assert len(world.receiver.received) == 2
    assert (await world.shown())["waiting"] == 0


async def test_after_eight_attempts_in_more_than_a_day_it_has_failed_and_the_webhook_is_disabled(world):
    await world.subscribe()
    await cancelled_job(world.redis)
    world.receiver.script = [500] * 99
    began = world.clock.now
    for pause in PAUSES:
        await world.look()
        world.clock.now += pause * (1 + JITTER)
    await world.look()
    attempts = await world.attempts()
    assert [one["outcome"] for one in attempts] == ["failed", *["retrying"] * 7]
    assert len(set(world.receiver.ids)) == 1
    assert 24 * 3600 < world.clock.now - began < 36 * 3600
    shown = await world.shown()
    assert (shown["enabled"], shown["disabled_reason"], shown["waiting"]) == (False, "failing", 0)


async def test_a_webhook_that_accepted_others_meanwhile_stays_enabled(world):
    await world.subscribe()
    await cancelled_job(world.redis)
    for pause in PAUSES:
        world.receiver.script = [500]
        await world.look()
        world.clock.now += pause * (1 + JITTER)
    world.receiver.script = [500]
    await world.redis.hset(WEBHOOKS_ACCEPTED, world.webhook_id, int(world.clock.now * 1000) - 1)
    await world.look()
    assert (await world.attempts())[0]["outcome"] == "failed"
    assert (await world.shown())["enabled"]


async def test_one_that_is_too_far_behind_is_disabled(world):
    await world.subscribe()
    await world.redis.zadd(webhook_queue_key(world.webhook_id), {f"evt_{i}": 9e15 for i in range(MAX_WAITING)})
    await cancelled_job(world.redis)
    await world.look()
    shown = await world.shown()
    assert (shown["disabled_reason"], shown["waiting"]) == ("overfull", MAX_WAITING)


# --- several gateways, and their deaths -----------------------------------------------------------------


async def test_of_two_gateways_one_queues_and_one_delivers(redis_url, world):
    await world.subscribe()
    for _ in range(20):
        await cancelled_job(world.redis)
    async with world_of(redis_url, world.receiver) as other:
        # Connections first, so that both really run against each other.
        await asyncio.gather(*(one.redis.ping() for one in (world, other)))
        await asyncio.gather(*(one.delivery.outbox.empty() for one in (world, other)))
        await asyncio.gather(*(one.look() for one in (world, other)))
    assert len(world.receiver.received) == len(set(world.receiver.ids)) == 20


async def test_what_a_dead_gateway_had_claimed_is_delivered_by_the_next(world):
    await world.subscribe()
    await cancelled_job(world.redis)
    await world.delivery.outbox.empty()
    assert await world.webhooks.queue.claim(world.webhook_id, world.clock.now) is not None
    await world.look()
    assert world.receiver.received == []
    world.clock.now += CLAIM_SECONDS
    await world.look()
    assert len(world.receiver.received) == 1


async def test_a_verdict_that_comes_after_the_claim_has_passed_on_changes_nothing(world):
    await world.subscribe()
    await cancelled_job(world.redis)
    await world.delivery.outbox.empty()
    queue, now = world.webhooks.queue, world.clock.now
    slow = await queue.claim(world.webhook_id, now)
    await queue.claim(world.webhook_id, now + CLAIM_SECONDS)
    told = {"type": "t", "attempt": "1", "at": "0", "seconds": "0", "status": "", "error": "", "next": ""}
    await queue.settle(world.webhook_id, slow, "failed", now=now, next_at=None, attempt=told)
    assert (await world.shown())["waiting"] == 1
    assert await world.attempts() == []
    # But that it arrived is true, whoever says so.
    await queue.settle(world.webhook_id, slow, "delivered", now=now, next_at=None, attempt=told)
    assert (await world.shown())["waiting"] == 0


async def test_one_that_is_deleted_while_it_is_told_leaves_nothing(world):
    await world.subscribe()
    await cancelled_job(world.redis)
    await world.delivery.outbox.empty()
    claimed = await world.webhooks.queue.claim(world.webhook_id, world.clock.now)
    await world.webhooks.delete(world.webhook_id, GATEWAY)
    told = {"type": "t", "attempt": "1", "at": "0", "seconds": "0", "status": "", "error": "", "next": ""}
    await world.webhooks.queue.settle(
        world.webhook_id, claimed, "delivered", now=world.clock.now, next_at=None, attempt=told
    )
    assert [key async for key in world.redis.scan_iter("bonsai:webhook:*")] == []


async def test_with_redis_away_events_wait(own_redis, receiver):
    """And the loop goes on."""
    async with world_of(own_redis.url, receiver) as world:
        await world.subscribe()
        await cancelled_job(world.redis)
        own_redis.kill()
        loop = asyncio.create_task(world.delivery.run())
        own_redis.start()
        async with asyncio.timeout(10):
            while not receiver.received:
                await asyncio.sleep(0.01)
        loop.cancel()
        await asyncio.wait({loop})

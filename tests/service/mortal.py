"""What a gateway does to what outlives it, each in a process that may be killed on the way:
`python -m tests.service.mortal SCENARIO REDIS_URL DIRECTORY`.

Owns: the steps, made of the gateway's own parts. Does not own: at which place it dies, and what must be true then.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from pathlib import Path
from time import time

from redis.asyncio import Redis

from service.access import GATEWAY
from service.dispatch import Dispatcher, open_producer, send_job
from service.idempotency import Idempotency
from service.jobs import Jobs
from service.ledger import Ledger
from service.policies import Policies
from service.spool import Spool
from service.store import open_redis
from service.webhook_delivery import WebhookDelivery
from service.webhook_http import open_sender
from service.webhook_reach import Reach
from service.webhook_record import WebhookRequest
from service.webhooks import Webhooks
from tests.service.records import BASE, STUDENT, group, job_spec

IDEMPOTENCY = Idempotency.of("the-callers-key", "an operation", "and its body")
RECONCILE_SECONDS = 0.05


def dispatcher(redis: Redis, redis_url: str) -> Dispatcher:
    producer = open_producer(redis_url)
    return Dispatcher(redis, partial(send_job, producer), seconds=RECONCILE_SECONDS)


async def submit(redis_url: str) -> str:
    """A job's record, and the message that wakes a worker; the job's id."""
    async with open_redis(redis_url) as redis:
        submitted = await Jobs(redis, n_cap=64, max_lora_rank=32).submit(job_spec(), IDEMPOTENCY)
        await dispatcher(redis, redis_url).wake(submitted.job_id)
        return submitted.job_id


async def promote(redis_url: str) -> None:
    """A policy to the front of its route."""
    async with open_redis(redis_url) as redis:
        await Policies(redis).promote(STUDENT, "default", "measured", frozenset({BASE, STUDENT}), IDEMPOTENCY)


async def log(redis_url: str, directory: Path, *, appends: bool = True) -> None:
    """A group into the spool and from there into Redis."""
    spool = Spool(directory, 2**30)
    async with open_redis(redis_url, in_bytes=True) as redis:
        ledger = Ledger(spool, redis)
        if appends:
            assert ledger.append(group([(1.0, 3), (2.0, 4)]))
        drainer = asyncio.create_task(ledger.run(lambda unmeasured: None))
        while ledger.status.pending_bytes or ledger.status.redis != "ok":
            await asyncio.sleep(0.005)
        drainer.cancel()
    spool.close()


REACH = Reach(private_addresses=True, plain_http=True)


async def subscribe(redis_url: str, url: str) -> None:
    """A webhook, and a job that ended."""
    async with open_redis(redis_url) as redis:
        asked = WebhookRequest(url=url, events=("fine_tuning.job.cancelled",))
        await Webhooks(redis, bytes(32), REACH).create(asked, GATEWAY)
        jobs = Jobs(redis, n_cap=64, max_lora_rank=32)
        await jobs.grant("cancel", (await jobs.submit(job_spec())).job_id)


async def tell(redis_url: str, *, later: float = 0.0) -> None:
    """What has happened into the queue of the webhook, and from there to its receiver."""
    async with open_redis(redis_url) as redis, open_sender(REACH) as sender:
        webhooks = Webhooks(redis, bytes(32), REACH)
        delivery = WebhookDelivery(redis, webhooks, sender, clock=lambda: time() + later)
        async with asyncio.TaskGroup() as group:
            await delivery.start(group)


if __name__ == "__main__":
    scenario, url, where = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    match scenario:
        case "submit":
            asyncio.run(submit(url))
        case "promote":
            asyncio.run(promote(url))
        case "tell":
            asyncio.run(tell(url))
        case "log":
            asyncio.run(log(url, where))

"""What a gateway does to what outlives it, each in a process that may be killed on the way:
`python -m tests.service.mortal` reads lines of JSON, [PLACE, SCENARIO, REDIS_URL, DIRECTORY], and answers each with the
exit code of a process forked for it, which has everything loaded.

Owns: the steps, made of the gateway's own parts. Does not own: at which place it dies, and what must be true then.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from time import time
from typing import Any, cast

from redis.asyncio import Redis
from starlette.requests import Request

from bon_algos.contracts import POLICIES_INDEX, jobs_index
from bon_algos.crash_points import CRASH_AT
from service.access import GATEWAY
from service.catalogue import Catalogue
from service.deletion import Deletion
from service.dispatch import Dispatcher, open_producer, send_job
from service.file_form import FileForm
from service.files import Files
from service.idempotency import Idempotency
from service.job_records import JobRecords
from service.job_scripts import Wish
from service.jobs import Jobs
from service.journal import JournalWriter
from service.ledger import Ledger
from service.lost_uploads import LostUploads
from service.policies import Policies
from service.replays import Replays, Reply
from service.spool import Spool
from service.store import open_redis
from service.tokenizer_files import read_tokenizer
from service.webhook_delivery import WebhookDelivery
from service.webhook_http import open_sender
from service.webhook_reach import Reach
from service.webhook_record import WebhookRequest
from service.webhooks import Webhooks
from tests.service.records import BASE, STUDENT, group, job_spec, policy, route
from tests.service.training_files import FORM, form, line, part
from tests.stubs.tokenizer import write_model_directory

IDEMPOTENCY = Idempotency.of("the-callers-key", "an operation", "and its body")
RECONCILE_SECONDS = 0.05
SECONDS_TO_ANSWER = 2.0


def dispatcher(redis: Redis, redis_url: str) -> Dispatcher:
    producer = open_producer(redis_url)
    return Dispatcher(redis, partial(send_job, producer), seconds=RECONCILE_SECONDS)


async def submit(redis_url: str) -> str:
    """A job's record, and the message that wakes a worker; the job's id."""
    async with open_redis(redis_url) as redis:
        submitted = await Jobs(redis, n_cap=64, max_lora_rank=32).submit(job_spec(), IDEMPOTENCY)
        await dispatcher(redis, redis_url).wake(submitted.job_id)
        return submitted.job_id


async def wish(wanted: Wish, redis_url: str) -> dict[str, Any]:
    """The only job is to be paused, resumed or cancelled; the job, after."""
    async with open_redis(redis_url) as redis:
        (job_id,) = cast("list[str]", await redis.zrange(jobs_index("default"), 0, -1))
        own = Idempotency.of("another-of-the-callers-keys", wanted, job_id)
        return await Jobs(redis, n_cap=64, max_lora_rank=32).grant(wanted, job_id, idempotency=own)


async def reconcile(redis_url: str) -> None:
    """One pass over the open jobs."""
    async with open_redis(redis_url) as redis:
        await dispatcher(redis, redis_url).reconcile()


async def record(redis_url: str, directory: Path) -> None:
    """Of every job to which something happened, beside the artefacts."""
    async with open_redis(redis_url) as redis:
        await JobRecords(redis, directory).write()


def _files(redis: Redis, directory: Path) -> Files:
    models = write_model_directory(directory / "model")
    tokenizer = read_tokenizer(models)
    return Files(redis, artefacts=directory, max_bytes=10_000, tokenizer=tokenizer, policy_directory=models, window=256)


async def upload(redis_url: str, directory: Path) -> str:
    """A training file, from the form to its record; its id."""
    body = form(part("purpose", b"fine-tune"), part("file", line(), "f.jsonl"))
    headers = [(name.lower().encode(), value.encode()) for name, value in FORM.items()]

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    async with open_redis(redis_url) as redis:
        request = Request({"type": "http", "method": "POST", "path": "/v1/files", "headers": headers}, receive)
        return (await _files(redis, directory).upload(request, FileForm, "default")).id


async def forget(redis_url: str, directory: Path) -> None:
    """The only training file, out of the registry and off the disk."""
    async with open_redis(redis_url) as redis:
        files = _files(redis, directory)
        for record in await files.all("default"):
            await files.delete(record.id, "default")


async def sweep_uploads(redis_url: str, directory: Path) -> None:
    """What every gateway does for uploads that others began to record or to delete."""
    async with open_redis(redis_url) as redis:
        await LostUploads(redis, directory).sweep()


async def begin(redis_url: str, directory: Path) -> None:
    """A gateway begins on an empty Redis, and writes down what is registered."""
    async with open_redis(redis_url) as redis:
        catalogue = Catalogue(redis, policy(BASE), route())
        await catalogue.refresh()
        await JournalWriter(catalogue, directory).write()


async def delete(redis_url: str, directory: Path) -> None:
    """The only policy, with its files."""
    async with open_redis(redis_url) as redis:
        (policy_id,) = cast("list[str]", await redis.zrange(POLICIES_INDEX, 0, -1))
        await Deletion(redis, directory).delete(policy_id, GATEWAY)


async def sweep(redis_url: str, directory: Path) -> None:
    """What every gateway does for deletions that others began."""
    async with open_redis(redis_url) as redis:
        await Deletion(redis, directory).sweep()


async def answer(redis_url: str) -> Reply:
    """A reply that is made once."""

    async def make() -> Reply:
        return Reply({"id": "resp_1"}, {})

    async with open_redis(redis_url) as redis:
        return await Replays(redis).once(IDEMPOTENCY, SECONDS_TO_ANSWER, make)


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
        asked = WebhookRequest(name="n", url=url, event_types=("fine_tuning.job.cancelled",))
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


async def play(scenario: str, redis_url: str, directory: Path) -> None:
    match scenario:
        case "submit":
            await submit(redis_url)
        case "pause" | "resume" | "cancel":
            await wish(scenario, redis_url)
        case "reconcile":
            await reconcile(redis_url)
        case "record":
            await record(redis_url, directory)
        case "upload":
            await upload(redis_url, directory)
        case "forget":
            await forget(redis_url, directory)
        case "sweep uploads":
            await sweep_uploads(redis_url, directory)
        case "begin":
            await begin(redis_url, directory)
        case "promote":
            await promote(redis_url)
        case "delete":
            await delete(redis_url, directory)
        case "answer":
            await answer(redis_url)
        case "tell":
            await tell(redis_url)
        case "log":
            await log(redis_url, directory)


def fork(point: str, scenario: str, redis_url: str, directory: str) -> int:
    """Play a scenario in a process that dies at this place; how it ended."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.environ[CRASH_AT] = point
    try:
        asyncio.run(play(scenario, redis_url, Path(directory)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    for asked in sys.stdin:
        print(fork(*json.loads(asked)), flush=True)

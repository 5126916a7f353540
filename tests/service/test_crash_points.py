"""A gateway that dies at any write: what was said yes to is there once, what was not is not there at all."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from bon_algos.contracts import (
    AUDIT_STREAM,
    BROKER_PREFIX,
    DISTILL_QUEUES,
    LEDGER_COUNTS,
    OPEN_JOBS,
    POLICIES_INDEX,
    ROUTES_INDEX,
    PolicyRecord,
    Route,
    job_key,
    jobs_index,
    policy_key,
    route_key,
)
from bon_algos.crash_points import CRASH_AT, GATEWAY_POINTS
from service.store import open_redis
from service.webhook_queue import CLAIM_SECONDS
from tests.fixtures.gateway import read_ledger, wait_until
from tests.service import mortal
from tests.service.receiver import Receiver
from tests.service.records import BASE, STUDENT, policy, route

pytestmark = pytest.mark.slow
QUEUE = f"{BROKER_PREFIX}{DISTILL_QUEUES['normal']}"
SUBMITTING = [point for point in GATEWAY_POINTS if point.partition(".")[0] in ("submit", "dispatch")]
TRANSACTING = [point for point in GATEWAY_POINTS if point.startswith("transaction.")]
LOGGING = [point for point in GATEWAY_POINTS if point.partition(".")[0] in ("spool", "drain")]
TELLING = [point for point in GATEWAY_POINTS if point.startswith("webhook.")]


def test_every_place_is_somebodys():
    assert [*SUBMITTING, *TRANSACTING, *LOGGING, *TELLING] == list(GATEWAY_POINTS)


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        connection.hset(LEDGER_COUNTS, "default", "100")
        yield connection


def dies(scenario: str, point: str, redis_url: str, directory: Path) -> None:
    command = [sys.executable, "-m", "tests.service.mortal", scenario, redis_url, str(directory)]
    done = subprocess.run(command, env=os.environ | {CRASH_AT: point}, capture_output=True, text=True)
    assert done.returncode == -9, f"{point} was never passed: {done.stderr}"


async def reconciled(redis_url: str) -> None:
    async with open_redis(redis_url) as connection:
        await mortal.dispatcher(connection, redis_url).reconcile()


@pytest.mark.parametrize("point", SUBMITTING)
def test_F32_a_job_is_there_once_and_somebody_is_woken_for_it(point, client, redis_url, tmp_path):
    """The caller, who saw the connection break, asks again with the same key; the next gateway's reconciler runs."""
    dies("submit", point, redis_url, tmp_path)
    recorded = client.zrange(jobs_index("default"), 0, -1)
    assert len(recorded) == (0 if point == "submit.asked" else 1)
    if recorded:
        # Before the caller asks again, if ever: no message depends on that.
        wait_until(lambda: asyncio.run(reconciled(redis_url)) or client.llen(QUEUE) > 0)
    job_id = asyncio.run(mortal.submit(redis_url))
    assert recorded in ([], [job_id])
    assert client.zrange(jobs_index("default"), 0, -1) == [job_id]
    assert (client.smembers(OPEN_JOBS), client.hget(job_key(job_id), "state")) == ({job_id}, "queued")
    assert client.llen(QUEUE) >= 1


@pytest.mark.parametrize("point", TRANSACTING)
def test_a_promotion_happened_as_a_whole_or_not_at_all_and_is_audited_once(point, client, redis_url, tmp_path):
    for record in (policy(BASE), policy(STUDENT)):
        client.hset(policy_key(record.id), mapping={"record": record.model_dump_json(), "version": 1})
        client.zadd(POLICIES_INDEX, {record.id: record.created_at})
    client.set(route_key("default"), route().model_dump_json())
    client.sadd(ROUTES_INDEX, "default")

    def stands() -> tuple[str | None, str, int]:
        live = Route.model_validate_json(client.get(route_key("default"))).live_policy
        state = PolicyRecord.model_validate_json(client.hget(policy_key(STUDENT), "record")).state
        return live, state, client.xlen(AUDIT_STREAM)

    dies("promote", point, redis_url, tmp_path)
    promoted = (STUDENT, "live", 1)
    assert stands() == (promoted if point == "transaction.committed" else (None, "candidate", 0))
    asyncio.run(mortal.promote(redis_url))
    assert stands() == promoted


@pytest.mark.parametrize("point", LOGGING)
def test_a_group_on_the_disk_is_delivered_once_by_whoever_comes_next(point, client, redis_url, tmp_path):
    dies("log", point, redis_url, tmp_path)
    asyncio.run(mortal.log(redis_url, tmp_path, appends=False))
    assert [record.id for record in read_ledger(redis_url)] == ["resp_1"]
    assert client.hget(LEDGER_COUNTS, "default") == "101"


@pytest.mark.parametrize("point", ["transaction.committed", *TELLING])
def test_a_webhook_is_told_at_least_once_and_under_one_id(point, client, redis_url, tmp_path):
    """Of a job that ended: whether its gateway dies while it queues the event, or at any place of the delivery."""
    with Receiver().listening() as receiver:
        asyncio.run(mortal.subscribe(redis_url, receiver.url))
        dies("tell", point, redis_url, tmp_path)
        asyncio.run(mortal.tell(redis_url, later=CLAIM_SECONDS))
        asyncio.run(mortal.tell(redis_url, later=2 * CLAIM_SECONDS))
    assert len(receiver.received) == (2 if point == "webhook.answered" else 1)
    assert len(set(receiver.ids)) == 1

"""Messages may be lost, workers may die: the reconciler wakes exactly what needs waking."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import AsyncIterator
from functools import partial

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from bon_algos.contracts import (
    DISTILL_QUEUES,
    DISTILL_TASK,
    LEDGER_COUNTS,
    OPEN_JOBS,
    RECONCILER_LEASE,
    JobPriority,
    job_key,
)
from service.dispatch import RESEND_SECONDS, Dispatcher, broker_url, open_producer, send_job, waiting_list
from service.jobs import Jobs
from service.store import open_redis
from tests.fixtures.clock import ClockedRedis
from tests.service.records import job_spec
from worker.lease import claim, release

pytestmark = pytest.mark.anyio
QUEUE = waiting_list("normal")


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with open_redis(redis_url) as client:
        await client.hset(LEDGER_COUNTS, "default", "100")
        yield client


@pytest.fixture
async def job_id(redis: Redis) -> str:
    return (await Jobs(redis, n_cap=64, max_lora_rank=32).submit(job_spec())).job_id


class Sender:
    """Where messages go instead of a broker."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.is_away = False

    def __call__(self, job_id: str, priority: JobPriority, begun: bool) -> None:
        if self.is_away:
            raise ConnectionRefusedError
        self.sent.append(job_id)


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
def dispatcher(redis: Redis, sender: Sender) -> Dispatcher:
    return Dispatcher(redis, sender, seconds=5)


async def as_if_sent_long_ago(redis: Redis, job_id: str) -> None:
    now, _ = await redis.time()
    await redis.hset(job_key(job_id), "dispatched_at", (now - 60) * 1000)


async def test_a_message_carries_the_job_id_alone(redis: Redis, redis_url: str, job_id: str):
    """Read from the broker's own list, as a worker would find it."""
    send_job(open_producer(redis_url), job_id, "normal")
    message = json.loads(await redis.lindex(QUEUE, 0) or "")
    args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    assert (message["headers"]["task"], args, kwargs) == (DISTILL_TASK, [job_id], {})
    assert await redis.llen(QUEUE) == 1


@pytest.mark.slow
async def test_a_broker_that_never_answers_costs_seconds(job_id: str):
    """It accepts the connection and says nothing, as over a half-open link."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(Exception, match=r"(?i)time"):
            send_job(open_producer(f"redis://127.0.0.1:{silent.getsockname()[1]}/0"), job_id, "normal")
        assert time.monotonic() - began < 10


def test_the_broker_is_the_same_server_in_kombus_words():
    assert broker_url("redis://127.0.0.1:6379/2") == "redis://127.0.0.1:6379/2"
    assert broker_url("unix:///run/redis.sock") == "redis+socket:///run/redis.sock"
    assert broker_url("unix:///run/redis.sock?db=2") == "redis+socket:///run/redis.sock?virtual_host=2"


async def test_a_woken_job_is_not_woken_again_before_its_time(dispatcher: Dispatcher, sender: Sender, job_id: str):
    await dispatcher.wake(job_id)
    assert await dispatcher.reconcile() == {job_id: "wait"}
    assert sender.sent == [job_id]


async def test_a_gateway_that_died_before_dispatching_is_repaired(dispatcher: Dispatcher, sender: Sender, job_id: str):
    assert await dispatcher.reconcile() == {job_id: "dispatch"}
    assert sender.sent == [job_id]


async def test_a_lost_message_is_sent_again(dispatcher: Dispatcher, sender: Sender, redis: Redis, job_id: str):
    await dispatcher.wake(job_id)
    await as_if_sent_long_ago(redis, job_id)
    assert await dispatcher.reconcile() == {job_id: "dispatch"}
    assert sender.sent == [job_id, job_id]


async def test_a_message_that_still_waits_is_not_doubled(
    dispatcher: Dispatcher, sender: Sender, redis: Redis, redis_url: str, job_id: str
):
    send_job(open_producer(redis_url), job_id, "normal")
    await as_if_sent_long_ago(redis, job_id)
    assert await dispatcher.reconcile() == {job_id: "wait"}
    assert sender.sent == []


async def test_what_was_never_sent_is_sent_whatever_waits(
    dispatcher: Dispatcher, sender: Sender, redis_url: str, job_id: str
):
    send_job(open_producer(redis_url), "job_of_somebody", "normal")
    assert await dispatcher.reconcile() == {job_id: "dispatch"}


async def test_a_message_lost_behind_a_queue_that_is_never_empty_is_sent_again_within_the_hour(
    dispatcher: Dispatcher, redis: Redis, redis_url: str, job_id: str
):
    send_job(open_producer(redis_url), "job_of_somebody", "normal")
    now, _ = await redis.time()
    for ago, action in ((RESEND_SECONDS - 60, "wait"), (RESEND_SECONDS, "dispatch")):
        await redis.hset(job_key(job_id), "dispatched_at", (now - ago) * 1000)
        assert await dispatcher.reconcile() == {job_id: action}


async def test_a_job_that_has_begun_does_not_wait_behind_those_that_have_not(
    dispatcher: Dispatcher, sender: Sender, redis: Redis, redis_url: str, job_id: str
):
    await dispatcher.wake(job_id)
    with blocking_redis.Redis.from_url(redis_url) as store:
        own = claim(store, job_id, lease_seconds=60, worker="here:1")
        assert not isinstance(own, str)
        assert release(store, job_id, own, "killed")
    for priority in DISTILL_QUEUES:
        send_job(open_producer(redis_url), "job_of_somebody", priority)
    through_broker = Dispatcher(redis, partial(send_job, open_producer(redis_url)), seconds=5)
    await redis.delete(RECONCILER_LEASE)
    assert await through_broker.reconcile() == {job_id: "dispatch"}
    assert await redis.llen(waiting_list("normal", begun=True)) == 1
    await as_if_sent_long_ago(redis, job_id)
    assert await through_broker.reconcile() == {job_id: "wait"}


async def test_a_broker_that_is_away_is_asked_again_at_the_next_pass(
    dispatcher: Dispatcher, sender: Sender, job_id: str
):
    sender.is_away = True
    await dispatcher.wake(job_id)
    sender.is_away = False
    assert await dispatcher.reconcile() == {job_id: "dispatch"}
    assert sender.sent == [job_id]


async def test_a_job_whose_lease_lives_is_left_alone(dispatcher: Dispatcher, redis: Redis, job_id: str):
    await redis.hset(job_key(job_id), mapping={"state": "running", "lease_until": "99999999999999", "attempts": 1})
    assert await dispatcher.reconcile() == {job_id: "wait"}


@pytest.mark.parametrize(("attempts", "action"), [(1, "dispatch"), (2, "dispatch"), (3, "failed")])
async def test_a_dead_lease_is_taken_up_until_the_third_attempt(
    dispatcher: Dispatcher, redis: Redis, job_id: str, attempts: int, action: str
):
    await redis.hset(job_key(job_id), mapping={"state": "running", "lease_until": "1", "attempts": attempts})
    await redis.hset(job_key(job_id), "last_error", "out of memory")
    assert await dispatcher.reconcile() == {job_id: action}
    if action == "failed":
        job = await Jobs(redis, n_cap=64, max_lora_rank=32).get(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "dead_letter")
        assert "out of memory" in job["error"]["message"]
        assert await redis.smembers(OPEN_JOBS) == set()


async def test_a_cancelled_job_whose_worker_died_is_cancelled_and_not_run_again(
    dispatcher: Dispatcher, sender: Sender, redis: Redis, job_id: str
):
    await redis.hset(job_key(job_id), mapping={"state": "running", "lease_until": "1", "attempts": 1, "cancel": 1})
    assert await dispatcher.reconcile() == {job_id: "cancelled"}
    assert sender.sent == []


async def test_a_finished_job_is_looked_at_no_more(dispatcher: Dispatcher, redis: Redis, job_id: str):
    await redis.hset(job_key(job_id), "state", "succeeded")
    assert await dispatcher.reconcile() == {job_id: "settled"}
    assert await dispatcher.reconcile() == {}


async def test_only_one_gateway_reconciles(dispatcher: Dispatcher, redis: Redis, sender: Sender, job_id: str):
    other = Dispatcher(redis, sender, seconds=5)
    assert await dispatcher.reconcile() == {job_id: "dispatch"}
    await as_if_sent_long_ago(redis, job_id)
    assert await other.reconcile() == {}
    assert await dispatcher.reconcile() == {job_id: "dispatch"}


@pytest.mark.parametrize("priority", DISTILL_QUEUES)
async def test_a_job_waits_in_the_queue_of_its_class(redis: Redis, redis_url: str, priority: JobPriority):
    """And is sent there again, whatever waits in the others."""
    job_id = (await Jobs(redis, n_cap=64, max_lora_rank=32).submit(job_spec(priority=priority))).job_id
    for other in DISTILL_QUEUES.keys() - {priority}:
        send_job(open_producer(redis_url), "job_of_another_class", other)
    dispatcher = Dispatcher(redis, partial(send_job, open_producer(redis_url)), seconds=5)
    await dispatcher.wake(job_id)
    assert await redis.llen(waiting_list(priority)) == 1
    await redis.delete(waiting_list(priority))
    await as_if_sent_long_ago(redis, job_id)
    assert await dispatcher.reconcile() == {job_id: "dispatch"}
    assert await redis.llen(waiting_list(priority)) == 1


async def test_a_paused_job_is_looked_at_no_more_until_it_is_resumed(
    dispatcher: Dispatcher, sender: Sender, redis: Redis, job_id: str
):
    jobs = Jobs(redis, n_cap=64, max_lora_rank=32)
    await dispatcher.wake(job_id)
    await jobs.grant("pause", job_id)
    assert await dispatcher.reconcile() == {}
    await jobs.grant("resume", job_id)
    assert await dispatcher.reconcile() == {job_id: "dispatch"}
    assert sender.sent == [job_id, job_id]


async def test_a_worker_that_dies_while_it_pauses_leaves_a_paused_job(
    dispatcher: Dispatcher, sender: Sender, redis: Redis, job_id: str
):
    await redis.hset(job_key(job_id), mapping={"state": "running", "lease_until": "1", "attempts": 3, "pause": 1})
    assert await dispatcher.reconcile() == {job_id: "paused"}
    assert await redis.smembers(OPEN_JOBS) == set()
    assert sender.sent == []


async def test_attempts_that_ended_in_a_pause_are_no_failed_ones(dispatcher: Dispatcher, redis: Redis, job_id: str):
    await redis.hset(job_key(job_id), mapping={"state": "running", "lease_until": "1", "attempts": 7, "parked": 5})
    assert await dispatcher.reconcile() == {job_id: "dispatch"}


async def test_F26_whatever_was_before_the_clock_was_set_back_is_over(clocked_redis: ClockedRedis, sender: Sender):
    """A reconciler that died then, and a message that was lost then, are not waited for an hour long."""
    async with open_redis(clocked_redis.url) as redis:
        await redis.hset(LEDGER_COUNTS, "default", "100")
        job_id = (await Jobs(redis, n_cap=64, max_lora_rank=32).submit(job_spec())).job_id
        one, other = (Dispatcher(redis, sender, seconds=30) for _ in range(2))
        assert await one.reconcile() == {job_id: "dispatch"}
        assert await other.reconcile() == {}
        clocked_redis.set_clock(-3600)
        assert await other.reconcile() == {job_id: "dispatch"}
        assert await other.reconcile() == {job_id: "wait"}

"""Waking workers: a message that carries the job id alone, and the loop that repairs what messages lose.

Owns: the Celery producer and its time limits, the reconciler (reliability.md 1.5). Does not own: jobs (jobs.py)
nor their lease (worker/lease.py). A message may be delivered twice, late or never; the claim decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Literal, cast
from urllib.parse import urlsplit

from celery import Celery
from kombu.exceptions import OperationalError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from bon_algos.contracts import (
    BROKER_PREFIX,
    DISTILL_QUEUES,
    DISTILL_TASK,
    JOB_LUA,
    OPEN_JOBS,
    RECONCILER_LEASE,
    JobPriority,
    job_events_key,
    job_key,
)
from bon_algos.crash_points import crash_point
from service.errors import StoreFull, StoreUnavailable
from service.leadership import Leadership
from service.store import translated

MAX_ATTEMPTS: Final = 3
CONNECT_SECONDS: Final = 1.0
SEND_SECONDS: Final = 2.0
RESEND_SECONDS: Final = 3600
"""After this a message that waits is taken for lost, whatever else waits: a copy costs one start of a worker."""
BEGUN: Final = 0
FRESH: Final = 3
"""Kombu's priorities of a message: whatever has begun is taken before all that has not, of any class. Its worker died
or left, and what it has done so far is worth nothing until it ends."""
log = logging.getLogger("bonsai.dispatch")

# KEYS: job, open jobs, the job's events, the list where its message would wait. ARGV: job id, ms a message may take,
# most attempts, ms after which a message is lost. A claim that ended in a pause counts as no attempt.
# A message that is to be sent in the future was sent before the clock was set back.
# One that was sent since the last claim is sent again only while none waits in its list: behind a long job every
# further copy would cost a worker start. Returns what the caller is to do or to log.
_INSPECT: Final = (
    JOB_LUA
    + """
local function settle(state, action)
  if state then move(KEYS[1], KEYS[3], state) end
  redis.call('SREM', KEYS[2], ARGV[1])
  return action
end
local fields = {'state', 'dispatched_at', 'attempts', 'cancel', 'last_error', 'pause', 'parked'}
local job = redis.call('HMGET', KEYS[1], unpack(fields))
local state = job[1]
if state ~= 'queued' and state ~= 'running' then return settle(nil, 'settled') end
if state == 'running' then
  if is_held(KEYS[1]) then return 'wait' end
  if job[4] == '1' then return settle('cancelled', 'cancelled') end
  if job[6] == '1' then return settle('paused', 'paused') end
  local attempts = tonumber(job[3] or 0) - tonumber(job[7] or 0)
  if attempts >= tonumber(ARGV[3]) then
    local reason = 'given up after ' .. attempts .. ' attempts: ' .. (job[5] or 'their workers died')
    redis.call('HSET', KEYS[1], 'error_code', 'dead_letter', 'error_message', reason)
    return settle('failed', 'failed')
  end
end
if job[2] then
  local since = now - tonumber(job[2])
  if since >= 0 and since < tonumber(ARGV[2]) then return 'wait' end
  if since < tonumber(ARGV[4]) and redis.call('LLEN', KEYS[4]) > 0 then return 'wait' end
end
redis.call('HSET', KEYS[1], 'dispatched_at', string.format('%.0f', now))
return 'dispatch'
"""
)

# KEYS: job. Marks a queued job as sent; 0 when there is nothing to send.
_MARK: Final = """
if redis.call('HGET', KEYS[1], 'state') ~= 'queued' then return 0 end
local t = redis.call('TIME')
redis.call('HSET', KEYS[1], 'dispatched_at', string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000)))
return 1
"""

Action = Literal["wait", "settled", "dispatch", "failed", "cancelled", "paused"]


def open_producer(redis_url: str) -> Celery:
    """The sending half of Celery: no results, no retries, every socket operation bounded."""
    producer = Celery("bonsai", broker=broker_url(redis_url), set_as_current=False)
    producer.conf.update(
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        broker_transport_options={
            "global_keyprefix": BROKER_PREFIX,
            "socket_timeout": SEND_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_keepalive": True,
            "retry_on_timeout": False,
        },
    )
    return producer


def broker_url(redis_url: str) -> str:
    """Kombu's name for the same server: `unix:///path?db=1` is `redis+socket:///path?virtual_host=1` there."""
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    query = f"?{parts.query.replace('db=', 'virtual_host=')}" if parts.query else ""
    return f"redis+socket://{parts.path}{query}"


def waiting_list(priority: JobPriority, *, begun: bool = False) -> str:
    """Where in Redis a message of that class waits, in kombu's spelling."""
    queue = f"{BROKER_PREFIX}{DISTILL_QUEUES[priority]}"
    return queue if begun else f"{queue}\x06\x16{FRESH}"


def send_job(producer: Celery, job_id: str, priority: JobPriority, begun: bool = False) -> None:
    """Put one wake-up into the queue of its class over a connection of its own: one that has been idle may be
    half-open. begun: a worker has had the job. Blocks for at most a few seconds; raises OperationalError or OSError."""
    with producer.connection_for_write() as connection:
        producer.send_task(
            DISTILL_TASK,
            args=[job_id],
            queue=DISTILL_QUEUES[priority],
            priority=BEGUN if begun else FRESH,
            connection=connection,
            retry=False,
            ignore_result=True,
        )


class Dispatcher:
    """Wakes a worker for a job, and again where that was lost."""

    def __init__(self, redis: Redis, send: Callable[[str, JobPriority, bool], None], *, seconds: float) -> None:
        """send: as `send_job`; blocking, called in a thread. seconds: between two passes of the reconciler."""
        self._redis = redis
        self._send = send
        self._seconds = seconds
        self._leadership = Leadership(redis, RECONCILER_LEASE, seconds=3 * seconds)
        self._inspect = redis.register_script(_INSPECT)
        self._mark = redis.register_script(_MARK)

    async def wake(self, job_id: str) -> None:
        """Wake a worker for a queued job, after the reply that said so. A failure is logged: the reconciler repairs
        it."""
        try:
            with translated():
                if await self._mark(keys=[job_key(job_id)]):
                    await self._deliver(job_id)
        except (StoreUnavailable, StoreFull) as error:
            log.warning("job %s was recorded but not dispatched: %s", job_id, error.message)

    async def reconcile(self) -> dict[str, Action]:
        """One pass over the open jobs: what was done with each. Nothing when another gateway holds the lease."""
        if not await self._leadership.is_ours():
            return {}
        with translated():
            actions: dict[str, Action] = {}
            for job_id in sorted(cast(set[str], await self._redis.smembers(OPEN_JOBS))):
                actions[job_id] = await self._reconcile_one(job_id)
            return actions

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            try:
                await self.reconcile()
            except (StoreUnavailable, StoreFull) as error:
                log.warning("jobs are not reconciled: %s", error.message)
            await asyncio.sleep(self._seconds)

    async def _reconcile_one(self, job_id: str) -> Action:
        priority, begun = await self._class_of(job_id)
        crash_point("reconcile.asked")
        action = cast(
            Action,
            await self._inspect(
                keys=[job_key(job_id), OPEN_JOBS, job_events_key(job_id), waiting_list(priority, begun=begun)],
                args=[job_id, int(self._seconds * 2000), MAX_ATTEMPTS, RESEND_SECONDS * 1000],
            ),
        )
        crash_point("reconcile.recorded")
        if action == "dispatch":
            log.info("job %s is woken again", job_id)
            await self._deliver(job_id)
        elif action == "failed":
            log.error("job %s is given up after %d attempts", job_id, MAX_ATTEMPTS)
        return action

    async def _class_of(self, job_id: str) -> tuple[JobPriority, bool]:
        """Its priority, which is never changed (that of a job of before there were classes is normal), and whether a
        worker has had it."""
        said, attempts = await self._redis.hmget(job_key(job_id), "priority", "attempts")
        return cast(JobPriority, said if said in DISTILL_QUEUES else "normal"), int(attempts or 0) > 0

    async def _deliver(self, job_id: str) -> None:
        priority, begun = await self._class_of(job_id)
        crash_point("dispatch.marked")
        try:
            await asyncio.to_thread(self._send, job_id, priority, begun)
            crash_point("dispatch.sent")
        except (OperationalError, RedisError, OSError) as error:
            log.warning("job %s was not dispatched: %s", job_id, type(error).__name__)
            # Not sent: the next pass need not wait for a message that does not exist.
            await self._redis.hdel(job_key(job_id), "dispatched_at")

"""What webhooks are told: each move of a job, each change of a policy's state, in OpenAI's form; and nothing else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from time import time
from typing import Any, get_args

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from bon_algos.contracts import (
    AUDIT_STREAM,
    JOB_MOVES,
    JOBS_MOVED,
    LEDGER_COUNTS,
    WEBHOOKS_READ,
    PolicyState,
    job_key,
    webhook_events_key,
)
from service.access import GATEWAY, Caller
from service.jobs import Jobs
from service.policies import Policies, PolicyChange
from service.store import open_redis
from service.tags import Tags
from service.trials import Trials
from service.webhook_events import EventType
from service.webhook_outbox import READ_AT_ONCE, Outbox
from service.webhook_reach import Reach
from service.webhook_record import WebhookRequest
from service.webhooks import Webhooks
from tests.service.records import PASSED, STUDENT, job_spec, policy
from tests.service.test_policies import SERVED, A, B, register, snapshot_of
from worker.lease import Lease, claim

pytestmark = pytest.mark.anyio
ACME = Caller("key_acme", "acme", "admin")


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with open_redis(redis_url) as client:
        await client.hset(LEDGER_COUNTS, "default", "100")
        yield client


class Told:
    """What a webhook of a tenant for all there is has in its queue."""

    def __init__(self, redis: Redis, outbox: Outbox, webhook_id: str) -> None:
        self._redis, self._outbox, self._webhook_id = redis, outbox, webhook_id

    async def events(self) -> list[dict[str, Any]]:
        await self._outbox.empty()
        rows = await self._redis.hvals(webhook_events_key(self._webhook_id))
        return sorted((json.loads(json.loads(row)["body"]) for row in rows), key=lambda event: event["id"])

    async def changes(self) -> list[tuple[str, dict[str, Any]]]:
        return [(event["type"], event["data"]) for event in await self.events()]


async def told_of(redis: Redis, by: Caller = GATEWAY) -> Told:
    webhooks = Webhooks(redis, bytes(32), Reach(private_addresses=True, plain_http=True))
    asked = WebhookRequest(name="n", url="http://127.0.0.1:1/", event_types=get_args(EventType))
    webhook, _ = await webhooks.create(asked, by)
    return Told(redis, Outbox(redis, webhooks, lambda: 0.0), webhook["id"])


def changed(policy_id: str, route: str | None, former: PolicyState | None, state: PolicyState) -> tuple[str, Any]:
    return f"bonsai.policy.{state}", {"id": policy_id, "route": route, "from": former, "to": state}


# --- jobs ------------------------------------------------------------------------------------------------


def worked_on(url: str, job_id: str, end: str) -> None:
    """What a worker writes from its claim to the end."""
    with blocking_redis.Redis.from_url(url) as client:
        own = claim(client, job_id, lease_seconds=60, worker="here:1")
        assert not isinstance(own, str)
        lease = Lease(client, job_id, own, lease_seconds=60, heartbeat_seconds=10)
        match end:
            case "succeeded":
                lease.finish_succeeded(policy(STUDENT), "{}")
            case "failed":
                lease.finish_failed("code", "why")
            case "paused":
                client.hset(job_key(job_id), "pause", "1")
                lease.park()
            case "cancelled":
                lease.finish_cancelled()


@pytest.mark.parametrize("end", ["succeeded", "failed", "paused", "cancelled"])
async def test_what_a_worker_does_to_a_job_is_told_from_its_claim_to_its_end(redis, redis_url, end):
    told = await told_of(redis)
    job_id = (await Jobs(redis, n_cap=64, max_lora_rank=32).submit(job_spec())).job_id
    worked_on(redis_url, job_id, end)
    events = await told.events()
    assert [event["type"] for event in events] == ["fine_tuning.job.running", f"fine_tuning.job.{end}"]
    assert {event["data"]["id"] for event in events} == {job_id}
    assert all(event["id"].startswith("evt_") and event["object"] == "event" for event in events)
    assert all(isinstance(event["created_at"], int) and abs(time() - event["created_at"]) < 60 for event in events)


async def test_whoever_moves_a_job_tells_of_it_in_the_same_breath(redis):
    """Every state that a job can come to, but the one it begins in, has an event of its own."""
    told = {state for moves in JOB_MOVES.values() for state in moves} - {"queued"}
    assert {f"fine_tuning.job.{state}" for state in told} <= set(get_args(EventType))
    jobs = Jobs(redis, n_cap=64, max_lora_rank=32)
    job_id = (await jobs.submit(job_spec())).job_id
    for wish in ("pause", "resume", "cancel"):
        await jobs.grant(wish, job_id)
    moves = [fields for _, fields in await redis.xrange(JOBS_MOVED)]
    assert [(one["job"], one["tenant"], one["state"]) for one in moves] == [
        (job_id, "default", state) for state in ("paused", "queued", "cancelled")
    ]


async def test_without_webhooks_nothing_is_kept(redis):
    jobs = Jobs(redis, n_cap=64, max_lora_rank=32)
    for _ in range(READ_AT_ONCE + 1):
        await jobs.grant("cancel", (await jobs.submit(job_spec())).job_id)
    webhooks = Webhooks(redis, bytes(32), Reach(private_addresses=True, plain_http=True))
    await Outbox(redis, webhooks, lambda: 0.0).empty()
    assert await redis.xlen(JOBS_MOVED) == 0
    assert [key async for key in redis.scan_iter("bonsai:webhook:*")] == []
    told = await told_of(redis)
    assert await told.events() == []


# --- policies --------------------------------------------------------------------------------------------


@pytest.fixture
async def policies(redis: Redis) -> Policies:
    await snapshot_of(redis)
    await register(redis, policy(A), policy(B))
    for policy_id in (A, B):
        await Policies(redis).record_fingerprint(policy_id, PASSED)
    return Policies(redis)


async def test_a_promotion_tells_of_who_came_and_who_left(redis, policies):
    told = await told_of(redis)
    await policies.promote(A, "default", "r", SERVED)
    await policies.promote(B, "default", "r", SERVED)
    await policies.roll_back("default")
    assert await told.changes() == [
        changed(A, "default", "candidate", "live"),
        *(changed(A, "default", "live", "retired"), changed(B, "default", "candidate", "live")),
        *(changed(A, "default", "retired", "live"), changed(B, "default", "live", "retired")),
    ]


async def test_trials_retirement_and_failure_are_told_and_what_changes_no_state_is_not(redis, policies):
    told = await told_of(redis)
    trials = Trials(redis)
    for share in (0.1, 0.2):
        await trials.start(A, "default", "canary", share, SERVED)
    await trials.stop(A, "default")
    await policies.amend(A, PolicyChange(description="candidate"), GATEWAY)
    await Tags(redis).put("candidate", A, GATEWAY)
    await policies.retire(A)
    await policies.record_fingerprint(B, PASSED.model_copy(update={"passed": False}))
    assert await told.changes() == [
        changed(A, "default", "candidate", "canary"),
        changed(A, "default", "canary", "candidate"),
        changed(A, None, "candidate", "retired"),
        changed(B, None, "candidate", "failed"),
    ]


async def test_a_failure_that_the_gateway_finds_is_told_to_the_policys_tenant(redis, policies):
    await register(redis, policy(STUDENT).model_copy(update={"tenant": "acme"}))
    theirs, ours = await told_of(redis, ACME), await told_of(redis)
    await policies.record_fingerprint(STUDENT, PASSED.model_copy(update={"passed": False}))
    assert await theirs.changes() == [changed(STUDENT, None, "candidate", "failed")]
    assert await ours.changes() == []


ODD: Sequence[dict[str, str]] = (
    {"event": "x", "tenant": "default"},
    {"event": "x", "tenant": "default", "data": "no JSON"},
    {"event": "x", "tenant": "default", "data": "7"},
    {"event": "x", "tenant": "default", "policy": A, "data": '{"before": "candidate", "after": "live"}'},
    {
        "event": "promote",
        "tenant": "default",
        "policy": A,
        "data": '{"before": {"live": null}, "after": {"live": "p"}}',
    },
)


async def test_an_entry_of_another_version_is_passed_over(redis):
    told = await told_of(redis)
    for entry in ODD:
        await redis.xadd(AUDIT_STREAM, entry)
    assert await told.events() == []
    assert await redis.get(WEBHOOKS_READ) == (await redis.xrevrange(AUDIT_STREAM, count=1))[0][0]

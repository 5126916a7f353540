"""A job's record comes first; the same submission is one job; what is final stays final."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from bon_algos.contracts import (
    AUDIT_STREAM,
    LEDGER_COUNTS,
    OPEN_JOBS,
    BonForwardKlSpec,
    BonRegressionSpec,
    JBondSpec,
    Method,
    OfflineBondSpec,
    Window,
    job_events_key,
    job_key,
    jobs_index,
    policy_key,
)
from service.access import GATEWAY, Caller
from service.audit import Entry, verified
from service.errors import (
    Conflict,
    InvalidField,
    JobNotFound,
    PolicyNotFound,
    QueueFull,
    StoreUnavailable,
    Unparseable,
)
from service.idempotency import Idempotency
from service.job_scripts import MOST_OPEN_JOBS
from service.jobs import Jobs, check_spec
from service.store import open_redis
from tests.fixtures.redis import RedisServer
from tests.service.records import BASE, STUDENT, job_spec, policy

pytestmark = pytest.mark.anyio
INTERPOLATION = Method.model_validate({"type": "interpolation", "interpolation": {"policy": STUDENT}})


@pytest.fixture
async def jobs(redis: Redis) -> Jobs:
    await redis.hset(LEDGER_COUNTS, "default", "100")
    return Jobs(redis, n_cap=64, max_lora_rank=32)


def key(header: str, body: str = "{}") -> Idempotency | None:
    return Idempotency.of(header, "POST /distill", body)


async def test_a_submitted_job_is_queued_listed_and_open(jobs: Jobs, redis: Redis):
    submitted = await jobs.submit(job_spec(seed=7))
    job = await jobs.get(submitted.job_id)
    assert (job["status"], job["fine_tuned_model"], job["error"]) == ("queued", None, None)
    assert (job["bonsai"]["phase"], job["bonsai"]["attempts"], job["bonsai"]["spec"]["seed"]) == ("queued", 0, 7)
    rows, has_more = await jobs.list(10)
    assert ([row["id"] for row in rows], has_more) == ([submitted.job_id], False)
    assert await redis.smembers(OPEN_JOBS) == {submitted.job_id}


async def test_a_job_on_an_empty_ledger_is_refused_with_the_numbers(redis: Redis):
    jobs = Jobs(redis, n_cap=64, max_lora_rank=32)
    await redis.hset(LEDGER_COUNTS, mapping={"default": "3", "other": "100"})
    with pytest.raises(InvalidField) as refused:
        await jobs.submit(job_spec())
    assert refused.value.code == "empty_ledger"
    assert refused.value.facts == {"groups_found": 3, "groups_needed": 4}
    assert await redis.zcard(jobs_index()) == 0
    assert (await jobs.submit(job_spec(route="other"))).job_id


async def test_a_policy_to_interpolate_must_be_there(jobs: Jobs, redis: Redis):
    asked = {"type": "interpolation", "interpolation": {"policy": STUDENT, "share": 0.5}}
    spec = job_spec(method=Method.model_validate(asked))
    with pytest.raises(PolicyNotFound) as refused:
        await jobs.submit(spec)
    assert refused.value.param == "method.interpolation.policy"
    await redis.hset(policy_key(STUDENT), "record", policy(STUDENT).model_dump_json())
    assert (await jobs.get((await jobs.submit(spec)).job_id))["status"] == "queued"


async def test_a_policy_whose_groups_are_wanted_must_be_there(jobs: Jobs, redis: Redis):
    spec = job_spec(window=Window(policies=(STUDENT,)))
    with pytest.raises(PolicyNotFound, match=STUDENT) as refused:
        await jobs.submit(spec)
    assert refused.value.param == "window.policies[0]"
    await redis.hset(policy_key(STUDENT), "record", policy(STUDENT).model_dump_json())
    assert (await jobs.get((await jobs.submit(spec)).job_id))["bonsai"]["spec"]["window"]["policies"] == [STUDENT]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"lora_rank": 16}, "method.bon_forward_kl.lora_rank"),
        ({"lora_alpha": 16}, "method.bon_forward_kl.lora_alpha"),
        ({}, None),
    ],
)
async def test_a_policy_to_begin_with_must_fit_the_methods_adapter(
    jobs: Jobs, redis: Redis, asked: dict[str, float], param: str | None
):
    method = {"type": "bon_forward_kl", "bon_forward_kl": asked}
    spec = job_spec(method=method, training={"start_from": STUDENT})
    with pytest.raises(PolicyNotFound) as missing:
        await jobs.submit(spec)
    assert missing.value.param == "training.start_from"
    await redis.hset(policy_key(STUDENT), "record", policy(STUDENT).model_dump_json())
    if param is None:
        assert (await jobs.get((await jobs.submit(spec)).job_id))["status"] == "queued"
        return
    with pytest.raises(InvalidField, match="give the method the policy's") as refused:
        await jobs.submit(spec)
    assert refused.value.param == param


@pytest.mark.parametrize("policy_id", [STUDENT, BASE])
async def test_a_policy_to_begin_with_has_an_adapter(jobs: Jobs, redis: Redis, policy_id: str):
    full = policy(policy_id) if policy_id == BASE else policy(policy_id).model_copy(update={"kind": "full"})
    await redis.hset(policy_key(policy_id), "record", full.model_dump_json())
    with pytest.raises(InvalidField, match="name a LoRA policy") as refused:
        await jobs.submit(job_spec(training={"start_from": policy_id}))
    assert refused.value.param == "training.start_from"


async def test_the_same_key_and_body_are_one_job(jobs: Jobs, redis: Redis):
    first = await jobs.submit(job_spec(), key("k"))
    await redis.delete(LEDGER_COUNTS)  # A replay is answered whatever has become of the ledger since.
    second = await jobs.submit(job_spec(), key("k"))
    assert (second.job_id, first.is_replayed, second.is_replayed) == (first.job_id, False, True)
    assert await redis.zcard(jobs_index()) == 1


async def test_F44_a_job_whose_spec_is_of_another_version_is_shown_as_it_was_written(jobs: Jobs, redis: Redis):
    submitted, other = await jobs.submit(job_spec(seed=7)), await jobs.submit(job_spec())
    newer = {**job_spec(seed=7).model_dump(mode="json"), "colour": "green", "method": {"type": "dreaming"}}
    await redis.hset(job_key(submitted.job_id), "spec", json.dumps(newer))
    rows, _ = await jobs.list(10)
    assert {row["id"] for row in rows} == {submitted.job_id, other.job_id}
    job = await jobs.get(submitted.job_id)
    assert (job["bonsai"]["spec"], job["method"], job["seed"]) == (newer, {"type": "dreaming"}, 7)
    assert job["training_file"] == "ledger:default"
    assert (await jobs.grant("cancel", submitted.job_id))["status"] == "cancelled"


async def test_D36_a_tenant_has_so_many_open_jobs_and_no_more(jobs: Jobs, redis: Redis):
    await redis.hset(LEDGER_COUNTS, "acme/default", "100")
    first = await jobs.submit(job_spec(), key("first"))
    for _ in range(MOST_OPEN_JOBS - 1):
        last = await jobs.submit(job_spec())
    with pytest.raises(QueueFull):
        await jobs.submit(job_spec(), key("another"))
    assert (await jobs.submit(job_spec(), key("first"))).job_id == first.job_id
    await jobs.submit(job_spec(), by=GATEWAY._replace(tenant="acme"))
    await jobs.grant("cancel", last.job_id)
    # The key of what was refused is free.
    assert not (await jobs.submit(job_spec(), key("another"))).is_replayed


async def test_D36_paused_jobs_come_back_only_where_there_is_room(jobs: Jobs):
    """Or whoever submits, pauses and submits again would resume any number of them."""
    paused = await jobs.submit(job_spec())
    await jobs.grant("pause", paused.job_id)
    for _ in range(MOST_OPEN_JOBS):
        last = await jobs.submit(job_spec())
    with pytest.raises(QueueFull):
        await jobs.grant("resume", paused.job_id, idempotency=key("again"))
    assert (await jobs.get(paused.job_id))["status"] == "paused"
    await jobs.grant("cancel", last.job_id)
    assert (await jobs.grant("resume", paused.job_id, idempotency=key("again")))["status"] == "queued"


async def test_the_same_key_with_another_body_is_refused(jobs: Jobs, redis: Redis):
    await jobs.submit(job_spec(), key("k"))
    with pytest.raises(InvalidField) as refused:
        await jobs.submit(job_spec(seed=1), key("k", '{"seed": 1}'))
    assert refused.value.code == "idempotency_conflict"
    assert await redis.zcard(jobs_index()) == 1


async def test_without_a_key_every_submission_is_a_new_job(jobs: Jobs):
    assert (await jobs.submit(job_spec())).job_id != (await jobs.submit(job_spec())).job_id


@pytest.mark.parametrize("header", ["", "k" * 256, "schlüssel", "two words", "nul\0"])
async def test_a_key_that_is_no_key_is_unparseable(header: str):
    with pytest.raises(Unparseable):
        key(header)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 65}, "n"),
        ({"method": Method(type="bon_forward_kl", bon_forward_kl=BonForwardKlSpec(n=65))}, "method.bon_forward_kl.n"),
        ({"method": Method(type="offline_bond", offline_bond=OfflineBondSpec(n=65))}, "method.offline_bond.n"),
        ({"method": Method(type="jbond", jbond=JBondSpec(lora_rank=64))}, "method.jbond.lora_rank"),
        ({"window": Window(since=1001.0)}, "window.since"),
        ({"window": Window(since=900.0, until=900.0)}, "window.until"),
        ({"window": Window(policies=(STUDENT, STUDENT))}, "window.policies"),
        ({"window": Window(policies=(STUDENT,)), "method": Method(type="bond")}, "window.policies"),
        *(
            (
                {
                    "window": Window(policies=(STUDENT,)),
                    "method": Method(type="bon_regression", bon_regression=BonRegressionSpec(quantiles=quantiles)),
                },
                "window.policies",
            )
            for quantiles in ("monte_carlo", "learned_law", "learned_head")
        ),
        ({"training": {"weights": "full"}, "method": Method(type="jbond")}, "training.weights"),
        ({"training": {"weights": "full", "start_from": STUDENT}}, "training.start_from"),
        ({"training": {"accumulation": 17}}, "training.accumulation"),
        ({"training": {"precision": "float32"}, "method": INTERPOLATION}, "training"),
    ],
)
async def test_a_spec_beyond_this_installation_names_the_field(changes: dict[str, object], param: str):
    with pytest.raises(InvalidField) as refused:
        check_spec(job_spec(**changes), n_cap=64, max_lora_rank=32, now=1000.0)
    assert refused.value.param == param


async def test_a_queued_job_is_cancelled_at_once(jobs: Jobs, redis: Redis):
    job_id = (await jobs.submit(job_spec())).job_id
    job = await jobs.grant("cancel", job_id)
    assert (job["status"], job["bonsai"]["phase"]) == ("cancelled", "done")
    assert job["finished_at"] >= job["created_at"]
    assert await redis.smembers(OPEN_JOBS) == set()
    events, _ = await jobs.events(job_id, 10)
    assert [event["data"]["status"] for event in events] == ["queued", "cancelled"]


async def test_a_running_job_is_asked_to_stop_and_asked_again_is_no_error(jobs: Jobs, redis: Redis):
    job_id = (await jobs.submit(job_spec())).job_id
    await redis.hset(job_key(job_id), "state", "running")
    assert (await jobs.grant("cancel", job_id))["status"] == "running"
    assert (await jobs.grant("cancel", job_id))["status"] == "running"
    assert await redis.hget(job_key(job_id), "cancel") == "1"


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
async def test_a_finished_job_cannot_be_cancelled(jobs: Jobs, redis: Redis, state: str):
    job_id = (await jobs.submit(job_spec())).job_id
    await redis.hset(job_key(job_id), "state", state)
    with pytest.raises(Conflict) as refused:
        await jobs.grant("cancel", job_id)
    assert refused.value.code == "job_finished"
    assert (await jobs.get(job_id))["status"] == state


@pytest.mark.parametrize("job_id", ["job_" + "0" * 32, "*", "../x", "job_", "j" * 100_000])
async def test_an_unknown_job_is_not_found(jobs: Jobs, job_id: str):
    for question in (jobs.get(job_id), jobs.grant("cancel", job_id), jobs.events(job_id, 10)):
        with pytest.raises(JobNotFound):
            await question


async def test_jobs_are_listed_newest_first_page_by_page(jobs: Jobs):
    ids = [(await jobs.submit(job_spec())).job_id for _ in range(5)]
    first, more = await jobs.list(2)
    second, _ = await jobs.list(2, after=first[-1]["id"])
    last, none = await jobs.list(2, after=second[-1]["id"])
    assert [job["id"] for job in [*first, *second, *last]] == ids[::-1]
    assert (more, none) == (True, False)
    with pytest.raises(InvalidField):
        await jobs.list(2, after="job_unknown")


async def test_events_go_on_after_a_cursor(jobs: Jobs, redis: Redis):
    job_id = (await jobs.submit(job_spec())).job_id
    await redis.delete(job_events_key(job_id))
    for step in range(5):
        await redis.xadd(job_events_key(job_id), {"phase": "training", "step": step, "metrics": '{"loss": NaN}'})
    first, more = await jobs.events(job_id, 3)
    rest, none = await jobs.events(job_id, 3, after=first[-1]["id"])
    assert [event["data"]["step"] for event in [*first, *rest]] == [0, 1, 2, 3, 4]
    assert (more, none) == (True, False)
    # JSON has no NaN: the reply could not be rendered with it.
    assert first[0]["data"]["metrics"] == {"loss": None}
    for cursor in ("abc", "-1-1", "1" * 30 + "-0", "9" * 19 + "-0"):
        with pytest.raises(InvalidField):
            await jobs.events(job_id, 3, after=cursor)


async def test_what_a_worker_wrote_is_what_the_caller_sees(jobs: Jobs, redis: Redis):
    job_id = (await jobs.submit(job_spec())).job_id
    await redis.hset(
        job_key(job_id),
        mapping={
            **{"state": "failed", "phase": "done", "step": 3, "steps": 10, "metrics": '{"loss": 0.5}', "attempts": 3},
            **{"seconds_left": "", "started_at": "1.5", "finished_at": "2.5", "error_code": "x", "error_message": "y"},
        },
    )
    job = await jobs.get(job_id)
    seen = job["bonsai"]
    assert (job["status"], seen["step"], seen["steps"], seen["attempts"]) == ("failed", 3, 10, 3)
    assert (seen["seconds_left"], seen["started_at"], job["finished_at"]) == (None, 1.5, 2)
    assert (seen["metrics"], job["error"]) == ({"loss": 0.5}, {"code": "x", "message": "y", "param": None})


async def entries(redis: Redis) -> list[dict[str, str]]:
    """The audit, found whole."""
    found = cast("list[Entry]", await redis.xrange(AUDIT_STREAM))
    verified(found)
    return [dict(fields) for _, fields in found]


async def asked_of_jobs(redis: Redis) -> list[tuple[str, ...]]:
    return [tuple(one[name] for name in ("event", "by", "tenant", "job")) for one in await entries(redis)]


async def test_the_audit_tells_once_who_asked_for_what(jobs: Jobs, redis: Redis):
    ann, bob = Caller("key_ann", "acme", "trainer"), Caller("key_bob", "acme", "admin")
    await redis.hset(LEDGER_COUNTS, "acme/default", "100")
    for _ in range(2):
        job_id = (await jobs.submit(job_spec(), key("k"), ann)).job_id
    for _ in range(2):
        await jobs.grant("pause", job_id, bob, key("p"))
    with pytest.raises(Conflict):
        await jobs.grant("pause", job_id, bob)
    await jobs.grant("resume", job_id, ann)
    await redis.hset(job_key(job_id), "state", "running")
    for wish in ("pause", "pause", "resume", "cancel", "cancel"):
        await jobs.grant(wish, job_id, bob)
    with pytest.raises(JobNotFound):
        await jobs.grant("cancel", job_id, Caller("key_eve", "default", "admin"))
    assert await asked_of_jobs(redis) == [
        ("job_submit", "key_ann", "acme", job_id),
        ("job_pause", "key_bob", "acme", job_id),
        ("job_resume", "key_ann", "acme", job_id),
        # Of the running one.
        ("job_pause", "key_bob", "acme", job_id),
        ("job_resume", "key_bob", "acme", job_id),
        ("job_cancel", "key_bob", "acme", job_id),
    ]


async def test_what_many_ask_for_at_once_is_one_chain(jobs: Jobs, redis: Redis):
    submitted = await asyncio.gather(*(jobs.submit(job_spec()) for _ in range(12)))
    await asyncio.gather(*(jobs.grant("cancel", one.job_id) for one in submitted))
    told = sorted((one["event"], one["job"]) for one in await entries(redis))
    ids = sorted(one.job_id for one in submitted)
    assert told == [(event, job) for event in ("job_cancel", "job_submit") for job in ids]


@pytest.mark.parametrize("asked", ["submit", "pause", "resume", "cancel"])
async def test_nothing_is_changed_without_an_entry_that_follows_the_newest(asked, jobs: Jobs, redis: Redis):
    """Every script is given the entry that follows a digest of before the newest entry."""
    job_id = (await jobs.submit(job_spec())).job_id
    if asked == "resume":
        await jobs.grant("pause", job_id)
    before, told = await redis.hgetall(job_key(job_id)), await entries(redis)

    class OutOfDate(Redis):
        async def xrevrange(self, *_: Any, **__: Any) -> list[Any]:
            return []

    async with OutOfDate(connection_pool=redis.connection_pool) as late:
        others = Jobs(late, n_cap=64, max_lora_rank=32)
        with pytest.raises(StoreUnavailable):
            await (others.submit(job_spec()) if asked == "submit" else others.grant(asked, job_id))
    assert (await redis.hgetall(job_key(job_id)), await entries(redis)) == (before, told)
    assert await redis.zrange(jobs_index("default"), 0, -1) == [job_id]


async def test_redis_away_is_503_and_says_so(own_redis: RedisServer):
    async with open_redis(own_redis.url) as client:
        jobs = Jobs(client, n_cap=64, max_lora_rank=32)
        own_redis.kill()
        with pytest.raises(StoreUnavailable):
            await jobs.submit(job_spec())

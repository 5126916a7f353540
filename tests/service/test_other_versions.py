"""F44: a record of the registry of a newer gateway is no crash here: 503 that says so, and nothing is changed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from bon_algos.contracts import LEDGER_COUNTS, POLICIES_INDEX, Window, experiment_key, policy_key, route_key
from service.access import GATEWAY
from service.catalogue import Catalogue
from service.errors import Unavailable
from service.experiment_store import Experiments
from service.jobs import Jobs
from service.policies import Policies
from service.store import open_redis
from service.trials import Trials
from tests.fixtures.gateway import World
from tests.service.records import BASE, STUDENT, job_spec, policy, route
from tests.service.test_circle_stops import as_canary
from tests.service.test_experiment_store import arms
from tests.service.test_policies import SERVED, A, B, register, snapshot_of
from tests.service.test_tenants import put
from tests.service.turning import FIRST, Turning, turning

__all__ = ["turning"]

pytestmark = pytest.mark.anyio
NEWER = {"colour": "green"}


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with open_redis(redis_url) as client:
        await Catalogue(client, policy(BASE), route()).refresh()
        await register(client, policy(A), policy(B), policy(STUDENT))
        await client.hset(LEDGER_COUNTS, "default", "100")
        await Experiments(client).put("default", arms(("base", 16, 9000), (A, 1, 1000)), await snapshot_of(client))
        yield client


async def of_newer_version(redis: Redis, called: str) -> None:
    """One more member in the route, its experiment, or the policies but the base."""
    if called == "policy":
        for policy_id in (A, STUDENT):
            row = json.loads(await redis.hget(policy_key(policy_id), "record") or "")
            await redis.hset(policy_key(policy_id), "record", json.dumps(row | NEWER))
        return
    key = route_key("default") if called == "route" else experiment_key("default")
    await redis.set(key, json.dumps(json.loads(await redis.get(key) or "") | NEWER))


def submission(redis: Redis, **changes: object) -> Awaitable[object]:
    return Jobs(redis, n_cap=64, max_lora_rank=32).submit(job_spec(**changes))


@pytest.mark.parametrize(
    ("called", "ask"),
    [
        ("policy", lambda redis: Policies(redis).retire(A)),
        ("policy", lambda redis: submission(redis, window=Window(policies=(STUDENT,)))),
        ("route", lambda redis: Policies(redis).promote(A, "default", "r", SERVED)),
        ("route", lambda redis: Trials(redis).stop(A, "default")),
        ("route", lambda redis: submission(redis, training={"start_from": STUDENT})),
        ("experiment", lambda redis: Experiments(redis).get("default")),
        ("experiment", lambda redis: Experiments(redis).stop("default")),
    ],
)
async def test_what_needs_such_a_record_is_refused_and_changes_nothing(
    called: str, ask: Callable[[Redis], Awaitable[object]], redis: Redis
):
    await of_newer_version(redis, called)
    kept = {key: await redis.dump(key) for key in await redis.keys()}
    with pytest.raises(Unavailable) as refused:
        await ask(redis)
    assert refused.value.code == f"{called}_of_other_version"
    assert {key: await redis.dump(key) for key in await redis.keys()} == kept


def newer(row: object) -> str:
    return json.dumps(json.loads(str(row)) | NEWER)


def test_over_http_it_is_503(world: World, store: blocking_redis.Redis):
    assert put(world.client, "/routes/newer", {}).status == 201
    store.set(route_key("newer"), newer(store.get(route_key("newer"))))
    reply = put(world.client, "/routes/newer", {})
    assert (reply.status, reply.json["error"]["code"]) == (503, "route_of_other_version")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/lineage"), ("GET", "/report"), ("GET", "/export"), ("POST", "/retire"), ("DELETE", "")],
)
def test_a_policy_that_this_gateway_cannot_read_is_not_said_to_be_none(still_world: World, method: str, path: str):
    with blocking_redis.Redis.from_url(still_world.redis_url) as store:
        store.hset(policy_key(A), "record", newer(policy(A).model_dump_json()))
        store.zadd(POLICIES_INDEX, {A: 1.0})
    reply = still_world.client.request(method, f"/policies/{A}{path}")
    assert (reply.status, reply.json["error"]["code"]) == (503, "policy_of_other_version")
    assert still_world.client.request(method, f"/policies/{B}{path}").status == 404


async def test_the_circle_of_such_a_policy_waits_and_its_driver_goes_on(turning: Turning):
    await as_canary(turning)
    await turning.circles.stop("default", "enough", GATEWAY)
    kept = await turning.redis.hget(policy_key(FIRST), "record")
    assert kept is not None
    await turning.redis.hset(policy_key(FIRST), "record", json.dumps(json.loads(kept) | NEWER))
    waiting = await turning.look()
    assert (waiting.turn is None, "of another version" in waiting.reason) == (False, True)
    await turning.redis.hset(policy_key(FIRST), "record", kept)
    assert (await turning.look()).turn is None

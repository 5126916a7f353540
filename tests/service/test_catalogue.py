"""The hot path's snapshot: there from the start, fresh within a second, kept when Redis goes away."""

from __future__ import annotations

import asyncio
from dataclasses import FrozenInstanceError
from time import time

import pytest

from bon_algos.contracts import POLICIES_INDEX, Experiment, ExperimentArm, experiment_key, policy_key, route_key
from service.catalogue import Catalogue, Snapshot
from service.errors import Conflict, InvalidField, PolicyNotFound, RouteNotFound, StoreUnavailable
from service.experiment_store import Experiments
from service.routing import RouteRequest, Routes, route_object
from service.store import open_redis
from tests.fixtures.redis import RedisServer
from tests.service.records import BASE, REWARD_MODEL, STUDENT, policy, route
from tests.service.test_experiments import STUDENT_ARM, TEACHER_ARM

pytestmark = pytest.mark.anyio


async def until(condition, seconds: float = 10.0) -> None:
    """Wait until it holds, or fail."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_before_redis_has_answered_the_base_policy_serves_the_default_route(own_redis: RedisServer):
    own_redis.kill()
    async with open_redis(own_redis.url) as redis:
        catalogue = Catalogue(redis, policy(BASE), route())
        with pytest.raises(StoreUnavailable):
            await catalogue.refresh()
        assert catalogue.snapshot.route("default") == route()
        assert catalogue.snapshot.policy(BASE).state == "live"
        assert catalogue.snapshot.age(time()) > 1e9  # Redis has never answered.
        own_redis.start()
        snapshot = await catalogue.refresh()
        assert (snapshot.route("default"), await redis.get(route_key("default"))) == (
            route(),
            route().model_dump_json(),
        )


async def test_starting_does_not_undo_what_an_operator_changed(redis_url: str):
    async with open_redis(redis_url) as redis:
        await redis.set(route_key("default"), route().model_copy(update={"default_n": 4}).model_dump_json())
        snapshot = await Catalogue(redis, policy(BASE), route()).refresh()
        assert snapshot.route("default").default_n == 4


@pytest.mark.slow
async def test_the_last_snapshot_goes_on_serving_without_redis_and_recovers(own_redis: RedisServer):
    async with open_redis(own_redis.url) as redis:
        catalogue = Catalogue(redis, policy(BASE), route())
        running = asyncio.create_task(catalogue.run())
        await until(lambda: catalogue.snapshot.read_at > 0)
        own_redis.kill()
        await until(lambda: catalogue.snapshot.age(time()) > 1.5)
        assert catalogue.snapshot.route("default") == route()
        own_redis.start()
        await until(lambda: catalogue.snapshot.age(time()) < 1)
        running.cancel()


async def test_a_snapshot_somebody_holds_does_not_change(redis_url: str):
    async with open_redis(redis_url) as redis:
        catalogue = Catalogue(redis, policy(BASE), route())
        held = await catalogue.refresh()
        catalogue.set_served([BASE])
        await redis.hset(policy_key(STUDENT), "record", policy(STUDENT).model_dump_json())
        await redis.zadd(POLICIES_INDEX, {STUDENT: 1})
        after = await catalogue.refresh()
        assert (held.served, set(held.policies)) == (frozenset(), {BASE})
        assert (after.served, set(after.policies)) == (frozenset({BASE}), {BASE, STUDENT})
        with pytest.raises(FrozenInstanceError):
            held.served = frozenset()  # type: ignore[misc]


async def test_a_policy_registered_a_moment_ago_is_found(redis_url: str):
    async with open_redis(redis_url) as redis:
        catalogue = Catalogue(redis, policy(BASE), route())
        await catalogue.refresh()
        await redis.hset(policy_key(STUDENT), "record", policy(STUDENT).model_dump_json())
        await redis.zadd(POLICIES_INDEX, {STUDENT: 1})
        assert (await catalogue.policy(STUDENT)).id == STUDENT
        with pytest.raises(PolicyNotFound):
            await catalogue.policy("pol-" + "9" * 16)


async def test_an_unreadable_record_hides_itself_and_nothing_else(redis_url: str):
    async with open_redis(redis_url) as redis:
        await redis.hset(policy_key(STUDENT), "record", '{"id": "of another version"}')
        await redis.zadd(POLICIES_INDEX, {STUDENT: 1})
        snapshot = await Catalogue(redis, policy(BASE), route()).refresh()
        assert set(snapshot.policies) == {BASE}


# --- routes ----------------------------------------------------------------------------------------------


async def test_a_route_is_created_changed_and_deleted(redis_url: str):
    async with open_redis(redis_url) as redis:
        routes = Routes(redis, reward_model=REWARD_MODEL, n_cap=64, max_tokens=32)
        catalogue = Catalogue(redis, policy(BASE), route())
        made, is_new = await routes.put("chat", RouteRequest(default_n=4), BASE)
        assert (made.default_n, made.max_tokens, made.base_policy, is_new) == (4, 32, BASE, True)
        _, is_new = await routes.put("chat", RouteRequest(default_n=8, quorum=2), BASE)
        assert not is_new
        assert (await catalogue.refresh()).route("chat").quorum == 2
        await routes.delete("chat")
        with pytest.raises(RouteNotFound):
            (await catalogue.refresh()).route("chat")
        with pytest.raises(RouteNotFound):
            await routes.delete("chat")


async def test_a_change_of_a_route_keeps_its_live_policy(redis_url: str):
    async with open_redis(redis_url) as redis:
        promoted = route(live_policy=STUDENT).model_copy(update={"previous_policies": (None,)})
        await Catalogue(redis, policy(BASE), promoted).refresh()
        routes = Routes(redis, reward_model=REWARD_MODEL, n_cap=64, max_tokens=32)
        changed, _ = await routes.put("default", RouteRequest(default_n=2), BASE)
        assert (changed.live_policy, changed.previous_policies, changed.default_n) == (STUDENT, (None,), 2)
        with pytest.raises(Conflict):
            await routes.delete("default")


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (RouteRequest(n_cap=65), "n_cap"),
        (RouteRequest(n_cap=4, default_n=5), "default_n"),
        (RouteRequest(default_n=2, quorum=65), "quorum"),
        (RouteRequest(base_policy=STUDENT), "base_policy"),
        (RouteRequest(reward_model="../rm"), "reward_model"),
    ],
)
async def test_a_route_this_installation_cannot_serve_is_refused(redis_url: str, request_: RouteRequest, param: str):
    async with open_redis(redis_url) as redis:
        routes = Routes(redis, reward_model=REWARD_MODEL, n_cap=64, max_tokens=32)
        with pytest.raises(InvalidField) as refused:
            await routes.put("chat", request_, BASE)
        assert refused.value.param == param


async def test_a_route_with_a_running_experiment_is_not_deleted(redis_url: str):
    async with open_redis(redis_url) as redis:
        catalogue = Catalogue(redis, policy(BASE), route())
        arms = (ExperimentArm(arm=TEACHER_ARM, weight=5000), ExperimentArm(arm=STUDENT_ARM, weight=5000))
        running = Experiment(id="exp_1", route="default", salt="s", arms=arms, created_at=0)
        await redis.set(experiment_key("default"), running.model_dump_json())
        snapshot = await catalogue.refresh()
        assert snapshot.running("default") == running
        assert route_object(snapshot.route("default"), snapshot)["experiment"] == "exp_1"
        routes = Routes(redis, reward_model=REWARD_MODEL, n_cap=64, max_tokens=32)
        with pytest.raises(Conflict):
            await routes.delete("default")
        await Experiments(redis).stop("default")
        assert (await catalogue.refresh()).running("default") is None
        await routes.delete("default")
        assert await redis.exists(experiment_key("default")) == 0


def test_a_snapshot_knows_no_route_it_was_not_told():
    with pytest.raises(RouteNotFound):
        Snapshot(routes={}, policies={}).route("default")

"""What an experiment must satisfy, and when a change keeps it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from bon_algos.contracts import PolicyRecord
from service.catalogue import Catalogue
from service.errors import Conflict, ExperimentNotFound, InvalidField, RouteNotFound
from service.experiment_store import ArmRequest, ExperimentRequest, Experiments
from service.policies import Policies
from service.store import open_redis
from tests.service.records import BASE, manifest, policy, route
from tests.service.test_policies import SERVED, A, B, register, snapshot_of

pytestmark = pytest.mark.anyio


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with open_redis(redis_url) as client:
        await Catalogue(client, policy(BASE), route()).refresh()
        await register(client, policy(A), policy(B))
        yield client


def arms(*entries: tuple[str, int, int]) -> ExperimentRequest:
    return ExperimentRequest(arms=tuple(ArmRequest(policy=name, n=n, weight=weight) for name, n, weight in entries))


async def test_an_experiment_resolves_its_names_once(redis: Redis):
    await Policies(redis).promote(A, "default", "r", SERVED)
    started = await Experiments(redis).put(
        "default", arms(("base", 16, 9000), ("live", 1, 1000)), await snapshot_of(redis)
    )
    assert [str(entry.arm) for entry in started.arms] == [f"{BASE}:16", f"{A}:1"]
    assert (await snapshot_of(redis)).running("default") == started


async def test_a_ramp_up_keeps_salt_and_id_and_anything_else_does_not(redis: Redis):
    experiments, snapshot = Experiments(redis), await snapshot_of(redis)
    first = await experiments.put("default", arms(("base", 16, 9000), (A, 1, 1000)), snapshot)
    raised = await experiments.put("default", arms((A, 1, 5000), ("base", 16, 5000)), snapshot)
    assert (raised.id, raised.salt) == (first.id, first.salt)
    assert [entry.weight for entry in raised.arms] == [5000, 5000]
    other = await experiments.put("default", arms(("base", 16, 5000), (B, 1, 5000)), snapshot)
    assert other.id != first.id
    assert other.salt != first.salt
    await experiments.stop("default")
    again = await experiments.put("default", arms(("base", 16, 5000), (B, 1, 5000)), snapshot)
    assert again.id != other.id


async def test_an_experiment_is_stopped_once(redis: Redis):
    experiments = Experiments(redis)
    with pytest.raises(ExperimentNotFound):
        await experiments.stop("default")
    await experiments.put("default", arms(("base", 16, 9000), (A, 1, 1000)), await snapshot_of(redis))
    stopped = await experiments.stop("default")
    described = await experiments.describe(stopped)
    assert (described["status"], described["arms"][1]["exposures"]) == ("stopped", 0)
    assert stopped.salt not in json.dumps(described)
    with pytest.raises(Conflict):
        await experiments.stop("default")


@pytest.mark.parametrize(
    ("entries", "param"),
    [
        ([("base", 16, 5000), (A, 1, 4999)], "arms"),
        ([("base", 16, 5000), ("base", 16, 5000)], "arms[1]"),
        ([("base", 16, 5000), (BASE, 16, 5000)], "arms[1]"),
        ([("base", 65, 5000), (A, 1, 5000)], "arms[0].n"),
        ([("base", 16, 5000), (A, 0, 5000)], "arms[1].n"),
        ([("base", 16, 5000), ("pol-" + "9" * 16, 1, 5000)], "arms[1].policy"),
        ([("base", 16, 5000), ("live", 1, 5000)], "arms[1].policy"),
        ([("base", 16, 5000), ("../../etc", 1, 5000)], "arms[1].policy"),
    ],
)
async def test_an_experiment_that_makes_no_sense_names_the_field(
    redis: Redis, entries: list[tuple[str, int, int]], param: str
):
    with pytest.raises(InvalidField) as refused:
        await Experiments(redis).put("default", arms(*entries), await snapshot_of(redis))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("record", "served"),
    [
        (policy(A, state="retired"), SERVED),
        (policy(A, state="failed"), SERVED),
        (policy(A).model_copy(update={"tainted": True}), SERVED),
        (policy(A, written=manifest(A).model_copy(update={"base_policy_id": B})), SERVED),
        (policy(A), frozenset({BASE})),
    ],
)
async def test_an_arm_must_be_usable_of_this_base_and_served(
    redis: Redis, record: PolicyRecord, served: frozenset[str]
):
    await register(redis, record)
    with pytest.raises(InvalidField) as refused:
        await Experiments(redis).put(
            "default", arms(("base", 16, 5000), (A, 1, 5000)), await snapshot_of(redis, served)
        )
    assert refused.value.param == "arms[1].policy"


async def test_an_experiment_needs_its_route(redis: Redis):
    with pytest.raises(RouteNotFound):
        await Experiments(redis).put("nowhere", arms(("base", 16, 5000), ("base", 4, 5000)), await snapshot_of(redis))

"""A policy is served only after the engine proved that it serves it; never base weights under its name."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis

from bon_algos.contracts import (
    POLICIES_DELETED,
    Experiment,
    ExperimentArm,
    Trial,
    experiment_key,
)
from service.artefacts import directory_of
from service.catalogue import Catalogue, Snapshot
from service.errors import EngineUnavailable, StoreUnavailable
from service.publishing import Publisher, wanted_policies
from service.store import open_redis
from tests.fixtures.redis import RedisServer
from tests.service.published import COMPLETIONS
from tests.service.publishers import OneEngine, candidate, catalogue, engine, make_publisher, publisher
from tests.service.records import BASE, STUDENT, numbered, policy, route
from tests.service.test_experiments import STUDENT_ARM, TEACHER_ARM
from tests.service.test_policies import register

pytestmark = pytest.mark.anyio
__all__ = ["catalogue", "engine", "publisher"]


# --- loading, serving, restarting ------------------------------------------------------------------------


async def test_a_candidate_is_loaded_probed_served_and_recorded(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    policy_id = await candidate(redis, catalogue, tmp_path)
    assert catalogue.snapshot.served == frozenset()
    await publisher.reconcile()
    record = catalogue.snapshot.policy(policy_id)
    assert record.manifest is not None
    assert engine.adapters == {policy_id: str(tmp_path.resolve() / "policies" / record.manifest.digest)}
    assert catalogue.snapshot.served == {BASE, policy_id}
    assert record.fingerprint is not None
    assert record.fingerprint.passed
    assert record.state == "candidate"


async def test_what_is_shown_as_served_shows_its_fingerprint(
    publisher: Publisher, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    policy_id = await candidate(redis, catalogue, tmp_path)
    reconciling = asyncio.create_task(publisher.reconcile())
    seen: set[tuple[bool, bool]] = set()
    while not reconciling.done():
        snapshot = catalogue.snapshot
        seen.add((policy_id in snapshot.served, snapshot.policy(policy_id).fingerprint is not None))
        await asyncio.sleep(0)
    await reconciling
    assert (True, False) not in seen


async def test_the_base_under_the_policys_name_is_seen_and_refused(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    """The engine accepts the adapter and answers with the base's log-probs, as when a load silently does nothing."""
    engine.distance = 0.0
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publisher.reconcile()
    assert catalogue.snapshot.served == {BASE}
    assert engine.adapters == {}
    assert catalogue.snapshot.policy(policy_id).state == "failed"
    await publisher.reconcile()
    assert engine.adapters == {}


async def test_after_a_restart_nothing_is_served_before_it_proved_itself_again(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publisher.reconcile()
    engine.restart()
    engine.is_broken = True
    await publisher.reconcile()
    assert catalogue.snapshot.served == {BASE}
    engine.is_broken = False
    probes = engine.num_probes
    await publisher.reconcile()
    assert catalogue.snapshot.served == {BASE, policy_id}
    assert engine.num_probes == probes + len(COMPLETIONS)


async def test_a_restart_into_other_weights_is_refused(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publisher.reconcile()
    engine.restart()
    engine.distance = 0.25
    await publisher.reconcile()
    assert catalogue.snapshot.served == {BASE}
    assert catalogue.snapshot.policy(policy_id).state == "failed"


async def test_an_engine_that_was_out_of_reach_proves_itself_again(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    """It may have restarted, and another gateway may have loaded the same name: the list alone shows nothing."""
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publisher.reconcile()
    engine.is_away = True
    with pytest.raises(EngineUnavailable):
        await publisher.reconcile()
    engine.is_away, engine.distance = False, 0.0
    await publisher.reconcile()
    assert catalogue.snapshot.served == {BASE}
    assert catalogue.snapshot.policy(policy_id).state == "failed"


async def test_an_adapter_found_loaded_is_probed_before_it_is_served(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    """A gateway that restarts beside a running engine."""
    policy_id = await candidate(redis, catalogue, tmp_path)
    record = catalogue.snapshot.policy(policy_id)
    assert record.manifest is not None
    engine.adapters[policy_id] = str(directory_of(tmp_path.resolve(), record.manifest))
    await publisher.reconcile()
    assert catalogue.snapshot.served == {BASE, policy_id}
    assert engine.num_probes == len(COMPLETIONS)


async def test_an_adapter_the_engine_does_not_take_is_failed_with_its_reason(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    engine.refusal = "LoRA rank 64 is greater than max_lora_rank 32"
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publisher.reconcile()
    record = catalogue.snapshot.policy(policy_id)
    assert record.fingerprint is not None
    assert (record.state, record.fingerprint.reason) == ("failed", engine.refusal)


async def test_an_engine_that_does_not_answer_is_asked_again_and_fails_nobody(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    engine.is_broken = True
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publisher.reconcile()
    assert catalogue.snapshot.served == {BASE}
    assert catalogue.snapshot.policy(policy_id).state == "candidate"
    engine.is_broken = False
    await publisher.reconcile()
    assert policy_id in catalogue.snapshot.served


# --- without Redis, and without a need -------------------------------------------------------------------


async def test_without_redis_an_engine_that_restarts_is_loaded_again(
    own_redis: RedisServer, engine: OneEngine, tmp_path: Path
):
    async with open_redis(own_redis.url) as redis:
        catalogue = Catalogue(redis, policy(BASE), route())
        policy_id = await candidate(redis, catalogue, tmp_path)
        publisher = make_publisher(engine, catalogue, redis, tmp_path)
        await publisher.reconcile()
        own_redis.kill()
        engine.restart()
        await publisher.reconcile()
        assert catalogue.snapshot.served == {BASE, policy_id}


async def test_what_was_proven_while_redis_was_away_is_recorded_when_it_is_back(
    own_redis: RedisServer, engine: OneEngine, tmp_path: Path
):
    async with open_redis(own_redis.url) as redis:
        catalogue = Catalogue(redis, policy(BASE), route())
        policy_id = await candidate(redis, catalogue, tmp_path)
        publisher = make_publisher(engine, catalogue, redis, tmp_path)
        own_redis.kill()
        with pytest.raises(StoreUnavailable):
            await publisher.reconcile()
        assert catalogue.snapshot.served == {BASE, policy_id}
        own_redis.start()
        await publisher.reconcile()
        assert catalogue.snapshot.policy(policy_id).fingerprint is not None


async def test_adapters_that_are_not_policies_are_nobodys_business(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    """A job's rollouts load adapters of their own into the same engine."""
    engine.adapters["pol-" + "e" * 16] = "a rollout's"
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publisher.reconcile()
    assert set(engine.adapters) == {"pol-" + "e" * 16, policy_id}
    assert catalogue.snapshot.served == {BASE, policy_id}


async def test_a_policy_nobody_points_at_stays_while_there_is_room_and_one_that_is_tainted_does_not(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publisher.reconcile()
    for changes, served in (({"state": "retired"}, {BASE, policy_id}), ({"tainted": True}, {BASE})):
        await register(redis, catalogue.snapshot.policy(policy_id).model_copy(update=changes))
        await catalogue.refresh()
        await publisher.reconcile()
        assert catalogue.snapshot.served == served
    assert engine.adapters == {}


async def test_what_was_deleted_leaves_an_engine_also_by_a_gateway_that_never_knew_it(
    publisher: Publisher, engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    deleted, rollout = numbered(8), "rollout-of-a-job"
    await redis.zadd(POLICIES_DELETED, {deleted: time.time()})
    policy_id = await candidate(redis, catalogue, tmp_path)
    engine.adapters = {deleted: str(tmp_path / "policies" / "gone"), rollout: "elsewhere"}
    await publisher.reconcile()
    assert engine.adapters.keys() == {policy_id, rollout}
    assert engine.served == {BASE, policy_id}


def test_slots_go_to_live_then_experiments_then_roll_back_then_the_newest_candidates():
    live, former, old, new = (numbered(i) for i in range(4))
    arms = (ExperimentArm(arm=TEACHER_ARM, weight=5000), ExperimentArm(arm=STUDENT_ARM, weight=5000))
    records = [
        policy(BASE), policy(live, state="live"), policy(former, state="retired"), policy(STUDENT),
        policy(old, created_at=1), policy(new, created_at=2), policy(numbered(9), state="failed"),
    ]  # fmt: skip
    snapshot = Snapshot(
        routes={"default": route(live_policy=live).model_copy(update={"previous_policies": (None, former)})},
        policies={record.id: record for record in records},
        experiments={"default": Experiment(id="e", route="default", salt="s", arms=arms, created_at=0)},
    )
    assert wanted_policies(snapshot) == [live, STUDENT, former, new, old]


def test_what_is_canary_or_shadow_of_a_route_is_wanted_before_what_a_roll_back_would_need():
    canary, shadow, former = (numbered(number) for number in (1, 2, 3))
    trials = {
        stage: Trial(id=stage, policy=policy_id, share=0.1, salt="s", since=0)
        for stage, policy_id in (("canary", canary), ("shadow", shadow))
    }
    tried = route().model_copy(update={**trials, "previous_policies": (former,)})
    records = [policy(canary, state="canary"), policy(shadow, state="shadow"), policy(former, state="retired")]
    snapshot = Snapshot(routes={"default": tried}, policies={record.id: record for record in records})
    assert wanted_policies(snapshot) == [canary, shadow, former]


async def test_a_stopped_experiments_arm_loses_its_slot(redis: Redis, catalogue: Catalogue):
    arms = (ExperimentArm(arm=TEACHER_ARM, weight=5000), ExperimentArm(arm=STUDENT_ARM, weight=5000))
    running = Experiment(id="e", route="default", salt="s", arms=arms, created_at=0)
    await catalogue.refresh()
    await register(redis, policy(STUDENT, state="retired"))
    await redis.set(experiment_key("default"), running.model_dump_json())
    assert wanted_policies(await catalogue.refresh()) == [STUDENT]
    await redis.set(experiment_key("default"), running.model_copy(update={"stopped_at": 1.0}).model_dump_json())
    assert wanted_policies(await catalogue.refresh()) == []

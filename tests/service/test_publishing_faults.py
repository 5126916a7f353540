"""What engines do to a publisher: restarts, lies, refusals, slots that run short, requests that are in the way.

Rows of the fault matrix: F9 (adapters forgotten), F10 (an adapter that cannot be loaded).
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from redis.asyncio import Redis

from bon_algos.contracts import POLICIES_INDEX
from service.artefacts import directory_of
from service.catalogue import Catalogue
from service.errors import EngineUnavailable
from service.observed import OTHER_FILES, REFUSED_PAUSE_SECONDS
from service.publishers import Publishers
from service.publishing import Publisher
from service.residency import DRAIN_SECONDS, LIFETIMES
from service.store import open_redis
from tests.service.published import COMPLETIONS, safetensors, write_policy
from tests.service.publishers import PROVE_EVERY, OneEngine, make_publishers
from tests.service.records import BASE, policy, route
from tests.service.test_policies import register

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Fleet(NamedTuple):
    """Two engines with two slots each, time that the test makes, and what the gateway knows."""

    engines: tuple[OneEngine, OneEngine]
    publishers: Publishers
    catalogue: Catalogue
    redis: Redis
    clock: Clock
    root: Path

    @property
    def first(self) -> tuple[OneEngine, Publisher]:
        return self.engines[0], self.publishers.each[0]

    @property
    def second(self) -> tuple[OneEngine, Publisher]:
        return self.engines[1], self.publishers.each[1]

    async def register(self, number: int, **changes: object) -> str:
        """A policy of its own; the higher its number the newer."""
        written = write_policy(self.root, {"adapter_model.safetensors": safetensors(bytes([number] * 16))})
        record = policy(written.policy_id, fingerprint=None, created_at=float(number), written=written)
        await self.change(record.id, record.model_copy(update=changes))
        return record.id

    async def change(self, policy_id: str, record=None, **changes: object) -> None:
        await self.catalogue.refresh()
        await register(self.redis, record or self.catalogue.snapshot.policy(policy_id).model_copy(update=changes))
        await self.catalogue.refresh()

    async def settle(self, rounds: int = 3) -> None:
        for _ in range(rounds):
            for publisher in self.publishers.each:
                await publisher.reconcile()

    def directory(self, policy_id: str) -> Path:
        manifest = self.catalogue.snapshot.policy(policy_id).manifest
        assert manifest is not None
        return directory_of(self.root.resolve(), manifest)


@pytest.fixture
async def fleet(redis_url: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with open_redis(redis_url) as redis:
        catalogue, clock = Catalogue(redis, policy(BASE), route()), Clock()
        await catalogue.refresh()
        engines = OneEngine("policy-0"), OneEngine("policy-1")
        publishers = make_publishers(engines, catalogue, redis, tmp_path, clock)
        yield Fleet(engines, publishers, catalogue, redis, clock, tmp_path)


# --- lives -----------------------------------------------------------------------------------------------


async def test_f9_another_start_is_another_life_though_the_list_is_the_same(fleet: Fleet):
    """A gateway beside us loaded the same name before we looked."""
    engine, publisher = fleet.first
    engine.started_at = 1.0
    student = await fleet.register(1)
    await publisher.reconcile()
    engine.started_at, engine.is_broken = 2.0, True
    await publisher.reconcile()
    assert engine.served == {BASE}
    engine.is_broken = False
    await publisher.reconcile()
    assert engine.served == {BASE, student}
    assert engine.num_probes == 2 * len(COMPLETIONS)


async def test_out_of_reach_and_back_in_the_same_life_proves_nothing_twice(fleet: Fleet):
    engine, publisher = fleet.first
    engine.started_at = 1.0
    student = await fleet.register(1)
    await publisher.reconcile()
    engine.is_away = True
    with pytest.raises(EngineUnavailable):
        await publisher.reconcile()
    engine.is_away = False
    await publisher.reconcile()
    assert engine.served == {BASE, student}
    assert engine.num_probes == len(COMPLETIONS)


async def test_what_another_gateway_unloaded_takes_no_proof_from_the_rest(fleet: Fleet):
    engine, publisher = fleet.first
    engine.started_at = 1.0
    gone, stays = await fleet.register(1), await fleet.register(2)
    await publisher.reconcile()
    await fleet.change(gone, state="retired")
    del engine.adapters[gone]
    await publisher.reconcile()
    assert engine.served == {BASE, stays}
    assert engine.num_probes == 2 * len(COMPLETIONS)


# --- proofs ----------------------------------------------------------------------------------------------


async def test_a_replica_that_begins_to_lie_is_found_out_and_serves_the_policy_no_more(fleet: Fleet):
    liar, publisher = fleet.first
    student = await fleet.register(1)
    await fleet.settle()
    liar.distance = 0.0
    fleet.clock.now += PROVE_EVERY
    await fleet.settle()
    assert [engine.served for engine in fleet.engines] == [{BASE}, {BASE, student}]
    assert liar.adapters == {}
    assert fleet.catalogue.snapshot.served == {BASE, student}
    # What the engine keeps of other weights under this name may be mixed with ours: not again in this life.
    liar.distance = 0.5
    fleet.clock.now += PROVE_EVERY
    await fleet.settle()
    assert liar.served == {BASE}
    liar.started_at = 5.0
    publisher.observed.lost_sight()
    await fleet.settle()
    assert liar.served == {BASE, student}


async def test_a_proof_that_cannot_be_made_anew_runs_out(fleet: Fleet):
    engine, publisher = fleet.first
    student = await fleet.register(1)
    await publisher.reconcile()
    engine.is_broken = True
    for rounds in range(1, int(LIFETIMES) + 1):
        assert engine.served == {BASE, student}
        fleet.clock.now = 1000.0 + rounds * PROVE_EVERY
        await publisher.reconcile()
    assert engine.served == {BASE}


async def test_a_name_that_is_listed_and_not_known_is_loaded_again(fleet: Fleet):
    engine, publisher = fleet.first
    student = await fleet.register(1)
    engine.adapters[student] = str(fleet.directory(student))
    engine.unservable = {student}
    await publisher.reconcile()
    assert engine.served == {BASE}
    assert engine.adapters == {}
    engine.unservable = set()
    await publisher.reconcile()
    assert engine.served == {BASE, student}


async def test_a_name_that_requests_were_told_is_unknown_has_to_prove_itself_again(fleet: Fleet):
    engine, publisher = fleet.first
    student = await fleet.register(1)
    await publisher.reconcile()
    engine.serve(engine.served - {student})  # As a replica does that was answered 404.
    await publisher.reconcile()
    assert engine.served == {BASE, student}
    assert engine.num_probes == 2 * len(COMPLETIONS)


async def test_other_files_under_a_policys_name_are_never_served_and_the_name_is_not_used_again_there(fleet: Fleet):
    """An engine's prefix cache goes by the name: what it computed with the other files stays in it."""
    engine, publisher = fleet.first
    student = await fleet.register(1)
    engine.adapters[student] = "/tmp/somebody's"
    await fleet.settle()
    assert [one.served for one in fleet.engines] == [{BASE}, {BASE, student}]
    assert engine.adapters == {}
    assert publisher.observed[student].reason == OTHER_FILES
    assert fleet.catalogue.snapshot.policy(student).state == "candidate"


async def test_an_engine_with_another_base_serves_nothing_once_another_one_agrees_with_the_trainer(fleet: Fleet):
    other, publisher = fleet.first
    other.distance, other.base_distance = 3.0, 3.0
    await fleet.register(1)
    await publisher.reconcile()
    assert not other.has_other_base, "nobody knows yet who is right"
    await fleet.settle()
    assert [engine.has_other_base for engine in fleet.engines] == [True, False]
    other.distance, other.base_distance = 0.5, 0.0
    other.started_at = 2.0
    publisher.observed.lost_sight()
    await fleet.settle()
    assert not other.has_other_base


# --- files, and engines that do not take them ------------------------------------------------------------


async def test_f10_what_one_engine_cannot_load_the_other_serves_and_it_is_tried_again_later(fleet: Fleet):
    full, publisher = fleet.first
    full.refusal = "No space left on device"
    student = await fleet.register(1)
    await fleet.settle()
    assert [engine.served for engine in fleet.engines] == [{BASE}, {BASE, student}]
    assert publisher.observed[student].reason == full.refusal
    full.refusal = None
    await fleet.settle()
    assert full.served == {BASE}
    fleet.clock.now += REFUSED_PAUSE_SECONDS
    await fleet.settle()
    assert full.served == {BASE, student}


async def test_files_that_are_not_there_yet_fail_nobody(fleet: Fleet):
    engine, publisher = fleet.first
    student = await fleet.register(1)
    aside = fleet.root / "aside"
    shutil.move(fleet.directory(student), aside)
    await publisher.reconcile()
    assert fleet.catalogue.snapshot.policy(student).state == "candidate"
    shutil.move(aside, fleet.directory(student))
    await publisher.reconcile()
    assert engine.served == {BASE, student}


async def test_a_directory_that_is_a_link_out_of_the_root_reaches_no_engine(fleet: Fleet):
    engine, publisher = fleet.first
    student = await fleet.register(1)
    outside = fleet.root.parent / f"{fleet.root.name}-outside"
    shutil.move(fleet.directory(student), outside)
    fleet.directory(student).symlink_to(outside)
    await fleet.settle()
    assert engine.adapters == {}
    assert "not a plain directory" in publisher.observed[student].reason
    assert fleet.catalogue.snapshot.policy(student).state == "failed"


async def test_a_records_directory_is_not_where_the_files_are_looked_for(fleet: Fleet):
    """The digest alone says where: a record that points elsewhere has no say."""
    engine, publisher = fleet.first
    student = await fleet.register(1, directory="../../etc")
    await publisher.reconcile()
    assert engine.adapters == {student: str(fleet.directory(student))}


# --- slots -----------------------------------------------------------------------------------------------


async def test_slots_that_run_short_go_from_the_least_recently_used_that_nothing_points_at(fleet: Fleet):
    engine, publisher = fleet.first
    old, used = await fleet.register(1), await fleet.register(2)
    await publisher.reconcile()
    for name, moment in ((old, 5.0), (used, 9.0)):
        await fleet.change(name, state="retired")
        engine.used_at[name] = moment
    newest = await fleet.register(3)
    most: list[int] = []
    for _ in range(3):
        await publisher.reconcile()
        most.append(len(engine.adapters))
    assert set(engine.adapters) == {used, newest}
    assert engine.served == {BASE, used, newest}
    assert max(most) <= 2


async def test_an_adapter_with_requests_under_way_leaves_when_they_have_ended_or_have_had_their_time(fleet: Fleet):
    engine, publisher = fleet.first
    busy, other = await fleet.register(1), await fleet.register(2)
    await publisher.reconcile()
    for name in (busy, other):
        await fleet.change(name, state="retired")
        engine.calls[name] = 1
    await fleet.register(3)
    await fleet.register(4)
    await publisher.reconcile()
    assert engine.served == {BASE}, "new requests go elsewhere"
    assert set(engine.adapters) == {busy, other}, "those under way go on"
    engine.calls[other] = 0
    await publisher.reconcile()
    assert set(engine.adapters) == {busy}
    fleet.clock.now += DRAIN_SECONDS
    await publisher.reconcile()
    assert busy not in engine.adapters


async def test_a_policy_that_is_in_the_registry_no_more_leaves(fleet: Fleet):
    engine, publisher = fleet.first
    student = await fleet.register(1)
    await publisher.reconcile()
    await fleet.redis.zrem(POLICIES_INDEX, student)
    await fleet.catalogue.refresh()
    await publisher.reconcile()
    assert engine.served == {BASE}
    assert engine.adapters == {}


async def test_what_is_wanted_again_while_it_is_drained_is_served_again(fleet: Fleet):
    engine, publisher = fleet.first
    for number in (1, 2):
        await fleet.register(number)
    await publisher.reconcile()
    first, second = engine.adapters
    for name in (first, second):
        await fleet.change(name, state="retired")
        engine.calls[name] = 1
    newcomer = await fleet.register(3)
    await publisher.reconcile()
    assert len(engine.served) == 2
    await fleet.change(newcomer, tainted=True)
    await publisher.reconcile()
    assert engine.served == {BASE, first, second}

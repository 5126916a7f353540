"""Promotion and roll-back: what moves a pointer, what refuses to, and what is left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest
from redis.asyncio import Redis

from bon_algos.contracts import AUDIT_STREAM, POLICIES_INDEX, PolicyRecord, policy_key
from service.audit import Audit
from service.catalogue import Catalogue, Snapshot
from service.errors import Conflict, InvalidField, PolicyNotFound, RouteNotFound
from service.idempotency import Idempotency
from service.policies import Policies, policy_object
from service.preconditions import Precondition, etag, version_of
from service.publishing import wanted_policies
from service.routing import RouteRequest, Routes
from service.store import open_redis
from tests.service.records import BASE, PASSED, REWARD_MODEL, manifest, numbered, policy, route

pytestmark = pytest.mark.anyio
A, B, C = numbered(1), numbered(2), numbered(3)
SERVED = frozenset({BASE, A, B, C})


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with open_redis(redis_url) as client:
        await Catalogue(client, policy(BASE), route()).refresh()
        yield client


@pytest.fixture
async def policies(redis: Redis) -> Policies:
    await register(redis, *(policy(policy_id, created_at=i) for i, policy_id in enumerate((A, B, C))))
    return Policies(redis)


async def register(redis: Redis, *records: PolicyRecord) -> None:
    for record in records:
        await redis.hset(policy_key(record.id), mapping={"record": record.model_dump_json(), "version": 1})
        await redis.zadd(POLICIES_INDEX, {record.id: record.created_at})


async def snapshot_of(redis: Redis, served: frozenset[str] = SERVED) -> Snapshot:
    catalogue = Catalogue(redis, policy(BASE), route())
    catalogue.set_served(served)
    return await catalogue.refresh()


async def states(redis: Redis, ids: Sequence[str] = (A, B, C)) -> list[str]:
    snapshot = await snapshot_of(redis)
    return [snapshot.policy(policy_id).state for policy_id in ids]


async def test_promoting_moves_the_pointer_the_states_and_the_audit_together(policies: Policies, redis: Redis):
    assert (await policies.promote(A, "default", "measured by hand", SERVED)).live_policy == A
    promoted = await policies.promote(B, "default", "better", SERVED)
    assert (promoted.live_policy, promoted.previous_policies) == (B, (None, A))
    assert await states(redis) == ["retired", "live", "candidate"]
    entries = cast("list[tuple[str, dict[str, str]]]", await redis.xrange(AUDIT_STREAM))
    assert [(entry["event"], entry["policy"]) for _, entry in entries] == [("promote", A), ("promote", B)]
    told = json.loads(entries[1][1]["data"])
    assert (told["before"]["live"], told["after"]["live"], told["reason"]) == (A, B, "better")


async def test_rolling_back_goes_the_same_way_to_the_base_and_no_further(policies: Policies, redis: Redis):
    await policies.promote(A, "default", "r", SERVED)
    await policies.promote(B, "default", "r", SERVED)
    assert (await policies.roll_back("default")).live_policy == A
    assert await states(redis) == ["live", "retired", "candidate"]
    restored = await policies.roll_back("default")
    assert (restored.live_policy, restored.previous_policies) == (None, ())
    assert await states(redis) == ["retired", "retired", "candidate"]
    with pytest.raises(Conflict) as refused:
        await policies.roll_back("default")
    assert refused.value.code == "nothing_to_roll_back"


async def test_of_two_who_roll_back_what_both_saw_one_succeeds(policies: Policies, redis: Redis):
    await policies.promote(A, "default", "r", SERVED)
    seen = await policies.promote(B, "default", "r", SERVED)
    both = Precondition(frozenset({etag(version_of(seen))}))
    back = [policies.roll_back("default", precondition=both) for _ in range(2)]
    ends = await asyncio.gather(*back, return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["PreconditionFailed", "Route"]
    assert (await snapshot_of(redis)).route("default").live_policy == A


async def test_P30_a_policy_is_retired_once(policies: Policies, redis: Redis):
    assert (await policies.retire(A)).state == "retired"
    with pytest.raises(Conflict) as refused:
        await policies.retire(A)
    assert refused.value.code == "policy_retired"
    assert await redis.xlen(AUDIT_STREAM) == 1


async def test_rolling_back_passes_over_what_has_failed_since(policies: Policies, redis: Redis):
    for policy_id in (A, B, C):
        await policies.promote(policy_id, "default", "r", SERVED)
    await policies.record_fingerprint(B, PASSED.model_copy(update={"passed": False, "reason": "other weights"}))
    assert (await policies.roll_back("default")).live_policy == A
    assert await states(redis) == ["live", "failed", "retired"]


async def test_that_a_policy_failed_stands_in_the_audit_of_its_own_tenant(redis: Redis):
    own = manifest(A).model_copy(update={"tenant": "acme"}).as_candidate()
    await register(redis, own)
    await Policies(redis).record_fingerprint(A, PASSED.model_copy(update={"passed": False, "reason": "other weights"}))
    entries, _ = await Audit(redis).page("acme", 10, None)
    assert [(entry["event"], entry["by"], entry["about"]) for entry in entries] == [
        ("policy_failed", "gateway", {"policy": A})
    ]
    assert await Audit(redis).page("default", 10, None) == ([], False)


async def test_a_policy_that_is_live_elsewhere_is_not_retired(policies: Policies, redis: Redis):
    await Routes(redis, reward_model=REWARD_MODEL, n_cap=64, max_tokens=8).put("other", RouteRequest(), BASE)
    await policies.promote(A, "default", "r", SERVED)
    await policies.promote(A, "other", "r", SERVED)
    await policies.promote(B, "other", "r", SERVED)
    assert await states(redis) == ["live", "live", "candidate"]
    await policies.promote(B, "default", "r", SERVED)
    assert await states(redis) == ["retired", "live", "candidate"]


@pytest.mark.parametrize(
    ("record", "served", "code"),
    [
        (policy(A, fingerprint=None), SERVED, "fingerprint_missing"),
        (policy(A, fingerprint=PASSED.model_copy(update={"passed": False})), SERVED, "fingerprint_missing"),
        (policy(A), frozenset({BASE}), "policy_not_served"),
        (policy(A, state="failed"), SERVED, "policy_unusable"),
        (policy(A).model_copy(update={"tainted": True}), SERVED, "policy_unusable"),
        (policy(A, written=manifest(A).model_copy(update={"base_policy_id": B})), SERVED, "other_base"),
        (policy(BASE), SERVED, "policy_is_base"),
    ],
)
async def test_what_may_not_go_live_says_what_to_do(
    redis: Redis, record: PolicyRecord, served: frozenset[str], code: str
):
    await register(redis, record)
    with pytest.raises(Conflict) as refused:
        await Policies(redis).promote(record.id, "default", "r", served)
    assert refused.value.code == code
    assert (await snapshot_of(redis)).route("default").live_policy is None
    assert await redis.xlen(AUDIT_STREAM) == 0


async def test_full_weights_are_for_export(redis: Redis):
    full = policy(A, written=manifest(A).model_copy(update={"kind": "full", "report": None}))
    full = full.model_copy(update={"kind": "full"})
    await register(redis, full)
    with pytest.raises(InvalidField, match="for export") as refused:
        await Policies(redis).promote(A, "default", "r", SERVED)
    assert (refused.value.status, refused.value.code) == (422, "export_only")
    assert wanted_policies(await snapshot_of(redis)) == []
    shown = policy_object(full, [], SERVED)
    assert (shown["kind"], shown["report"]) == ("full", None)


async def test_promoting_needs_a_reason_a_policy_and_a_route(policies: Policies):
    with pytest.raises(Conflict) as refused:
        await policies.promote(A, "default", "  ", SERVED)
    assert refused.value.code == "override_reason_required"
    with pytest.raises(PolicyNotFound):
        await policies.promote("pol-" + "9" * 16, "default", "r", SERVED)
    with pytest.raises(RouteNotFound):
        await policies.promote(A, "nowhere", "r", SERVED)
    await policies.promote(A, "default", "r", SERVED)
    with pytest.raises(Conflict) as refused:
        await policies.promote(A, "default", "r", SERVED)
    assert refused.value.code == "already_live"


async def test_a_repeated_request_with_its_key_moves_nothing_twice(policies: Policies):
    await policies.promote(A, "default", "r", SERVED)
    await policies.promote(B, "default", "r", SERVED)
    key = Idempotency.of("once", "POST /routes/default/rollback", "")
    first = await policies.roll_back("default", key)
    assert (await policies.roll_back("default", key)) == first
    assert first.live_policy == A
    with pytest.raises(InvalidField):
        await policies.promote(C, "default", "r", SERVED, Idempotency.of("once", "POST /policies/c/promote", ""))


async def test_promotions_at_the_same_time_leave_one_live_and_lose_none(policies: Policies, redis: Redis):
    """Every interleaving ends as some order of the three: one live, the two others retired and remembered."""
    # Connections first, so that the three really run against each other.
    await asyncio.gather(*(redis.ping() for _ in range(3)))
    await asyncio.gather(*(policies.promote(policy_id, "default", "r", SERVED) for policy_id in (A, B, C)))
    settled = (await snapshot_of(redis)).route("default")
    assert sorted(await states(redis)) == ["live", "retired", "retired"]
    assert {settled.live_policy, *settled.previous_policies} == {A, B, C, None}


async def test_a_failed_fingerprint_fails_the_policy_and_bumps_its_version(policies: Policies, redis: Redis):
    await policies.record_fingerprint(A, PASSED.model_copy(update={"passed": False, "reason": "base weights"}))
    assert await states(redis) == ["failed", "candidate", "candidate"]
    assert await redis.hget(policy_key(A), "version") == "2"


async def test_what_the_api_shows_of_a_policy(policies: Policies, redis: Redis):
    await policies.promote(A, "default", "r", SERVED)
    snapshot = await snapshot_of(redis)
    shown = policy_object(snapshot.policy(A), snapshot.routes.values(), frozenset())
    assert (shown["state"], shown["served"], shown["live_on"], shown["base_policy"]) == (
        "live",
        False,
        ["default"],
        BASE,
    )
    assert policy_object(snapshot.policy(BASE), snapshot.routes.values(), SERVED)["manifest"] is None

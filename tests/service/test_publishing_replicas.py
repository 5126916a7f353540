"""Of several engines each proves for itself what it serves: one that is wrong, away or forgetful takes no policy from
the others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from service.catalogue import Catalogue
from service.errors import EngineUnavailable
from service.publishers import Publishers
from tests.service.published import COMPLETIONS
from tests.service.publishers import OneEngine, candidate, catalogue, make_publishers
from tests.service.records import BASE

pytestmark = pytest.mark.anyio
__all__ = ["catalogue"]


@pytest.fixture
def two(catalogue: Catalogue, redis: Redis, tmp_path: Path) -> tuple[OneEngine, OneEngine, Publishers]:
    engines = OneEngine("policy-0"), OneEngine("policy-1")
    return *engines, make_publishers(engines, catalogue, redis, tmp_path)


async def test_each_engine_loads_and_proves_for_itself(two, catalogue: Catalogue, redis: Redis, tmp_path: Path):
    good, other, publishers = two
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publishers.each[0].reconcile()
    assert (good.served, other.served) == ({BASE, policy_id}, set())
    assert catalogue.snapshot.served == {BASE, policy_id}
    await publishers.each[1].reconcile()
    assert other.served == {BASE, policy_id}
    assert good.num_probes == other.num_probes == len(COMPLETIONS)


async def test_an_engine_with_other_weights_does_not_serve_and_fails_nobody(
    two, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    bad, good, publishers = two
    bad.distance = 0.0
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publishers.each[0].reconcile()
    assert catalogue.snapshot.policy(policy_id).state == "candidate"
    assert catalogue.snapshot.policy(policy_id).fingerprint is None
    await publishers.each[1].reconcile()
    assert (bad.served, bad.adapters) == ({BASE}, {})
    assert good.served == catalogue.snapshot.served == {BASE, policy_id}
    record = catalogue.snapshot.policy(policy_id)
    assert record.fingerprint is not None
    assert record.fingerprint.passed


async def test_a_policy_that_every_engine_refuses_has_failed(two, catalogue: Catalogue, redis: Redis, tmp_path: Path):
    one, other, publishers = two
    one.distance, other.refusal = 0.0, "no such layer"
    policy_id = await candidate(redis, catalogue, tmp_path)
    for publisher in publishers.each:
        await publisher.reconcile()
    assert catalogue.snapshot.policy(policy_id).state == "failed"
    assert catalogue.snapshot.served == {BASE}


async def test_files_that_are_refused_are_refused_for_all(two, catalogue: Catalogue, redis: Redis, tmp_path: Path):
    """F10: no other engine would find others; one that is away need not be waited for."""
    _, away, publishers = two
    away.is_away = True
    policy_id = await candidate(redis, catalogue, tmp_path)
    for file in tmp_path.glob("policies/*/adapter_model.safetensors"):
        file.write_bytes(b"cut")
    await publishers.each[0].reconcile()
    assert catalogue.snapshot.policy(policy_id).state == "failed"


async def test_what_an_engine_refused_it_may_take_in_its_next_life(
    two, catalogue: Catalogue, redis: Redis, tmp_path: Path
):
    bad, _, publishers = two
    bad.distance = 0.0
    policy_id = await candidate(redis, catalogue, tmp_path)
    for publisher in publishers.each:
        await publisher.reconcile()
    bad.is_away = True
    with pytest.raises(EngineUnavailable):
        await publishers.each[0].reconcile()
    bad.is_away, bad.distance = False, 0.5
    await publishers.each[0].reconcile()
    assert bad.served == {BASE, policy_id}


async def test_served_is_what_engines_in_rotation_proved(two, catalogue: Catalogue, redis: Redis, tmp_path: Path):
    holder, other, publishers = two
    policy_id = await candidate(redis, catalogue, tmp_path)
    await publishers.each[0].reconcile()
    other.refusal = "not now"
    holder.is_in_rotation = False
    await publishers.each[1].reconcile()
    assert catalogue.snapshot.served == {BASE}
    other.is_in_rotation = False  # With none left all arms of an experiment fail alike, after their exposure.
    await publishers.each[1].reconcile()
    assert catalogue.snapshot.served == {BASE, policy_id}


async def test_one_engine_forgets_and_the_other_goes_on(two, catalogue: Catalogue, redis: Redis, tmp_path: Path):
    """F9: what is proved is proved for one engine, until its next start."""
    one, other, publishers = two
    policy_id = await candidate(redis, catalogue, tmp_path)
    for publisher in publishers.each:
        await publisher.reconcile()
    one.restart()
    one.is_broken = True
    await publishers.each[0].reconcile()
    assert (one.served, other.served) == ({BASE}, {BASE, policy_id})
    assert catalogue.snapshot.served == {BASE, policy_id}
    one.is_broken = False
    await publishers.each[0].reconcile()
    assert one.served == {BASE, policy_id}

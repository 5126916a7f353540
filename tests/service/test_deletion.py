"""The end of a policy: every reason why not, the tombstone, and files that go whatever dies in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from bon_algos.contracts import LEDGER_COUNTS, POLICIES_DELETED, job_key, jobs_index, report_digest
from service.access import GATEWAY
from service.deletion import Deletion, remove_files
from service.errors import Conflict, InvalidField, PolicyNotFound, PreconditionFailed, TagNotFound
from service.experiment_store import Experiments
from service.jobs import Jobs
from service.policies import Policies, PolicyChange
from service.preconditions import Precondition
from service.tags import MAX_TAGS, Tags, checked_tag
from service.trials import Trials
from tests.service.published import write_policy
from tests.service.records import BASE, job_spec, policy
from tests.service.test_experiment_store import arms
from tests.service.test_policies import SERVED, A, B, C, policies, redis, register, snapshot_of
from worker.errors import JobFailed
from worker.lease import Lease, claim

__all__ = ["policies", "redis"]
pytestmark = pytest.mark.anyio
D = "pol-" + "d" * 16


@pytest.fixture
def deletion(redis: Redis, tmp_path: Path) -> Deletion:
    return Deletion(redis, tmp_path)


async def reasons(deletion: Deletion, policy_id: str) -> list[str]:
    with pytest.raises(Conflict) as refused:
        await deletion.delete(policy_id, GATEWAY)
    assert refused.value.code == "policy_in_use"
    found = refused.value.facts["reasons"]
    assert isinstance(found, list)
    return found


async def test_P8_what_is_live_tried_or_may_come_back_stays(policies: Policies, redis, deletion):
    await register(redis, policy(D))
    await policies.promote(A, "default", "r", SERVED)
    await policies.promote(B, "default", "r", SERVED)
    await Trials(redis).start(C, "default", "canary", 0.1, SERVED)
    await Trials(redis).start(D, "default", "shadow", 0.1, SERVED | {D})
    assert await reasons(deletion, A) == ["a roll-back of route default would need it"]
    assert await reasons(deletion, B) == ["it is live on route default"]
    assert await reasons(deletion, C) == ["it is canary on route default"]
    assert await reasons(deletion, D) == ["it is shadow on route default"]
    assert await reasons(deletion, BASE) == ["it is a base policy"]


async def test_P9_what_an_experiment_a_job_or_a_tag_needs_or_somebody_protects_stays(policies, redis, deletion):
    await Experiments(redis).put("default", arms(("base", 16, 9000), (A, 1, 1000)), await snapshot_of(redis))
    spec = job_spec(window={"policies": [A]}, method={"type": "bon_forward_kl"}).model_dump_json()
    await redis.hset(job_key("job_1"), mapping={"spec": spec, "state": "running"})
    await redis.zadd(jobs_index(), {"job_1": 1.0})
    await Tags(redis).put("prod", A, GATEWAY)
    await policies.amend(A, PolicyChange(is_protected=True))
    assert await reasons(deletion, A) == [
        "it is protected: PATCH it with is_protected false first",
        "the tag prod names it",
        "an experiment on route default shows it",
        "the job job_1 needs it",
    ]
    await Experiments(redis).stop("default")
    await redis.hset(job_key("job_1"), "state", "succeeded")
    await Tags(redis).remove("prod", GATEWAY)
    await policies.amend(A, PolicyChange(is_protected=False))
    await deletion.delete(A, GATEWAY)


async def test_F44_a_job_whose_spec_is_of_another_version_may_need_it(policies: Policies, redis, deletion):
    newer = {**job_spec().model_dump(mode="json"), "colour": "green"}
    await redis.hset(job_key("job_1"), mapping={"spec": json.dumps(newer), "state": "running"})
    await redis.zadd(jobs_index(), {"job_1": 1.0})
    assert await reasons(deletion, A) == ["the job job_1 needs it"]


async def test_the_parent_of_a_paused_job_stays_until_that_job_has_ended(policies: Policies, redis, deletion):
    await redis.hset(LEDGER_COUNTS, "default", "100")
    jobs = Jobs(redis, n_cap=64, max_lora_rank=32)
    spec = job_spec(training={"start_from": A})
    job_id = (await jobs.submit(spec)).job_id
    await jobs.grant("pause", job_id)
    assert await reasons(deletion, A) == [f"the job {job_id} needs it"]
    await jobs.grant("cancel", job_id)
    await deletion.delete(A, GATEWAY)


async def test_a_deleted_policy_is_gone_from_registry_routes_and_disk(redis, deletion, tmp_path):
    written = write_policy(tmp_path)
    await register(redis, policy(written.policy_id, written=written))
    served = SERVED | {written.policy_id}
    registry = Policies(redis)
    await register(redis, *(policy(one) for one in (A, B, C)))
    for policy_id in (written.policy_id, A, B, C):
        await registry.promote(policy_id, "default", "r", served)
    with pytest.raises(Conflict, match="roll-back"):
        await deletion.delete(written.policy_id, GATEWAY)
    await register(redis, policy(D))
    await registry.promote(D, "default", "r", served | {D})
    await deletion.delete(written.policy_id, GATEWAY)
    snapshot = await snapshot_of(redis)
    assert written.policy_id not in snapshot.policies
    assert snapshot.deleted == {written.policy_id}
    assert snapshot.route("default").previous_policies == (None, A, B, C)
    assert list((tmp_path / "policies").iterdir()) == []
    with pytest.raises(PolicyNotFound):
        await deletion.delete(written.policy_id, GATEWAY)


async def test_the_files_of_a_deletion_that_died_halfway_go_with_the_next_sweep(redis, deletion, tmp_path):
    written, kept = write_policy(tmp_path), write_policy(tmp_path, {"adapter_config.json": b"{}"})
    await redis.zadd(POLICIES_DELETED, {written.policy_id: 1.0})
    doomed = tmp_path / "policies" / written.digest
    half = tmp_path / "policies" / f".deleted-{'e' * 64}"
    half.mkdir()
    await deletion.sweep()
    assert [one.name for one in (tmp_path / "policies").iterdir()] == [kept.digest]
    outside = tmp_path / "outside"
    outside.mkdir()
    doomed.symlink_to(outside)
    remove_files(tmp_path, {written.policy_id})
    assert outside.is_dir()
    assert not doomed.is_symlink()


async def test_the_report_of_a_deleted_policy_goes_with_it(redis, deletion, tmp_path):
    written = write_policy(tmp_path)
    reported = written.model_copy(update={"report_files": {"report.json": "a" * 64}})
    (tmp_path / "policies" / written.digest / "manifest.json").write_text(reported.model_dump_json())
    own, other = (tmp_path / "reports" / name for name in (report_digest(reported.report_files), "f" * 64))
    for home in (own, other):
        home.mkdir(parents=True)
        (home / "report.json").write_text("{}")
    await redis.zadd(POLICIES_DELETED, {written.policy_id: 1.0})
    await deletion.sweep()
    assert (own.exists(), other.exists()) == (False, True)


def test_P16_a_job_that_makes_a_deleted_policy_again_fails_and_says_so(redis_url):
    with blocking_redis.Redis.from_url(redis_url) as client:
        client.hset(job_key("job_1"), mapping={"state": "queued"})
        own = claim(client, "job_1", lease_seconds=30, worker="w")
        assert not isinstance(own, str)
        client.zadd(POLICIES_DELETED, {A: 1.0})
        with Lease(client, "job_1", own, lease_seconds=30, heartbeat_seconds=10) as lease:
            with pytest.raises(JobFailed, match="was deleted") as failed:
                lease.finish_succeeded(policy(A), "{}")
            assert client.hget(job_key("job_1"), "state") == b"running"
            lease.finish_failed(failed.value.code, failed.value.message)
        assert client.hget(job_key("job_1"), "error_code") == b"policy_deleted"
        assert not client.exists(f"bonsai:policy:{A}")


# --- tags ------------------------------------------------------------------------------------------------


async def test_a_tag_moves_and_of_two_who_move_it_one_wins(policies, redis):
    tags = Tags(redis)
    assert await tags.put("prod", A, GATEWAY)
    assert not await tags.put("prod", B, GATEWAY, precondition=Precondition(frozenset({f'"{A}"'})))
    with pytest.raises(PreconditionFailed):
        await tags.put("prod", C, GATEWAY, precondition=Precondition(frozenset({f'"{A}"'})))
    assert (await snapshot_of(redis)).tags == {"prod": B}
    with pytest.raises(PolicyNotFound):
        await tags.put("prod", D, GATEWAY)
    await tags.remove("prod", GATEWAY)
    with pytest.raises(TagNotFound):
        await tags.remove("prod", GATEWAY)


async def test_P40_a_tenant_has_so_many_tags_and_no_more(policies, redis):
    tags = Tags(redis)
    for i in range(MAX_TAGS):
        await tags.put(f"t{i}", A, GATEWAY)
    with pytest.raises(Conflict) as refused:
        await tags.put("one-more", A, GATEWAY)
    assert refused.value.code == "too_many_tags"
    assert not await tags.put("t1", B, GATEWAY)


@pytest.mark.parametrize(
    "tag",
    ["latest", "base", "live", A, "pol-x", "", "Prod", "a/b", "a:b", "-a", "a" * 65, "ро1", "..", "a\n"],
)
def test_P17_P39_a_tag_is_no_word_that_means_something_else(tag):
    with pytest.raises(InvalidField):
        checked_tag(tag)

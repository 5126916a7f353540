"""What an erasure does to windows that hold something of the user, to their jobs, and to what was learned from them."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest
import redis

from bon_algos.contracts import (
    AUDIT_STREAM,
    POLICIES_INDEX,
    JobSpec,
    Method,
    PolicyRecord,
    TrainingSetup,
    job_key,
    jobs_index,
    policy_key,
)
from bonsai.registry.auditing import verified_audit
from service.access import GATEWAY
from service.deletion import Deletion
from service.store import open_redis
from tests.archive.records import archive_at
from tests.service.records import BASE
from tests.worker import world
from tests.worker.erasure import (
    ADA,
    GRANDCHILD,
    STUDENT,
    THIRD,
    UNCONCERNED,
    asked,
    client,
    erase,
    everywhere,
    frozen,
    killed_while_it_freezes,
    made,
    of,
    place,
    registered,
    submitted,
)
from worker import erased_windows
from worker.erasing import Eraser
from worker.erasures import Erasures
from worker.errors import JobFailed
from worker.lease import Lease
from worker.publish import read_published
from worker.sources import FILE

__all__ = ["client", "place"]


def test_what_an_attempt_left_that_was_killed_while_it_froze_goes_too(client, place):
    """Its job lives: the next attempt chooses anew."""
    directory, compaction = place
    aside = killed_while_it_freezes(client, directory, "job_1")
    assert ADA.encode() in everywhere(client, directory)
    submitted(client, "job_1")
    asked(client)
    (receipt,) = erase(client, directory, compaction)
    assert (receipt.state, receipt.jobs) == ("proven", ())
    assert ADA.encode() not in everywhere(client, directory)
    assert not aside.exists()
    assert client.hget(job_key("job_1"), "state") == b"running"


@pytest.mark.parametrize("kept", ["", '[["resp_'])
def test_what_was_left_without_a_list_of_its_groups_goes_whoever_it_is_of(kept, client, place):
    """A power cut may leave the content and not the list."""
    directory, compaction = place
    aside = killed_while_it_freezes(client, directory, "job_1")
    (aside / "groups.json").write_text(kept) if kept else (aside / "groups.json").unlink()
    asked(client, user="nobody")
    (receipt,) = erase(client, directory, compaction)
    assert (receipt.state, aside.exists()) == ("proven", False)


def test_what_was_left_of_others_stays(client, place):
    directory, compaction = place
    aside = killed_while_it_freezes(client, directory, "job_1")
    asked(client, user="nobody")
    (receipt,) = erase(client, directory, compaction)
    assert (receipt.state, aside.exists()) == ("proven", True)


def test_what_is_left_unfinished_is_found_by_the_search(client, place):
    directory, compaction = place
    killed_while_it_freezes(client, directory, "job_1")
    erasure = asked(client)
    compaction.flush()
    archive = archive_at(directory / "ledger")
    eraser = Eraser(client, archive, directory)
    with_it = eraser.residue(erasure)
    shutil.rmtree(directory / "jobs")
    assert eraser.residue(erasure) == with_it - 1


def test_a_window_whose_groups_were_to_be_erased_meanwhile_is_never_written(client, place):
    """The erasure may be proven before a file of it is there."""
    directory, _ = place
    asked(client)

    def check(aside):
        assert Erasures.read(client).concern(aside)
        assert [path.name for path in aside.iterdir()] == [FILE]
        raise JobFailed("window_erased", "")

    with pytest.raises(JobFailed):
        frozen(client, directory, "job_1", check=check)
    assert list((directory / "jobs" / "job_1").iterdir()) == []


def test_L23_a_job_that_reads_the_window_fails_and_what_was_learned_is_tainted(client, place):
    directory, compaction = place
    frozen(client, directory, "job_1")
    submitted(client, "job_1")
    registered(client, STUDENT, "job_1", world.BASE)
    registered(client, GRANDCHILD, "job_2", STUDENT)
    asked(client)
    (receipt,) = erase(client, directory, compaction)
    assert receipt.state == "proven"
    assert receipt.jobs == ("job_1",)
    assert receipt.policies == (STUDENT, GRANDCHILD)
    for policy_id in receipt.policies:
        assert PolicyRecord.model_validate_json(client.hget(policy_key(policy_id), "record")).tainted
    told = client.hmget(job_key("job_1"), ["state", "error_code", "epoch"])
    assert told == [b"failed", erased_windows.CODE.encode(), b"2"]
    assert not (directory / "jobs" / "job_1" / "window" / "pools.jsonl.z").exists()
    assert ADA.encode() not in everywhere(client, directory)


def succeeded(client, job_id, policy_id, start_from):
    spec = JobSpec(method=Method(type="bon_forward_kl"), training=TrainingSetup(start_from=start_from))
    fields = {"state": "succeeded", "policy_id": policy_id, "spec": spec.model_dump_json()}
    client.hset(job_key(job_id), mapping=fields)
    client.zadd(jobs_index(), {job_id: 0.0})
    registered(client, policy_id, job_id, world.BASE if start_from == "base" else start_from)


async def deleted(redis_url, directory, *policies):
    async with open_redis(redis_url) as store:
        for policy_id in policies:
            await Deletion(store, directory).delete(policy_id, GATEWAY)


def test_what_was_made_from_a_policy_that_is_deleted_since_is_found_through_the_jobs(client, place, redis_url):
    """Two generations are deleted, the third is in the registry. The user is in the window of the first alone."""
    directory, compaction = place
    frozen(client, directory, "job_1")
    succeeded(client, "job_1", STUDENT, "base")
    succeeded(client, "job_2", GRANDCHILD, STUDENT)
    succeeded(client, "job_3", THIRD, GRANDCHILD)
    succeeded(client, "job_4", UNCONCERNED, "base")
    asyncio.run(deleted(redis_url, directory, STUDENT, GRANDCHILD))
    asked(client)
    (receipt,) = erase(client, directory, compaction)
    assert (receipt.state, receipt.jobs, receipt.policies) == ("proven", ("job_1",), (THIRD,))
    kept = [PolicyRecord.model_validate_json(client.hget(policy_key(one), "record")) for one in (THIRD, UNCONCERNED)]
    assert [one.tainted for one in kept] == [True, False]


def test_a_job_whose_parent_is_tainted_while_it_trains_registers_nothing(client, place):
    """Its own window holds nothing of the user; the job is past reading it when the erasure comes."""
    directory, compaction = place
    frozen(client, directory, "job_1")
    registered(client, STUDENT, "job_1", world.BASE)
    own = submitted(client, "job_2")
    with Lease(client, "job_2", own, lease_seconds=60, heartbeat_seconds=20) as lease:
        asked(client)
        (receipt,) = erase(client, directory, compaction)
        assert receipt.policies == (STUDENT,)
        with pytest.raises(JobFailed, match="erased") as failed:
            lease.finish_succeeded(made(GRANDCHILD, "job_2", STUDENT), "{}")
        assert client.zscore(POLICIES_INDEX, GRANDCHILD) is None
        lease.finish_failed(failed.value.code, failed.value.message)
    assert client.hmget(job_key("job_2"), ["state", "error_code"]) == [b"failed", b"policy_unusable"]


def test_what_is_registered_while_its_parent_is_being_marked_is_tainted_too(client, place, redis_url):
    class Interrupted(redis.Redis):
        """Between the look at the registry and the first mark a job ends."""

        def transaction(self, *args, **kwargs):
            if client.zscore(POLICIES_INDEX, GRANDCHILD) is None:
                registered(client, GRANDCHILD, "job_2", STUDENT)
            return super().transaction(*args, **kwargs)

    registered(client, STUDENT, "job_1", world.BASE)
    with Interrupted.from_url(redis_url) as slow:
        assert erased_windows.taint(slow, frozenset({"job_1"})) == (STUDENT, GRANDCHILD)
    assert PolicyRecord.model_validate_json(client.hget(policy_key(GRANDCHILD), "record")).tainted


def test_a_job_does_not_begin_with_a_tainted_policy(client, place):
    directory, _ = place
    registered(client, STUDENT, "job_1", world.BASE)
    erased_windows.taint(client, frozenset({"job_1"}))
    with pytest.raises(JobFailed, match="erased"):
        read_published(client, directory, STUDENT, BASE)


def test_what_the_audit_tells_of_a_taint_is_told_once_and_chained(client, place, redis_url):
    directory, _ = place
    frozen(client, directory, "job_1")
    registered(client, STUDENT, "job_1", world.BASE)
    for _ in range(2):
        assert erased_windows.taint(client, frozenset({"job_1"})) == (STUDENT,)
    with redis.Redis.from_url(redis_url, decode_responses=True) as told:
        assert verified_audit(told).entries == 1
        [(_, entry)] = told.xrange(AUDIT_STREAM)
    assert (entry["event"], entry["by"], entry["policy"]) == ("policy_tainted", "worker", STUDENT)
    assert json.loads(entry["data"]) == {"state": "candidate", "reason": erased_windows.CODE}
    kept = PolicyRecord.model_validate_json(client.hget(policy_key(STUDENT), "record"))
    assert (kept.version, client.hget(policy_key(STUDENT), "version")) == (2, b"2")


def test_a_window_that_was_frozen_in_the_meantime_is_known(client, place):
    directory, _ = place
    frozen(client, directory, "job_1")
    window = directory / "jobs" / "job_1" / "window"
    assert not Erasures.read(client).concern(window)
    asked(client)
    erasures = Erasures.read(client)
    assert erasures.concern(window)
    assert [erasures.cover(one) for one in (of(ADA, 1), of("bob", 1))] == [True, False]
    assert ADA not in json.dumps((window / "groups.json").read_text())

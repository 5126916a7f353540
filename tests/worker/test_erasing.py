"""What one user left goes from stream, archive, Redis and windows, and a search of all of it finds nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import zlib
from pathlib import Path
from time import time

import pytest
import redis

from archive.fence import ALONE
from archive.merging import merge
from archive.reading import Question
from bon_algos.acceptance import Requirements
from bon_algos.contracts import (
    AUDIT_STREAM,
    ERASURES,
    LEDGER_STREAM,
    OPEN_JOBS,
    POLICIES_INDEX,
    SPOOLS,
    Erasure,
    JobSpec,
    Method,
    PolicyRecord,
    TrainingSetup,
    erasure_id,
    feedback_key,
    idempotency_key,
    job_key,
    jobs_index,
    policy_key,
    subject_digest,
)
from bon_algos.crash_points import CRASH_AT
from bonsai.registry.auditing import verified_audit
from service.access import GATEWAY
from service.deletion import Deletion
from service.store import open_redis
from tests.archive.records import archive_at, feedback, group
from tests.service.records import BASE, manifest
from tests.worker import world
from worker import attempts, erased_windows
from worker.compaction import Compaction, Limits
from worker.dataset import freeze
from worker.erasing import Eraser
from worker.erasures import Erasures
from worker.errors import JobFailed
from worker.lease import Claim, Lease, claim
from worker.publish import read_published
from worker.sources import windows

AT_ONCE = Limits(entries=3, bytes=2**20, seconds=0.0, hot_groups=3, hot_seconds=0.0)
STUDENT, GRANDCHILD, THIRD, UNCONCERNED = ("pol-" + digit * 16 for digit in "1234")
ADA = "ada@example.org"


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


def of(user, number, **fields):
    """A group whose texts hold the user's name."""
    made = group(number, user=user, session=f"of {user}", prompt=f"I am {user}", **fields)
    drawn = tuple(one.model_copy(update={"text": f"hello {user}"}) for one in made.candidates)
    return made.model_copy(update={"candidates": drawn})


@pytest.fixture
def place(client, tmp_path):
    """Three users' groups: the older in the archive, the newer in the stream. Directory, and the compaction."""
    compaction = Compaction(client, archive_at(tmp_path / "ledger"), AT_ONCE)
    compaction.open()
    ada, bob, eve = ((of(user, number), of(user, number + 10)) for number, user in enumerate((ADA, "bob", "eve")))
    world.deliver(client, ada[0], bob[0], eve[0], feedback(bob[0], 1, author=ADA, comment=f"{ADA} was here"))
    world.deliver(client, feedback(ada[0], 2, author="eve", comment=f"about {ADA}"), world.outcome(ada[0], [1.0] * 3))
    while compaction.step(wait_seconds=0.01) is not None:
        pass
    world.deliver(client, ada[1], bob[1], eve[1])
    for about, said in ((bob[0], ADA), (ada[0], "eve")):
        kept = feedback(about, author=said, comment=f"{ADA} …")
        client.hset(feedback_key(about.id), kept.question, kept.model_dump_json())
    client.set(idempotency_key("1"), f'digest {{"id": "{ada[1].id}", "completion": "hello {ADA}"}}')
    client.set(idempotency_key("2"), f'digest {{"id": "{bob[1].id}"}}')
    return tmp_path, compaction


def asked(client, user=ADA, at=None, tenant="default"):
    digest = subject_digest(tenant, user)
    erasure = Erasure(
        id=erasure_id(digest), tenant=tenant, subject_digest=digest, requested_at=at or time(), requested_by="key_a"
    )
    client.hset(ERASURES, erasure.id, erasure.model_dump_json())
    return erasure


def erase(client, directory, compaction):
    compaction.flush()
    eraser = Eraser(client, archive_at(directory / "ledger"), directory)
    return eraser.work()


def everywhere(client, directory: Path) -> bytes:
    """All that Redis and the disk hold, with what is packed unpacked."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    found = [zlib.decompress(one.read_bytes()) if one.suffix == ".z" else one.read_bytes() for one in files]
    archive = archive_at(directory / "ledger")
    question = Question(("groups", "outcomes", "feedback", "exposures"))
    found += [one.record.model_dump_json().encode() for one in archive.records(question)]
    for key in client.scan_iter("*"):
        kind = client.type(key)
        values = {
            b"string": lambda key: [client.get(key)],
            b"hash": lambda key: [part for pair in client.hgetall(key).items() for part in pair],
            b"set": client.smembers,
            b"zset": lambda key: client.zrange(key, 0, -1),
            b"stream": lambda key: [],
        }[kind](key)
        found += [key, *values]
    found += [one.model_dump_json().encode() for one in stream(client)]
    return b"\n".join(found)


def stream(client):
    from bon_algos.ledger_entries import record_of

    return [record_of(fields) for _, fields in client.xrange(LEDGER_STREAM)]


def test_nothing_of_a_user_is_left_and_all_of_the_others_is(client, place):
    directory, compaction = place
    assert ADA.encode() in everywhere(client, directory)
    asked(client)
    (receipt,) = erase(client, directory, compaction)
    assert receipt.state == "proven"
    assert (receipt.erased.groups, receipt.erased.feedback, receipt.erased.kept_replies) == (2, 2, 1)
    left = everywhere(client, directory)
    assert ADA.encode() not in left
    for user in (b"bob", b"eve"):
        assert left.count(b"I am " + user) >= 2
    assert client.exists(idempotency_key("2"))


def test_what_was_merged_holds_nothing_either(client, place):
    """Neither the file, nor those it was made of, nor one that nobody could name."""
    directory, compaction = place
    archive = archive_at(directory / "ledger")
    asked(client)
    batches = archive.manifest.read(archive.manifest.days()[0]).batches
    assert len(batches) > 1
    merge(archive, batches, ALONE, now=time())
    (first, *_) = (one for one in batches[0].segments if one.kind == "groups")
    archive.storage.put("groups/tenant=default/notes.parquet", archive.storage.get(first.path or ""))
    (receipt,) = erase(client, directory, compaction)
    assert receipt.state == "proven"
    left = everywhere(client, directory)
    assert ADA.encode() not in left
    assert left.count(b"I am bob") >= 2
    assert archive.storage.names("_quarantine") == []


def test_L21_again_finds_nothing_more(client, place):
    directory, compaction = place
    asked(client)
    (first,) = erase(client, directory, compaction)
    asked(client, at=first.requested_at)
    (again,) = erase(client, directory, compaction)
    assert again.erased.groups == 0
    assert again.state == "proven"


class Interrupted(redis.Redis):
    """Does something else once, when the first entry of the stream is to go."""

    meanwhile = None

    def execute_command(self, *args, **options):
        if args[0] == "XDEL" and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return super().execute_command(*args, **options)


def test_asked_again_in_the_middle_it_looks_again_and_what_was_found_is_told(client, place, redis_url):
    directory, compaction = place
    compaction.flush()
    first = asked(client)
    again = first.model_copy(update={"requested_at": first.requested_at + 1})
    with Interrupted.from_url(redis_url) as interrupted:
        interrupted.meanwhile = lambda: client.hset(ERASURES, again.id, again.model_dump_json())
        Eraser(interrupted, archive_at(directory / "ledger"), directory).work()
    kept = Erasure.model_validate_json(client.hget(ERASURES, first.id))
    assert (kept.state, kept.requested_at, kept.erased.groups) == ("requested", again.requested_at, 2)
    (receipt,) = erase(client, directory, compaction)
    assert (receipt.state, receipt.erased.groups) == ("proven", 2)


def test_L20_another_tenants_user_of_that_name_is_another(client, place):
    directory, compaction = place
    asked(client, tenant="acme")
    (receipt,) = erase(client, directory, compaction)
    assert receipt.erased.groups == 0
    assert ADA.encode() in everywhere(client, directory)


def test_what_the_user_does_afterwards_is_kept(client, place):
    directory, compaction = place
    asked(client, at=group(5).created_at)
    (receipt,) = erase(client, directory, compaction)
    assert receipt.erased.groups == 1
    assert [one.id for one in stream(client) if one.kind == "group" and one.user == ADA] == [of(ADA, 10).id]


def test_a_spool_that_may_hold_something_is_waited_for(client, place):
    """And what it brings meanwhile reaches no segment."""
    directory, compaction = place
    erasure = asked(client)
    client.hset(SPOOLS, "gateway", str(erasure.requested_at - 1))
    (receipt,) = erase(client, directory, compaction)
    assert (receipt.state, receipt.waits_for) == ("erased", ("gateway",))
    world.deliver(client, of(ADA, 20))
    compaction.step(wait_seconds=0.01)
    assert ADA.encode() not in everywhere(client, directory)
    client.hset(SPOOLS, "gateway", str(erasure.requested_at + 1))
    (receipt,) = erase(client, directory, compaction)
    assert receipt.state == "proven"


def test_L22_killed_in_the_middle_it_is_done_by_the_next(client, place):
    """Every call of the store is the last one once."""
    from archive.reading import Archive
    from tests.archive.records import Died, Fate, MortalStorage

    directory, compaction = place
    asked(client)
    compaction.flush()
    fate, deaths = Fate(), 0
    while True:
        archive = Archive(MortalStorage(directory / "ledger", fate))
        try:
            with fate.dying_at(deaths % 3, after=True):
                Eraser(client, archive, directory).work()
            break
        except Died:
            deaths += 1
            assert deaths < 50
    assert deaths > 0
    assert ADA.encode() not in everywhere(client, directory)


def frozen(client, directory, job_id, **options):
    """A job's window of all that is there."""
    groups = [one for one in stream(client) if one.kind == "group"]
    wanted = Requirements(world.BASE, world.REWARD_MODEL, world.TEMPLATE, num_candidates=1)
    more = [group(number, user="bob") for number in range(30, 36)]
    window = directory / "jobs" / job_id / "window"
    freeze(window, [*groups, *more], wanted, max_groups=100, held_out_fraction=0.3, **options)


def killed_while_it_freezes(client, directory, job_id):
    """What an attempt leaves that dies before its window has its name."""
    attempt = attempts.begin(directory / "jobs" / job_id, 1)
    if (pid := os.fork()) == 0:
        os.environ[CRASH_AT] = "window.written"
        try:
            frozen(client, directory, job_id, within=attempt)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    (aside,) = attempt.iterdir()
    return aside


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
        assert ADA.encode() not in b"".join(path.read_bytes() for path in aside.iterdir())
        raise JobFailed("window_erased", "")

    with pytest.raises(JobFailed):
        frozen(client, directory, "job_1", check=check)
    assert list((directory / "jobs" / "job_1").iterdir()) == []


def submitted(client, job_id) -> Claim:
    """And claimed."""
    client.hset(job_key(job_id), mapping={"state": "queued", "epoch": 0, "attempts": 0})
    client.sadd(OPEN_JOBS, job_id)
    own = claim(client, job_id, lease_seconds=60, worker="here:1")
    assert not isinstance(own, str)
    return own


def made(policy_id, job_id, parent):
    spec = JobSpec(method=Method(type="bon_forward_kl"))
    own = manifest(policy_id).model_copy(update={"job_id": job_id, "parent_policy_id": parent, "spec": spec})
    return PolicyRecord(id=policy_id, kind="lora", state="candidate", created_at=0.0, manifest=own)


def registered(client, policy_id, job_id, parent):
    record = made(policy_id, job_id, parent)
    client.hset(policy_key(policy_id), mapping={"record": record.model_dump_json(), "version": 1})
    client.zadd(POLICIES_INDEX, {policy_id: 0.0})


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


def test_what_a_shadow_said_beside_an_answer_goes_with_it_also_when_it_was_said_later(client, place):
    directory, compaction = place
    answered = of(ADA, 50)
    world.deliver(client, answered)
    erasure = asked(client)
    late = answered.model_copy(
        update={"id": f"shadow_{answered.id}", "created_at": erasure.requested_at + 1, "arm_reason": "shadow"}
    )
    world.deliver(client, late, world.outcome(late, [1.0] * 3))
    (receipt,) = erase(client, directory, compaction)
    assert receipt.state == "proven"
    assert ADA.encode() not in everywhere(client, directory)
    assert late.id.encode() not in everywhere(client, directory)


def test_a_window_that_was_frozen_in_the_meantime_is_known(client, place):
    directory, _ = place
    frozen(client, directory, "job_1")
    window = windows(directory)["job_1"]
    assert not Erasures.read(client).concern(window)
    asked(client)
    erasures = Erasures.read(client)
    assert erasures.concern(window)
    assert [erasures.cover(one) for one in (of(ADA, 1), of("bob", 1))] == [True, False]
    assert ADA not in json.dumps((window / "groups.json").read_text())

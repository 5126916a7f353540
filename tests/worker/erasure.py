"""Three users' groups in archive, stream, Redis and windows, and the erasure of one of them."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from time import time

import pytest
import redis

from archive.reading import Question
from bon_algos.acceptance import Requirements
from bon_algos.contracts import (
    ERASURES,
    LEDGER_STREAM,
    OPEN_JOBS,
    POLICIES_INDEX,
    Erasure,
    JobSpec,
    Method,
    PolicyRecord,
    erasure_id,
    feedback_key,
    idempotency_key,
    job_key,
    policy_key,
    subject_digest,
)
from bon_algos.crash_points import CRASH_AT
from tests.archive.records import archive_at, feedback, group
from tests.service.records import manifest
from tests.worker import world
from worker import attempts
from worker.compaction import Compaction, Limits
from worker.dataset import freeze
from worker.erasing import Eraser
from worker.lease import Claim, claim

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

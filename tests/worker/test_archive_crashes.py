"""A compactor that is killed at any write: the next one's turn leaves what an undisturbed one does. Real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from time import time

import pytest
import redis

from archive.fence import ALONE
from archive.merging import merge
from archive.reading import Question
from archive.writing import write_batch
from bon_algos.contracts import (
    COMPACTOR_LEASE,
    ERASURES,
    LEDGER_CONSUMERS,
    LEDGER_STREAM,
    Erasure,
    PolicyRecord,
    erasure_targets_key,
    feedback_key,
    idempotency_key,
    job_key,
    policy_key,
)
from bon_algos.crash_points import ARCHIVE_POINTS
from tests.archive.records import DAY, NOON, archive_at, entries, feedback, group
from tests.worker import world
from tests.worker.erasure import (
    ADA,
    STUDENT,
    asked,
    everywhere,
    frozen,
    killed_while_it_freezes,
    of,
    registered,
    submitted,
)
from tests.worker.mortal_compactor import LIMITS, turn
from worker.compaction import Compaction

pytestmark = pytest.mark.slow
LATER_PASSES = ("manifest.written:2", "manifest.named:3", "batch.written:2", "rewrite.written:2")
"""In an erasure's changes and not the batch's, between two segments of a batch, between two rewritten ones."""
OLD = {number: NOON + (DAY if number > 2 else 0) + number for number in range(1, 5)}


@pytest.fixture(scope="module")
def mortals(tmp_path_factory):
    """Where processes that are to die come from."""
    told = tmp_path_factory.mktemp("mortals") / "stderr"
    command = [sys.executable, "-m", "tests.worker.mortal_compactor"]
    with (
        told.open("w") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        yield process, told


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


@pytest.fixture
def erasure(client, tmp_path):
    """Two users' groups: of a day that is merged, of one that is not, in the stream. One user is to be forgotten."""
    archive = archive_at(tmp_path / "ledger")
    ada = {number: of(ADA, number, created_at=at) for number, at in OLD.items()}
    bob = {number: of("bob", 100 + number, created_at=at) for number, at in OLD.items()}
    said = feedback(bob[3], author=ADA, comment=f"{ADA} was here")
    more = {3: [said], 4: [feedback(bob[4], 1, author="eve")]}
    for number in OLD:
        write_batch(archive, entries(ada[number], bob[number], *more.get(number, ())))
    first, _ = archive.manifest.days()
    merge(archive, archive.manifest.read(first).batches, ALONE, now=time())
    client.hset(feedback_key(bob[3].id), said.question, said.model_dump_json())
    client.set(idempotency_key("1"), f'digest {{"id": "{ada[1].id}", "completion": "hello {ADA}"}}')
    world.deliver(client, of(ADA, 20), of("bob", 21))
    frozen(client, tmp_path, "job_1")
    submitted(client, "job_1")
    registered(client, STUDENT, "job_1", world.BASE)
    killed_while_it_freezes(client, tmp_path, "job_2")
    compaction = Compaction(client, archive, LIMITS)
    compaction.open()
    compaction.step(wait_seconds=0.01)
    world.deliver(client, of(ADA, 22), of("bob", 23), of("bob", 24), world.outcome(of(ADA, 20), [1.0] * 3))
    return asked(client)


def dies(mortals, point, redis_url, directory):
    process, told = mortals
    process.stdin.write(json.dumps([point, redis_url, str(directory)]) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "-9\n", f"{point} was never passed: {told.read_text()}"


@pytest.mark.parametrize("point", [*ARCHIVE_POINTS, *LATER_PASSES])
def test_a_compactor_killed_at_a_write_costs_nothing(point, mortals, client, redis_url, tmp_path, erasure):
    dies(mortals, point, redis_url, tmp_path)
    client.delete(COMPACTOR_LEASE)  # it ran out
    world.deliver(client, of("bob", 25))
    turn(redis_url, tmp_path)
    is_forgotten(client, tmp_path, erasure)
    is_whole(client, archive_at(tmp_path / "ledger"))


def is_forgotten(client, directory, erasure):
    receipt = Erasure.model_validate_json(client.hget(ERASURES, erasure.id))
    assert (receipt.state, receipt.jobs, receipt.policies) == ("proven", ("job_1",), (STUDENT,))
    assert ADA.encode() not in everywhere(client, directory)
    assert client.hmget(job_key("job_1"), ["state", "error_code"]) == [b"failed", b"window_erased"]
    assert PolicyRecord.model_validate_json(client.hget(policy_key(STUDENT), "record")).tainted
    window = directory / "jobs" / "job_1" / "window"
    assert sorted(path.name for path in window.iterdir()) == ["groups.json", "window.json"]
    assert client.ttl(erasure_targets_key(erasure.id)) > 0


def is_whole(client, archive):
    """Every row once, every file named, nothing pending; what is too old has lost its texts."""
    records = [one.record for one in archive.records(Question(("groups", "feedback", "outcomes")))]
    bobs = [of("bob", number) for number in (*(100 + number for number in OLD), 21, 23, 24, 25)]
    assert Counter(one.id for one in records) == Counter([*(one.id for one in bobs), feedback(group(104), 1).id])
    kept = {one.id for one in records if one.kind == "group" and one.prompt}
    assert kept == {of("bob", 21).id}  # in a frozen window
    assert client.xpending(LEDGER_STREAM, LEDGER_CONSUMERS)["pending"] == 0
    assert client.xlen(LEDGER_STREAM) <= len(("23", "24", "25"))
    known = [archive.manifest.read(day) for day in archive.manifest.days()]
    named = {segment.path for one in known for batch in one.batches for segment in batch.segments}
    named |= {one.path for day in known for one in day.superseded}
    files = {name for kind in ("groups", "feedback", "outcomes") for name in archive.storage.names(kind)}
    assert files == named - {None}


def test_what_was_being_written_when_a_compactor_died_is_removed(mortals, redis_url, tmp_path, erasure, client):
    dies(mortals, "content.written:2", redis_url, tmp_path)
    assert list(tmp_path.rglob(".*.part"))
    client.delete(COMPACTOR_LEASE)
    turn(redis_url, tmp_path)
    assert not list(tmp_path.rglob(".*.part"))

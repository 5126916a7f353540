"""A gateway that dies at any write: what was said yes to is there once, what was not is not there at all."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from time import time

import pytest
import redis

from bon_algos.contracts import (
    AUDIT_STREAM,
    FILES_SINCE,
    LEDGER_COUNTS,
    OPEN_JOBS,
    POLICIES_DELETED,
    POLICIES_INDEX,
    REGISTRY,
    ROUTES_INDEX,
    UNRECORDED_JOBS,
    WEBHOOKS,
    FileRecord,
    PolicyRecord,
    Route,
    files_key,
    job_events_key,
    job_key,
    jobs_index,
    policy_key,
    route_key,
    webhook_queue_key,
)
from bon_algos.crash_points import GATEWAY_POINTS
from service.dispatch import waiting_list
from service.errors import Conflict
from service.job_records import DIRECTORY, JobFile
from service.journal import FILE, read_journal
from service.lost_uploads import LOST_SECONDS
from service.replays import SLACK_SECONDS
from service.webhook_queue import CLAIM_SECONDS
from service.webhook_record import WebhookRecord
from service.webhooks import MAX_WAITING
from tests.fixtures.gateway import read_ledger
from tests.fixtures.waiting import wait_until
from tests.service import mortal
from tests.service.published import write_policy
from tests.service.receiver import Receiver
from tests.service.records import BASE, STUDENT, policy, route

pytestmark = pytest.mark.slow
QUEUE, QUEUE_OF_BEGUN = waiting_list("normal"), waiting_list("normal", begun=True)


def places(*prefixes: str) -> list[str]:
    return [point for point in GATEWAY_POINTS if point.partition(".")[0] in prefixes]


SUBMITTING = places("submit", "dispatch")
WISHING = places("wish")
RECONCILING = places("reconcile")
RECORDING = places("record")
HALF_WRITTEN = "content.written"
"""Of the archive's places: what gateways write durably passes it too."""
UPLOADING, FORGETTING, LOST = ["file.settled", "file.recorded"], ["file.forgotten"], ["content.lost"]
BEGINNING = places("seed", "journal")
TRANSACTING = places("transaction")
DELETING = places("deletion")
ANSWERING = places("reply")
LOGGING = places("spool", "drain")
TELLING = places("webhook")


def test_every_place_is_somebodys():
    tested = [*SUBMITTING, *WISHING, *RECONCILING, *RECORDING, *UPLOADING, *FORGETTING, *LOST, *BEGINNING]
    tested += [*TRANSACTING, *DELETING, *ANSWERING, *LOGGING, *TELLING]
    assert sorted(tested) == sorted(GATEWAY_POINTS)


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        connection.hset(LEDGER_COUNTS, "default", "100")
        yield connection


@pytest.fixture(scope="module")
def mortals(tmp_path_factory):
    """Where processes that are to die come from."""
    told = tmp_path_factory.mktemp("mortals") / "stderr"
    command = [sys.executable, "-m", "tests.service.mortal"]
    with (
        told.open("w") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        yield process, told


@pytest.fixture
def dies(mortals, redis_url, tmp_path):
    """dies(scenario, point): a process that plays the scenario is killed at this place."""
    process, told = mortals

    def played(scenario: str, point: str) -> None:
        process.stdin.write(json.dumps([point, scenario, redis_url, str(tmp_path)]) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "-9\n", f"{point} was never passed: {told.read_text()}"

    return played


@pytest.mark.parametrize("point", SUBMITTING)
def test_F32_a_job_is_there_once_and_somebody_is_woken_for_it(point, client, redis_url, dies):
    """The caller, who saw the connection break, asks again with the same key; the next gateway's reconciler runs."""
    dies("submit", point)
    recorded = client.zrange(jobs_index("default"), 0, -1)
    assert len(recorded) == (0 if point == "submit.asked" else 1)
    if recorded:
        # Before the caller asks again, if ever: no message depends on that.
        wait_until(lambda: asyncio.run(mortal.reconcile(redis_url)) or client.llen(QUEUE) > 0)
    job_id = asyncio.run(mortal.submit(redis_url))
    assert recorded in ([], [job_id])
    assert client.zrange(jobs_index("default"), 0, -1) == [job_id]
    assert (client.smembers(OPEN_JOBS), client.hget(job_key(job_id), "state")) == ({job_id}, "queued")
    assert (client.llen(QUEUE) >= 1, client.xlen(AUDIT_STREAM)) == (True, 1)


@pytest.fixture
def a_job(client, redis_url):
    """a_job(state, …) -> a job with these fields."""

    def submitted(**fields):
        job_id = asyncio.run(mortal.submit(redis_url))
        client.hset(job_key(job_id), mapping=fields)
        if fields.get("state") == "paused":
            client.srem(OPEN_JOBS, job_id)
        return job_id

    return submitted


WISHES = [
    ("pause", {"state": "queued"}, ("paused", None, None), 0),
    ("pause", {"state": "running"}, ("running", "1", None), 1),
    ("resume", {"state": "paused"}, ("queued", None, None), 1),
    ("resume", {"state": "running", "pause": "1"}, ("running", None, None), 1),
    ("cancel", {"state": "queued"}, ("cancelled", None, "1"), 0),
    ("cancel", {"state": "paused"}, ("cancelled", None, "1"), 0),
    ("cancel", {"state": "running"}, ("running", None, "1"), 1),
]


@pytest.mark.parametrize(("wanted", "before", "after", "is_open"), WISHES)
@pytest.mark.parametrize("point", WISHING)
def test_a_wish_is_granted_as_a_whole_or_not_at_all_and_asked_for_again_is_granted(
    point, wanted, before, after, is_open, client, redis_url, a_job, dies
):
    """The caller, who saw the connection break, asks again with the same key, whatever came of the first time."""
    job_id = a_job(**before)
    told, audited = client.xlen(job_events_key(job_id)), client.xlen(AUDIT_STREAM)

    def stands() -> tuple[object, ...]:
        fields = client.hmget(job_key(job_id), "state", "pause", "cancel")
        entries = client.xlen(job_events_key(job_id)) - told, client.xlen(AUDIT_STREAM) - audited
        return tuple(fields), client.sismember(OPEN_JOBS, job_id), entries

    untouched, granted = stands(), (after, is_open, (1, 1))
    dies(wanted, point)
    assert stands() == (granted if point == "wish.recorded" else untouched)
    seen = asyncio.run(mortal.wish(wanted, redis_url))
    assert (seen["status"], stands()) == (after[0], granted)


DEAD = {"state": "running", "lease_until": "0", "dispatched_at": "0", "epoch": "3"}


@pytest.mark.parametrize(
    ("before", "state"),
    [
        (DEAD | {"attempts": "1"}, "running"),
        (DEAD | {"attempts": "3"}, "failed"),
        (DEAD | {"attempts": "1", "cancel": "1"}, "cancelled"),
        (DEAD | {"attempts": "1", "pause": "1"}, "paused"),
    ],
    ids=["woken", "given up", "cancelled", "paused"],
)
@pytest.mark.parametrize("point", RECONCILING)
def test_what_a_reconciler_began_the_next_one_ends(point, before, state, client, redis_url, a_job, dies):
    job_id = a_job(**before)
    dies("reconcile", point)
    wait_until(lambda: asyncio.run(mortal.reconcile(redis_url)) or is_settled(client, job_id))
    assert client.hget(job_key(job_id), "state") == state
    ends = [fields["state"] for _, fields in client.xrange(job_events_key(job_id)) if "state" in fields]
    assert ends == ["queued", *([state] if state != "running" else [])]


def is_settled(client, job_id):
    """Somebody is woken for it, or nobody need be."""
    return client.llen(QUEUE_OF_BEGUN) > 0 or not client.sismember(OPEN_JOBS, job_id)


@pytest.mark.parametrize("point", [*RECORDING, HALF_WRITTEN])
def test_a_job_is_recorded_beside_the_artefacts_or_still_to_be_recorded(point, client, redis_url, tmp_path, dies):
    """It was cancelled since it was last recorded, and no attempt tells the two apart."""
    job_id = asyncio.run(mortal.submit(redis_url))
    asyncio.run(mortal.record(redis_url, tmp_path))
    asyncio.run(mortal.wish("cancel", redis_url))
    file = tmp_path / DIRECTORY / f"{job_id}.json"

    def recorded() -> str:
        return JobFile.model_validate_json(file.read_bytes()).fields["state"]

    dies("record", point)
    assert recorded() == ("queued" if point in ("record.asked", HALF_WRITTEN) else "cancelled")
    assert client.smembers(UNRECORDED_JOBS) == (set() if point == "record.told" else {job_id})
    asyncio.run(mortal.record(redis_url, tmp_path))
    assert (recorded(), client.smembers(UNRECORDED_JOBS)) == ("cancelled", set())
    assert sorted(path.name for path in file.parent.iterdir()) == [".lock", file.name]


@pytest.mark.parametrize("point", UPLOADING)
def test_a_file_is_known_once_its_content_is_safe_and_is_one_file(point, client, redis_url, tmp_path, dies):
    dies("upload", point)
    assert client.hlen(files_key()) == (point == "file.recorded")
    file_id = asyncio.run(mortal.upload(redis_url, tmp_path))
    assert client.hkeys(files_key()) == [file_id]
    record = FileRecord.model_validate_json(client.hget(files_key(), file_id))
    assert sha256((tmp_path / record.path).read_bytes()).hexdigest() == record.digest


@pytest.mark.parametrize("point", FORGETTING)
def test_a_file_that_is_half_deleted_is_none(point, client, redis_url, tmp_path, dies):
    file_id = asyncio.run(mortal.upload(redis_url, tmp_path))
    dies("forget", point)
    assert client.hlen(files_key()) == 0
    assert asyncio.run(mortal.upload(redis_url, tmp_path)) == file_id


def contents(directory: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in (directory / "files").glob("*/*"))


def aged(directory: Path) -> None:
    """All contents lie there since more than a day."""
    a_day_ago = time() - LOST_SECONDS - 1
    for path in (directory / "files").glob("*/*"):
        os.utime(path, (a_day_ago, a_day_ago))


def knows_for_long(client) -> None:
    """Every upload that there is was recorded in this Redis."""
    client.set(FILES_SINCE, "1")


@pytest.mark.parametrize(("scenario", "point"), [("upload", "file.settled"), ("forget", "file.forgotten")])
def test_a_content_that_no_record_names_goes_after_a_day_with_the_next_sweep(
    scenario, point, client, redis_url, tmp_path, dies
):
    knows_for_long(client)
    if scenario == "forget":
        asyncio.run(mortal.upload(redis_url, tmp_path))
    dies(scenario, point)
    (lost,) = contents(tmp_path)
    asyncio.run(mortal.sweep_uploads(redis_url, tmp_path))
    assert contents(tmp_path) == [lost]  # its gateway may be about to record it
    aged(tmp_path)
    file_id = asyncio.run(mortal.upload(redis_url, tmp_path))
    asyncio.run(mortal.sweep_uploads(redis_url, tmp_path))
    record = FileRecord.model_validate_json(client.hget(files_key(), file_id))
    assert contents(tmp_path) == [f"default/{record.stored_as}"]
    aged(tmp_path)
    asyncio.run(mortal.sweep_uploads(redis_url, tmp_path))
    assert contents(tmp_path) == [f"default/{record.stored_as}"]


def test_of_a_redis_that_was_lost_no_content_is_removed(client, redis_url, tmp_path):
    """Nor after a rebuild, which brings back the registry and no records of uploads; at whichever sweep."""
    knows_for_long(client)
    asyncio.run(mortal.upload(redis_url, tmp_path))
    asyncio.run(mortal.begin(redis_url, tmp_path))
    registry = client.get(REGISTRY)
    client.flushall()
    client.set(REGISTRY, registry)
    aged(tmp_path)
    kept = contents(tmp_path)
    for _ in range(2):
        asyncio.run(mortal.sweep_uploads(redis_url, tmp_path))
    assert (len(kept), contents(tmp_path)) == (1, kept)


@pytest.mark.parametrize("point", LOST)
def test_a_sweep_of_lost_uploads_that_was_begun_ends_with_the_next(point, client, redis_url, tmp_path, dies):
    """Of two tenants, and of one upload that never arrived as a whole."""
    knows_for_long(client)
    for name in ("default/a", "acme/b", "acme/arriving-c"):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_text("{}")
    aged(tmp_path)
    dies("sweep uploads", point)
    assert len(contents(tmp_path)) == 2
    asyncio.run(mortal.sweep_uploads(redis_url, tmp_path))
    assert contents(tmp_path) == []


@pytest.mark.parametrize("point", [*BEGINNING, HALF_WRITTEN])
def test_a_registry_and_its_journal_begin_once(point, client, redis_url, tmp_path, dies):
    dies("begin", point)
    name, text = client.get(REGISTRY), (tmp_path / FILE).read_bytes() if (tmp_path / FILE).exists() else None
    assert (name is None) == (point == "seed.asked")
    assert (text is None) == (point != "journal.renamed")
    asyncio.run(mortal.begin(redis_url, tmp_path))
    journal = read_journal(tmp_path)
    assert journal is not None
    assert journal.registry == client.get(REGISTRY) == (name or journal.registry)
    assert [one.id for one in journal.policies] == [BASE]
    assert sorted(path.name for path in (tmp_path / FILE).parent.iterdir()) == [".lock", FILE.name]


@pytest.mark.parametrize("point", DELETING)
def test_a_deletion_that_was_begun_ends_with_the_next_sweep(point, client, redis_url, tmp_path, dies):
    written = write_policy(tmp_path)
    known = policy(written.policy_id, written=written)
    client.hset(policy_key(known.id), mapping={"record": known.model_dump_json(), "version": 1})
    client.zadd(POLICIES_INDEX, {known.id: 0})
    dies("delete", point)
    assert client.zrange(POLICIES_DELETED, 0, -1) == [known.id]
    assert not (tmp_path / "policies" / written.digest).exists()
    asyncio.run(mortal.sweep(redis_url, tmp_path))
    assert list((tmp_path / "policies").iterdir()) == []


@pytest.mark.parametrize("point", ANSWERING)
def test_a_reply_that_was_promised_is_kept_or_may_be_asked_for_anew_soon(point, client, redis_url, dies):
    assert mortal.IDEMPOTENCY is not None
    dies("answer", point)
    if point == "reply.promised":
        assert 0 < client.ttl(mortal.IDEMPOTENCY.key) <= mortal.SECONDS_TO_ANSWER + SLACK_SECONDS
        with pytest.raises(Conflict, match="under way"):
            asyncio.run(mortal.answer(redis_url))
        client.delete(mortal.IDEMPOTENCY.key)
    assert asyncio.run(mortal.answer(redis_url)).body == {"id": "resp_1"}


@pytest.mark.parametrize("point", TRANSACTING)
def test_a_promotion_happened_as_a_whole_or_not_at_all_and_is_audited_once(point, client, redis_url, dies):
    for record in (policy(BASE), policy(STUDENT)):
        client.hset(policy_key(record.id), mapping={"record": record.model_dump_json(), "version": 1})
        client.zadd(POLICIES_INDEX, {record.id: record.created_at})
    client.set(route_key("default"), route().model_dump_json())
    client.sadd(ROUTES_INDEX, "default")

    def stands() -> tuple[str | None, str, int]:
        live = Route.model_validate_json(client.get(route_key("default"))).live_policy
        state = PolicyRecord.model_validate_json(client.hget(policy_key(STUDENT), "record")).state
        return live, state, client.xlen(AUDIT_STREAM)

    dies("promote", point)
    promoted = (STUDENT, "live", 1)
    assert stands() == (promoted if point == "transaction.committed" else (None, "candidate", 0))
    asyncio.run(mortal.promote(redis_url))
    assert stands() == promoted


@pytest.mark.parametrize("point", LOGGING)
def test_a_group_on_the_disk_is_delivered_once_by_whoever_comes_next(point, client, redis_url, tmp_path, dies):
    dies("log", point)
    asyncio.run(mortal.log(redis_url, tmp_path, appends=False))
    assert [record.id for record in read_ledger(redis_url)] == ["resp_1"]
    assert client.hget(LEDGER_COUNTS, "default") == "101"


@pytest.mark.parametrize("point", ["transaction.committed", *TELLING])
def test_a_webhook_is_told_at_least_once_and_under_one_id(point, client, redis_url, dies):
    """Of a job that ended: whether its gateway dies while it queues the event, or at any place of the delivery."""
    with Receiver().listening() as receiver:
        asyncio.run(mortal.subscribe(redis_url, receiver.url))
        dies("tell", point)
        asyncio.run(mortal.tell(redis_url, later=CLAIM_SECONDS))
        asyncio.run(mortal.tell(redis_url, later=2 * CLAIM_SECONDS))
    assert len(receiver.received) == (2 if point == "webhook.answered" else 1)
    assert len(set(receiver.ids)) == 1


@pytest.mark.parametrize("point", ["transaction.committed", "transaction.committed:2"])
def test_a_webhook_that_is_too_far_behind_is_disabled_before_it_misses_anything(point, client, redis_url, dies):
    with Receiver().listening() as receiver:
        asyncio.run(mortal.subscribe(redis_url, receiver.url))
        (webhook_id,) = client.hkeys(WEBHOOKS)
        client.zadd(webhook_queue_key(webhook_id), {f"evt_{number}": 9e15 for number in range(MAX_WAITING)})
        dies("tell", point)
        asyncio.run(mortal.tell(redis_url))
    kept = WebhookRecord.model_validate_json(client.hget(WEBHOOKS, webhook_id))
    assert (kept.is_enabled, kept.disabled_reason) == (False, "overfull")
    assert client.zcard(webhook_queue_key(webhook_id)) == MAX_WAITING

"""docs/redis.md is the data model: no key without a row, no row that says something else than the server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from archive.reading import Archive
from bon_algos.contracts import (
    BROKER_PREFIX,
    CIRCLES_LEASE,
    COMPACTOR_LEASE,
    LEDGER_COUNTS,
    LEDGER_STREAM,
    SPOOLS,
    CandidateGroup,
    CircleSpec,
    Experiment,
    Exposure,
    Feedback,
    of_tenant,
)
from service.access import GATEWAY
from service.catalogue import Catalogue
from service.circles import Circles
from service.deletion import Deletion
from service.dispatch import Dispatcher, open_producer, send_job
from service.erasures import ErasureBook, ErasureRequest
from service.experiment_store import Experiments
from service.files import Files
from service.idempotency import Idempotency
from service.jobs import GROUPS_NEEDED, Jobs
from service.keys import KeyRecord, KeyRequest, KeyRing, Keys
from service.leadership import Leadership
from service.ledger import Ledger
from service.lost_uploads import LostUploads
from service.policies import Policies
from service.routing import RouteRequest, Routes
from service.spool import Spool
from service.store import open_redis
from service.tags import Tags
from service.tokenizer_files import read_tokenizer
from service.webhook_delivery import WebhookDelivery
from service.webhook_events import sample_event
from service.webhook_http import open_sender
from service.webhook_queue import put
from service.webhook_reach import Reach
from service.webhook_record import WebhookRequest
from service.webhooks import Webhooks
from tests.service.receiver import Receiver
from tests.service.records import BASE, PASSED, REWARD_MODEL, file_record, group, job_spec, numbered, policy, route
from tests.service.test_experiment_store import arms
from tests.service.test_policies import SERVED, A, B, register, snapshot_of
from tests.stubs.tokenizer import write_model_directory
from worker.archive_lease import ArchiveLease
from worker.erasing import Eraser
from worker.lease import Lease, claim

pytestmark = pytest.mark.anyio
TABLE = Path(__file__).parents[2] / "docs" / "redis.md"


class Row(NamedTuple):
    pattern: re.Pattern[str]
    type: str
    ttl: str

    def allows(self, seconds: int) -> bool:
        """seconds: what TTL answered, -1 for none."""
        if self.ttl == "any":
            return True
        limits = [int(number) for number in re.findall(r"(\d+) s", self.ttl)]
        return (seconds == -1 and "none" in self.ttl) or (bool(limits) and 0 < seconds <= max(limits))


def rows() -> list[Row]:
    """The first table of the document."""
    found = []
    for line in TABLE.read_text().split("## Fields")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `bonsai:"):
            name = re.escape(cells[0].strip("`"))
            found.append(Row(re.compile(re.sub(r"<[^>]*>", "[^:]+", name.replace("\\ ", " "))), cells[1], cells[2]))
    return found


async def test_every_key_has_its_row_type_and_time_to_live(redis_url: str, tmp_path: Path):
    async with open_redis(redis_url) as redis:
        await live_through_everything(redis, redis_url, tmp_path)
        table = rows()
        met: set[str] = set()
        for key in [cast(str, key) async for key in redis.scan_iter("*")]:
            # Celery names its keys with colons and dots of its own.
            name = f"{BROKER_PREFIX}x" if key.startswith(BROKER_PREFIX) else key
            matching = [row for row in table if row.pattern.fullmatch(name)]
            assert len(matching) == 1, f"{key} has {len(matching)} rows in {TABLE.name}"
            met.add(matching[0].pattern.pattern)
            assert matching[0].type in ("any", await redis.type(key)), key
            assert matching[0].allows(await redis.ttl(key)), f"{key} lives {await redis.ttl(key)} s"
        assert met == {row.pattern.pattern for row in table}, "rows that nothing is written to"


async def live_through_everything(redis: Redis, url: str, directory: Path) -> None:
    """Each operation that writes, at least once."""
    await Catalogue(redis, policy(BASE), route()).refresh()
    drawn = group([(1.0, 2), (2.0, 2)])
    await deliver(redis, directory, [drawn.model_copy(update={"id": f"resp_{i}"}) for i in range(GROUPS_NEEDED)])
    await deliver(redis, directory, [said_of("resp_0")])
    await go_through_jobs(redis, url)
    await Routes(redis, reward_model=REWARD_MODEL, n_cap=64, max_tokens=8).put("other", RouteRequest(), BASE)
    experiments, snapshot = Experiments(redis), await snapshot_of(redis)
    for student in (A, B):
        running = await experiments.put("default", arms(("base", 16, 9000), (student, 1, 1000)), snapshot)
        await deliver(redis, directory, [exposure(running)])
    # The first one's sums now have a time to live, the second one's none.
    await experiments.put("default", arms(("base", 16, 9000), (A, 1, 1000)), snapshot)
    await experiments.stop("default")
    registry = Policies(redis)
    for policy_id in (A, B):
        await registry.record_fingerprint(policy_id, PASSED)
        await registry.promote(policy_id, "default", "r", SERVED)
    tags, doomed = Tags(redis), numbered(9)
    await tags.put("prod", A, GATEWAY)
    await register(redis, policy(doomed))
    await Deletion(redis, directory).delete(doomed, GATEWAY)
    await registry.roll_back("default", Idempotency.of("other", "POST /routes/default/rollback", ""))
    await Circles(redis).put("default", CircleSpec(), GATEWAY)
    assert await Leadership(redis, CIRCLES_LEASE, seconds=15).is_ours()
    await go_through_keys(redis, directory)
    await go_through_an_erasure(redis, url, directory)
    await go_through_webhooks(redis)


async def go_through_an_erasure(redis: Redis, url: str, directory: Path) -> None:
    """Of a user whose group is in the stream, while a spool may hold another."""
    of_ada = group([(1.0, 2)]).model_copy(update={"id": "resp_ada", "user": "ada"})
    await deliver(redis, directory, [of_ada])
    await ErasureBook(redis).ask(ErasureRequest(user="ada"), GATEWAY)
    await redis.hset(SPOOLS, "gateway", "1")
    with blocking_redis.Redis.from_url(url) as client:
        archive = Archive.at(str(directory / "archive"))
        with ArchiveLease(client, archive, 60) as lease:
            [receipt] = Eraser(client, archive, directory, lease).work()
            assert receipt.erased.groups == 1
            # Given back, the lease would not be among the keys that are looked at.
            client.rename(COMPACTOR_LEASE, "kept")
        client.rename("kept", COMPACTOR_LEASE)


async def go_through_webhooks(redis: Redis) -> None:
    """One whose receiver accepts, one where nobody listens."""
    reach = Reach(private_addresses=True, plain_http=True)
    webhooks = Webhooks(redis, bytes(32), reach)
    with Receiver().listening() as receiver:
        for url in (receiver.url, "http://127.0.0.1:1/"):
            asked = WebhookRequest(name="n", url=url, event_types=("fine_tuning.job.failed",))
            webhook, _ = await webhooks.create(asked, GATEWAY)
            async with redis.pipeline() as pipe:
                put(pipe, webhook["id"], sample_event("fine_tuning.job.failed", 0.0), 0.0)
                await pipe.execute()
        async with open_sender(reach) as sender, asyncio.TaskGroup() as group:
            await WebhookDelivery(redis, webhooks, sender).start(group)


async def go_through_files(redis: Redis, directory: Path) -> None:
    """One of either tenant."""
    models = write_model_directory(directory / "model")
    files = Files(
        redis,
        artefacts=directory,
        max_bytes=1024,
        tokenizer=read_tokenizer(models),
        policy_directory=models,
        window=256,
    )
    for tenant in ("default", "acme"):
        await files.keep(file_record(tenant=tenant))
    await LostUploads(redis, directory).sweep()


async def go_through_keys(redis: Redis, directory: Path) -> None:
    """The first key of a tenant, used once; and what that tenant leaves."""
    pepper = bytes(32)
    admin = KeyRecord(
        id="key_a", digest="", name="a", role="admin", tenant="default", routes=None, created_at=0.0, created_by="file"
    )
    ring = KeyRing(redis, pepper, admin)
    keys = Keys(redis, ring, pepper, admin, route())
    record, key = await keys.create(KeyRequest(name="b", role="admin", tenant="acme"), GATEWAY)
    ring.caller(key)
    await ring.refresh()
    await keys.revoke(record.id, GATEWAY)
    await redis.hset(LEDGER_COUNTS, of_tenant("acme", "default"), str(GROUPS_NEEDED))
    await go_through_files(redis, directory)
    await Jobs(redis, n_cap=64, max_lora_rank=32).submit(job_spec(), by=GATEWAY._replace(tenant="acme"))


async def go_through_jobs(redis: Redis, url: str) -> None:
    """One that is cancelled, one that waits for a worker, two that succeed."""
    jobs = Jobs(redis, n_cap=64, max_lora_rank=32)
    submission = Idempotency.of("key", "POST /distill", "")
    first, second, third = [(await jobs.submit(job_spec(), key)).job_id for key in (submission, None, None)]
    await jobs.grant("cancel", third)
    work(url, first, A)
    work(url, second, B)
    await jobs.submit(job_spec())
    producer = open_producer(url)
    await Dispatcher(redis, partial(send_job, producer), seconds=5).reconcile()


def work(url: str, job_id: str, policy_id: str) -> None:
    """What a worker writes from its claim to the policy's registration."""
    with blocking_redis.Redis.from_url(url) as client:
        own = claim(client, job_id, lease_seconds=60, worker="here:1")
        assert not isinstance(own, str)
        lease = Lease(client, job_id, own, lease_seconds=60, heartbeat_seconds=10)
        lease.progress("training", 1, 2, {"loss": 0.5}, 1.0)
        lease.tell_checkpoint(1, {"loss": 0.5}, kept=2)
        lease.finish_succeeded(policy(policy_id), "{}")


def said_of(group_id: str) -> Feedback:
    return Feedback(
        id="fb_1", created_at=0.0, group_id=group_id, session=None, route="default", experiment=None, arm=None,
        arm_reason=None, author=None, name="quality", candidate=0, value=True, better=None, worse=None, comment=None,
        correction=None,
    )  # fmt: skip


def exposure(running: Experiment) -> Exposure:
    arm = running.arms[1].arm
    return Exposure(
        id=f"exposure_{running.id}",
        created_at=0,
        group_id="g",
        route="default",
        experiment=running.id,
        arm=arm,
        arm_reason="experiment",
    )


async def deliver(redis: Redis, directory: Path, records: Sequence[Exposure | CandidateGroup | Feedback]) -> None:
    """Through the gateway's own spool and drainer."""
    before = await redis.xlen(LEDGER_STREAM)
    with closing(Spool(directory / "spool", 2**20)) as spool:
        ledger = Ledger(spool, redis)
        for record in records:
            assert ledger.append(record)
        draining = asyncio.create_task(ledger.run(lambda group: None))
        async with asyncio.timeout(10):
            while await redis.xlen(LEDGER_STREAM) < before + len(records):
                await asyncio.sleep(0.01)
        draining.cancel()

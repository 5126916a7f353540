"""The control plane as one object: what the admin routes may touch, built once, at start-up.

Owns: the wiring of catalogue, keys, registry, jobs, files, experiments, circles, publishing, curves, what is learned of
rewards, and their loops. Does not own: HTTP, the engines, which join and leave `publishers` (fleet.py).
`open_control` is the composition root of everything that changes traffic; the hot path needs `catalogue` alone.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import time
from typing import Final, NamedTuple

from redis.asyncio import Redis

from archive.reading import Archive
from bon_algos.contracts import PolicyRecord, Route
from service.audit import Audit
from service.catalogue import Catalogue
from service.circle_driver import CircleDriver, Means
from service.curve import Curves
from service.deletion import Deletion
from service.dispatch import Dispatcher, open_producer, send_job
from service.dry_run import DryRuns
from service.erasures import ErasureBook
from service.errors import StoreFull, StoreUnavailable
from service.experiment_store import Experiments
from service.files import Files
from service.job_records import JobRecords
from service.job_stream import REPLY_SECONDS, JobStreams
from service.jobs import Jobs
from service.journal import JournalWriter
from service.keys import KeyRecord, KeyRing, Keys
from service.learned import LearnedStrategies
from service.ledger_pages import LedgerPages
from service.loops import running_loops
from service.lost_uploads import LostUploads
from service.policies import Policies
from service.publishers import Publishers
from service.registration import Registration
from service.routing import Routes
from service.store import open_redis
from service.tags import Tags
from service.trials import Trials
from service.webhook_delivery import delivering
from service.webhook_http import sending
from service.webhook_reach import Reach
from service.webhook_samples import Samples
from service.webhooks import Webhooks

DEFAULT_ROUTE: Final = "default"
DEFAULT_N: Final = 16


class TrainingData(NamedTuple):
    """What jobs learn from, beside the ledger; and what they would."""

    files: Files
    dry_runs: DryRuns


@dataclass(frozen=True)
class Control:
    catalogue: Catalogue
    routes: Routes
    policies: Policies
    trials: Trials
    tags: Tags
    deletion: Deletion
    registration: Registration
    audit: Audit
    experiments: Experiments
    circle_driver: CircleDriver
    jobs: Jobs
    job_records: JobRecords
    lost_uploads: LostUploads
    training: TrainingData
    streams: JobStreams
    dispatcher: Dispatcher
    publishers: Publishers
    curves: Curves
    learned: LearnedStrategies
    keys: Keys
    key_ring: KeyRing
    ledger_pages: LedgerPages
    erasures: ErasureBook
    webhooks: Webhooks
    webhook_samples: Samples
    artefacts: Path
    max_body_bytes: int


@asynccontextmanager
async def open_control(
    *,
    redis_url: str,
    base_policy_id: str,
    reward_model_id: str,
    artefacts: Path,
    archive: Archive,
    training: TrainingData,
    n_cap: int,
    default_max_tokens: int,
    reconcile_seconds: float,
    max_lora_rank: int,
    open_publishers: Callable[[Catalogue, Policies], Publishers],
    learning_seconds: float,
    max_body_bytes: int,
    pepper: bytes,
    reach: Reach,
    admin: KeyRecord,
) -> AsyncGenerator[Control]:
    """Build the control plane and keep its loops running until the block is left. Redis may be away: the default
    route and the base policy serve from the start."""
    base = PolicyRecord(id=base_policy_id, kind="base", state="live", created_at=time())
    default = _default_route(base_policy_id, reward_model_id, n_cap=n_cap, max_tokens=default_max_tokens)
    async with _open_stores(redis_url) as (redis, redis_of_bytes, redis_that_waits), sending(reach) as sender:
        catalogue, policies = Catalogue(redis, base, default), Policies(redis)
        key_ring, webhooks = KeyRing(redis, pepper, admin), Webhooks(redis, pepper, reach)
        jobs = Jobs(redis, n_cap=n_cap, max_lora_rank=max_lora_rank)
        dispatcher = Dispatcher(redis, partial(send_job, open_producer(redis_url)), seconds=reconcile_seconds)
        curves = Curves(redis_of_bytes, archive)
        means = Means(catalogue, jobs, dispatcher, policies, Trials(redis), curves, artefacts)
        control = Control(
            catalogue=catalogue,
            routes=Routes(redis, reward_model=reward_model_id, n_cap=n_cap, max_tokens=default_max_tokens),
            policies=policies,
            trials=means.trials,
            tags=Tags(redis),
            deletion=Deletion(redis, artefacts),
            registration=Registration(redis, artefacts, base_policy_id=base_policy_id, max_lora_rank=max_lora_rank),
            audit=Audit(redis),
            experiments=Experiments(redis),
            circle_driver=CircleDriver(redis, means, seconds=reconcile_seconds),
            jobs=jobs,
            job_records=JobRecords(redis, artefacts),
            lost_uploads=LostUploads(redis, artefacts),
            training=training,
            streams=JobStreams(redis_that_waits),
            dispatcher=dispatcher,
            publishers=open_publishers(catalogue, policies),
            curves=curves,
            learned=LearnedStrategies(redis_of_bytes, archive, catalogue, seconds=learning_seconds),
            keys=Keys(redis, key_ring, pepper, admin, default),
            key_ring=key_ring,
            ledger_pages=LedgerPages(redis_of_bytes, archive, pepper),
            erasures=ErasureBook(redis),
            webhooks=webhooks,
            webhook_samples=Samples(webhooks, sender),
            artefacts=artefacts,
            max_body_bytes=max_body_bytes,
        )
        async with _running(control), delivering(redis, webhooks, sender):
            yield control


@asynccontextmanager
async def _open_stores(redis_url: str) -> AsyncGenerator[tuple[Redis, Redis, Redis]]:
    """Of text, of bytes, and of text that is waited for."""
    async with (
        open_redis(redis_url) as redis,
        open_redis(redis_url, in_bytes=True) as redis_of_bytes,
        open_redis(redis_url, reply_seconds=REPLY_SECONDS) as redis_that_waits,
    ):
        yield redis, redis_of_bytes, redis_that_waits


@asynccontextmanager
async def _running(control: Control) -> AsyncGenerator[None]:
    """Its loops, until the block is left."""
    with suppress(StoreUnavailable, StoreFull):
        # The first request is held against the keys there are, where Redis says which.
        await control.key_ring.refresh()
    async with running_loops(
        *(control.catalogue.run(), control.key_ring.run(), control.dispatcher.run(), control.learned.run()),
        *(control.deletion.run(), JournalWriter(control.catalogue, control.artefacts).run()),
        *(control.circle_driver.run(), control.job_records.run(), control.lost_uploads.run()),
    ):
        yield


def _default_route(base_policy: str, reward_model: str, *, n_cap: int, max_tokens: int) -> Route:
    return Route(
        name=DEFAULT_ROUTE,
        base_policy=base_policy,
        reward_model=reward_model,
        default_n=min(DEFAULT_N, n_cap),
        n_cap=n_cap,
        max_tokens=max_tokens,
    )

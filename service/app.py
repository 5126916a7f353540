"""The composition root: the only module that knows every concrete class and the settings.

Owns: opening and closing what a gateway consists of, and the list of its routes. Does not own: any behaviour.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from typing import Final

from fastapi import FastAPI
from redis.asyncio import Redis

from archive.reading import Archive
from archive.storage import archive_url
from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import RewardConfig
from bon_algos.scoring import open_readers
from service.access import rights
from service.allowances import Allowances, TakingLimits
from service.api_key import read_pepper
from service.authentication import Authentication
from service.control import Control, TrainingData, open_control
from service.draining import Door, Draining
from service.dry_run import DryRuns
from service.edge import install_edge
from service.fair_queue import FairQueue
from service.feedback import FeedbackBook
from service.files import Files
from service.fleet import running_fleet
from service.keys import admin_record
from service.known_pairs import Tested, tested
from service.ledger import Ledger
from service.limits import Limits
from service.loops import running_loops
from service.measurements import Measurements
from service.openapi import require_described
from service.pool import EnginePool
from service.publishers import Publishers
from service.replays import Replays
from service.replica import Replica
from service.residency import DRAIN_SECONDS
from service.reward import RewardModel
from service.reward_test import PairTest, RewardTest
from service.routes import (
    audit,
    circles,
    distill,
    engines,
    experiments,
    feedback,
    files,
    generate,
    health,
    keys,
    openai,
    openapi,
    policies,
    reports,
    routing,
    tags,
    webhooks,
)
from service.routes import ledger as ledger_routes
from service.serving import Serving
from service.settings import GatewaySettings
from service.shadows import Shadows, shadowing
from service.spool import Spool
from service.spool_report import SpoolReport, spool_name
from service.store import open_redis
from service.tokenizer_files import read_tokenizer
from service.vllm import PolicyEngine
from service.webhook_reach import Reach

MEASUREMENTS_SECONDS: Final = 10.0
"""How long a gateway that stops waits for rewards that are being measured."""
LEDGER_SECONDS: Final = 5.0
"""And then for Redis to take what is on the disk; what it does not take waits there for the next start."""


ROUTES: Final = (
    generate, openai, feedback, health, routing, circles, policies, reports, tags, distill, experiments, engines, keys,
    audit, files, webhooks, ledger_routes, openapi,
)  # fmt: skip


@dataclass(frozen=True)
class Gateway:
    """Everything that requests may touch; built once, at start-up."""

    serving: Serving
    control: Control


@asynccontextmanager
async def open_gateway(settings: GatewaySettings) -> AsyncGenerator[Gateway]:
    """A running gateway. Engines and Redis may still be away: `/ready` says what is missing. Raises SpoolLocked when
    another process has the spool, OSError or ValueError when a directory, the known pairs or a key cannot be read."""
    tokenizer = read_tokenizer(settings.policy_directory)
    async with AsyncExitStack() as stack:
        spool = stack.enter_context(closing(Spool(settings.spool, settings.spool_max_bytes)))
        engine = EnginePool()
        reward_model, reward_test = await stack.enter_async_context(_rewarding(settings))
        ledger = Ledger(spool, await stack.enter_async_context(open_redis(settings.redis_url)))
        archive = Archive.at(archive_url(settings.archive, settings.artefacts))
        of_bytes = await stack.enter_async_context(open_redis(settings.redis_url, in_bytes=True))
        redis = await stack.enter_async_context(open_redis(settings.redis_url))
        training = _training_data(redis, of_bytes, archive, reward_model.template_digest, tokenizer, settings)
        control = await stack.enter_async_context(_control(archive, training, settings))
        await stack.enter_async_context(_reporting(ledger, settings))
        measurements = await stack.enter_async_context(_delivering(ledger, reward_model, reward_test))
        limits = _limits(settings)
        shadows = Shadows(engine, reward_model, limits, ledger, measurements, control.catalogue)
        serving = Serving(
            engine=engine,
            reward_model=reward_model,
            reward_test=reward_test,
            tokenizer=tokenizer,
            ledger=ledger,
            measurements=measurements,
            catalogue=control.catalogue,
            replays=Replays(await stack.enter_async_context(open_redis(settings.redis_url))),
            feedback=FeedbackBook(of_bytes, ledger, archive),
            learned=control.learned,
            limits=limits,
            shadows=shadows,
            window=settings.max_model_len,
            n_cap=settings.n_cap,
            max_body_bytes=settings.max_body_bytes,
            settings_digest=settings.digest,
            holdout_share=settings.holdout_share,
        )
        await stack.enter_async_context(_fleet(engine, control.publishers, settings))
        # Ended before the engines are left, which wait for what is under way.
        await stack.enter_async_context(shadowing(shadows))
        yield Gateway(serving, control)


def _fleet(pool: EnginePool, publishers: Publishers, settings: GatewaySettings) -> AbstractAsyncContextManager[None]:
    admit = partial(_admitted, pool, publishers, settings)
    return running_fleet(settings.engines, settings.policy_engines_file, admit)


def _limits(settings: GatewaySettings) -> Limits:
    of_a_key = TakingLimits(
        requests_per_minute=settings.key_requests_per_minute,
        tokens_per_minute=settings.key_tokens_per_minute,
        tokens_in_flight=settings.key_tokens_in_flight,
    )
    of_a_tenant = TakingLimits(
        requests_per_minute=settings.tenant_requests_per_minute,
        tokens_per_minute=settings.tenant_tokens_per_minute,
        tokens_in_flight=settings.tenant_tokens_in_flight,
    )
    queue = FairQueue(settings.max_tokens_in_flight, settings.max_tokens_waiting)
    return Limits(queue, Allowances("key", of_a_key), Allowances("tenant", of_a_tenant))


def _training_data(
    redis: Redis,
    of_bytes: Redis,
    archive: Archive,
    reward_template_digest: str,
    tokenizer: ChatTokenizer,
    settings: GatewaySettings,
) -> TrainingData:
    files = Files(
        redis,
        artefacts=settings.artefacts,
        max_bytes=settings.file_max_bytes,
        tokenizer=tokenizer,
        policy_directory=settings.policy_directory,
        window=settings.max_model_len,
    )
    dry_runs = DryRuns(
        of_bytes,
        files,
        archive,
        settings.artefacts,
        base_policy_id=settings.base_policy_id,
        reward_model_id=settings.reward_model.id,
        reward_template_digest=reward_template_digest,
        tokenizer=tokenizer,
    )
    return TrainingData(files, dry_runs)


def _control(
    archive: Archive, training: TrainingData, settings: GatewaySettings
) -> AbstractAsyncContextManager[Control]:
    pepper = read_pepper(settings.key_pepper_file)
    return open_control(
        redis_url=settings.redis_url,
        base_policy_id=settings.base_policy_id,
        reward_model_id=settings.reward_model.id,
        artefacts=settings.artefacts,
        archive=archive,
        training=training,
        n_cap=settings.n_cap,
        default_max_tokens=settings.default_max_tokens,
        reconcile_seconds=settings.reconcile_seconds,
        max_lora_rank=settings.max_lora_rank,
        open_publishers=partial(
            Publishers,
            artefacts=settings.artefacts,
            slots=settings.max_loras,
            max_lora_rank=settings.max_lora_rank,
            tolerance=settings.fingerprint_tolerance,
            prove_every=settings.prove_seconds,
        ),
        learning_seconds=settings.learning_seconds,
        max_body_bytes=settings.max_body_bytes,
        pepper=pepper,
        reach=Reach(private_addresses=settings.webhook_private_addresses, plain_http=settings.webhook_plain_http),
        admin=admin_record(settings.admin_key_file, pepper),
    )


@asynccontextmanager
async def _reporting(ledger: Ledger, settings: GatewaySettings) -> AsyncGenerator[None]:
    """The spool tells how far it is clean, until the block is left."""
    async with open_redis(settings.redis_url) as redis:
        report = SpoolReport(redis, ledger, spool_name(settings.spool))
        async with running_loops(report.run()):
            yield
        await report.close()


@asynccontextmanager
async def _rewarding(settings: GatewaySettings) -> AsyncGenerator[tuple[RewardModel, RewardTest]]:
    """The reward model and its test, which runs as soon as its engines answer."""
    readers = open_readers(settings.reward_model, lambda member: read_tokenizer(member.directory))
    reward_model = RewardModel(settings.reward_model, readers, hung_after=settings.hung_after_seconds)
    try:
        config = settings.reward_model
        test = RewardTest([_pair_test(reward_model, config, one) for one in tested(settings.reward_pairs, config)])
        async with running_loops(test.run()):
            yield reward_model, test
    finally:
        await reward_model.close()


def _pair_test(reward_model: RewardModel, config: RewardConfig, of: Tested) -> PairTest:
    if of.member is None:
        return PairTest(reward_model.score, of.pairs)
    return PairTest(
        partial(reward_model.score_of_member, of.member),
        of.pairs,
        title="the reward model" if len(config.members) == 1 else f"the reward model {config.members[of.member].id}",
        is_general=True,
    )


@asynccontextmanager
async def _admitted(
    pool: EnginePool, publishers: Publishers, settings: GatewaySettings, name: str, url: str
) -> AsyncGenerator[None]:
    """One policy engine, watched and published to. Leaving the block finishes its requests."""
    engine = PolicyEngine(url)
    replica = Replica(
        name,
        engine,
        settings.base_policy_id,
        canary_after=settings.canary_after_seconds,
        hung_after=settings.hung_after_seconds,
    )
    publisher = publishers.join(replica)
    pool.join(replica)
    try:
        async with running_loops(replica.canary.run(), publisher.run()):
            yield
    finally:
        pool.leave(replica)
        publishers.leave(publisher)
        await replica.idle(DRAIN_SECONDS)
        await engine.close()


@asynccontextmanager
async def _delivering(
    ledger: Ledger, reward_model: RewardModel, reward_test: RewardTest
) -> AsyncGenerator[Measurements]:
    """The ledger's drainer and the measurements, running until the block is left."""
    measurements = Measurements(reward_model, reward_test, ledger)
    async with running_loops(ledger.run(measurements.start)):
        try:
            yield measurements
        finally:
            await measurements.drain(MEASUREMENTS_SECONDS)
            await ledger.drain(LEDGER_SECONDS)


def create_app(open_gateway: Callable[[], AbstractAsyncContextManager[Gateway]]) -> FastAPI:
    """The HTTP application around a gateway that is opened when the server starts. Raises ValueError for a route that
    does not declare who may ask, or that the OpenAPI document does not know."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with open_gateway() as gateway:
            app.state.serving, app.state.control = gateway.serving, gateway.control
            app.state.authentication = Authentication(gateway.control.key_ring)
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.draining = Draining()
    app.add_middleware(Door, draining=app.state.draining)
    install_edge(app)
    for routes in ROUTES:
        # Not `include_router`, which would analyse every route anew: most of the time that a gateway takes to start.
        app.router.routes.extend(routes.router.routes)
    app.state.rights = require_described(rights(app))
    return app

"""The composition root: the only module that knows every concrete class and the settings.

Owns: opening and closing what a gateway consists of, and the list of its routes. Does not own: any behaviour.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import FastAPI

from bon_algos.chat import ChatTokenizer
from bon_algos.scoring import open_readers
from service.access import rights
from service.allowances import Allowances, KeyLimits
from service.api_key import read_pepper
from service.authentication import Authentication
from service.control import Control, open_control
from service.draining import Door, Draining
from service.edge import install_edge
from service.fair_queue import FairQueue
from service.feedback import FeedbackBook
from service.keys import admin_record
from service.ledger import Ledger
from service.limits import Limits
from service.loops import running_loops
from service.measurements import Measurements
from service.openapi import require_described
from service.pool import EnginePool
from service.replays import Replays
from service.replica import Replica
from service.reward import RewardModel
from service.reward_test import RewardTest, read_pairs
from service.routes import (
    audit,
    distill,
    engines,
    experiments,
    feedback,
    generate,
    health,
    keys,
    openai,
    openapi,
    policies,
    routing,
    tags,
)
from service.serving import Serving
from service.settings import GatewaySettings
from service.shadows import Shadows, shadowing
from service.spool import Spool
from service.store import open_redis
from service.vllm import PolicyEngine

MEASUREMENTS_SECONDS: Final = 10.0
"""How long a gateway that stops waits for rewards that are being measured."""
LEDGER_SECONDS: Final = 5.0
"""And then for Redis to take what is on the disk; what it does not take waits there for the next start."""


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
    readers = open_readers(settings.reward_model, lambda member: read_tokenizer(member.directory))
    async with AsyncExitStack() as stack:
        spool = stack.enter_context(closing(Spool(settings.spool, settings.spool_max_bytes)))
        engine = await stack.enter_async_context(_open_pool(settings))
        reward_model = RewardModel(settings.reward_model, readers)
        stack.push_async_callback(reward_model.close)
        ledger = Ledger(spool, await stack.enter_async_context(open_redis(settings.redis_url)))
        control = await stack.enter_async_context(_control(engine, settings))
        of_bytes = await stack.enter_async_context(open_redis(settings.redis_url, in_bytes=True))
        measurements = await stack.enter_async_context(_delivering(ledger, reward_model))
        limits = _limits(settings)
        shadows = Shadows(engine, reward_model, limits, ledger, measurements, control.catalogue)
        serving = Serving(
            engine=engine,
            reward_model=reward_model,
            reward_test=await stack.enter_async_context(_testing(reward_model, settings)),
            tokenizer=tokenizer,
            ledger=ledger,
            measurements=measurements,
            catalogue=control.catalogue,
            replays=Replays(await stack.enter_async_context(open_redis(settings.redis_url))),
            feedback=FeedbackBook(of_bytes, ledger),
            learned=control.learned,
            limits=limits,
            shadows=await stack.enter_async_context(shadowing(shadows)),
            window=settings.max_model_len,
            n_cap=settings.n_cap,
            max_body_bytes=settings.max_body_bytes,
            settings_digest=settings.digest,
            holdout_share=settings.holdout_share,
        )
        yield Gateway(serving, control)


def _limits(settings: GatewaySettings) -> Limits:
    of_a_key = KeyLimits(
        requests_per_minute=settings.key_requests_per_minute,
        tokens_per_minute=settings.key_tokens_per_minute,
        tokens_in_flight=settings.key_tokens_in_flight,
    )
    return Limits(FairQueue(settings.max_tokens_in_flight, settings.max_tokens_waiting), Allowances(of_a_key))


def _control(engine: EnginePool, settings: GatewaySettings) -> AbstractAsyncContextManager[Control]:
    pepper = read_pepper(settings.key_pepper_file)
    return open_control(
        engine.replicas,
        redis_url=settings.redis_url,
        base_policy_id=settings.base_policy_id,
        reward_model_id=settings.reward_model.id,
        artefacts=settings.artefacts,
        n_cap=settings.n_cap,
        default_max_tokens=settings.default_max_tokens,
        reconcile_seconds=settings.reconcile_seconds,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        fingerprint_tolerance=settings.fingerprint_tolerance,
        learning_seconds=settings.learning_seconds,
        max_body_bytes=settings.max_body_bytes,
        pepper=pepper,
        admin=admin_record(settings.admin_key_file, pepper),
    )


@asynccontextmanager
async def _testing(reward_model: RewardModel, settings: GatewaySettings) -> AsyncGenerator[RewardTest]:
    """The reward model's test, which runs as soon as its engine answers."""
    test = RewardTest(reward_model, read_pairs(settings.reward_pairs) if settings.reward_pairs else ())
    async with running_loops(test.run()):
        yield test


@asynccontextmanager
async def _open_pool(settings: GatewaySettings) -> AsyncGenerator[EnginePool]:
    """The policy engines, watched until the block is left."""
    async with AsyncExitStack() as stack:
        replicas = []
        for place, url in enumerate(settings.policy_engine_urls):
            engine = PolicyEngine(url)
            stack.push_async_callback(engine.close)
            replicas.append(
                Replica(
                    f"policy-{place}",
                    engine,
                    settings.base_policy_id,
                    canary_after=settings.canary_after_seconds,
                    hung_after=settings.hung_after_seconds,
                )
            )
        async with running_loops(*(replica.canary.run() for replica in replicas)):
            yield EnginePool(replicas)


@asynccontextmanager
async def _delivering(ledger: Ledger, reward_model: RewardModel) -> AsyncGenerator[Measurements]:
    """The ledger's drainer and the measurements, running until the block is left."""
    measurements = Measurements(reward_model, ledger)
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
    for routes in (
        *(generate, openai, feedback, health, routing, policies, tags, distill, experiments, engines),
        *(keys, audit, openapi),
    ):
        app.include_router(routes.router)
    app.state.rights = require_described(rights(app))
    return app


def read_tokenizer(directory: Path) -> ChatTokenizer:
    """Tokenizer and chat template of a local model directory."""
    template = directory / "chat_template.jinja"
    return ChatTokenizer(
        (directory / "tokenizer.json").read_text(encoding="utf-8"),
        json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")),
        template.read_text(encoding="utf-8") if template.exists() else None,
    )

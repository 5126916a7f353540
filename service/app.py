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
from service.access import rights
from service.api_key import read_pepper
from service.authentication import Authentication
from service.control import Control, open_control
from service.edge import install_edge
from service.feedback import FeedbackBook
from service.keys import admin_record
from service.ledger import Ledger
from service.loops import running_loops
from service.measurements import Measurements
from service.replays import Replays
from service.reward import RewardModel
from service.reward_test import RewardTest, read_pairs
from service.routes import distill, experiments, feedback, generate, health, keys, openai, policies, routing
from service.serving import Serving
from service.settings import GatewaySettings
from service.spool import Spool
from service.store import open_redis
from service.vllm import PolicyEngine

MEASUREMENTS_SECONDS: Final = 10.0
"""How long a gateway that stops waits for rewards that are being measured."""


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
    reward_tokenizer = read_tokenizer(settings.reward_directory)
    async with AsyncExitStack() as stack:
        spool = stack.enter_context(closing(Spool(settings.spool, settings.spool_max_bytes)))
        engine, reward_model = _open_engines(settings, reward_tokenizer, stack)
        ledger = Ledger(spool, await stack.enter_async_context(open_redis(settings.redis_url)))
        control = await stack.enter_async_context(_control(engine, settings))
        of_bytes = await stack.enter_async_context(open_redis(settings.redis_url, in_bytes=True))
        measurements = await stack.enter_async_context(_delivering(ledger, reward_model))
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
            window=settings.max_model_len,
            n_cap=settings.n_cap,
            max_body_bytes=settings.max_body_bytes,
            settings_digest=settings.digest,
        )
        yield Gateway(serving, control)


def _control(engine: PolicyEngine, settings: GatewaySettings) -> AbstractAsyncContextManager[Control]:
    pepper = read_pepper(settings.key_pepper_file)
    return open_control(
        engine,
        redis_url=settings.redis_url,
        base_policy_id=settings.base_policy_id,
        reward_model_id=settings.reward_model_id,
        artefacts=settings.artefacts,
        n_cap=settings.n_cap,
        default_max_tokens=settings.default_max_tokens,
        reconcile_seconds=settings.reconcile_seconds,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        fingerprint_tolerance=settings.fingerprint_tolerance,
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


def _open_engines(
    settings: GatewaySettings, reward_tokenizer: ChatTokenizer, stack: AsyncExitStack
) -> tuple[PolicyEngine, RewardModel]:
    engine = PolicyEngine(settings.policy_engine_url)
    stack.push_async_callback(engine.close)
    reward_model = RewardModel(
        settings.reward_engine_url, settings.reward_model_id, reward_tokenizer, settings.reward_max_model_len
    )
    stack.push_async_callback(reward_model.close)
    return engine, reward_model


@asynccontextmanager
async def _delivering(ledger: Ledger, reward_model: RewardModel) -> AsyncGenerator[Measurements]:
    """The ledger's drainer and the measurements, running until the block is left."""
    measurements = Measurements(reward_model, ledger)
    async with running_loops(ledger.run(measurements.start)):
        try:
            yield measurements
        finally:
            await measurements.drain(MEASUREMENTS_SECONDS)


def create_app(open_gateway: Callable[[], AbstractAsyncContextManager[Gateway]]) -> FastAPI:
    """The HTTP application around a gateway that is opened when the server starts. Raises ValueError for a route that
    does not declare who may ask."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with open_gateway() as gateway:
            app.state.serving, app.state.control = gateway.serving, gateway.control
            app.state.authentication = Authentication(gateway.control.key_ring)
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    install_edge(app)
    for routes in (generate, openai, feedback, health, routing, policies, distill, experiments, keys):
        app.include_router(routes.router)
    rights(app)
    return app


def read_tokenizer(directory: Path) -> ChatTokenizer:
    """Tokenizer and chat template of a local model directory."""
    template = directory / "chat_template.jinja"
    return ChatTokenizer(
        (directory / "tokenizer.json").read_text(encoding="utf-8"),
        json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")),
        template.read_text(encoding="utf-8") if template.exists() else None,
    )

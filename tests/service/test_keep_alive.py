"""A stream whose engine is slow is never silent for long: on a loop whose clock the test moves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.api_key import read_admin_key
from service.app import create_app, open_gateway
from service.openai_stream import KEEP_ALIVE_SECONDS, PING
from service.server import server_config
from service.serving import Serving
from service.settings import GatewaySettings
from tests.fixtures.gateway import Client, PromptServer, gateway_settings
from tests.service.records import BASE
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running

HI = {"model": "default", "prompt": "hi", "stream": True, "best_of": 2}


class MovedLoop(asyncio.SelectorEventLoop):
    """Its clock is as far ahead as it is told to be."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


@pytest.fixture
def settings(tmp_path: Path, engine: StubEngine, reward: StubReward, redis_url: str) -> Iterator[GatewaySettings]:
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        # No canary: what its engine takes to answer is nothing on this clock.
        patience = {"canary_after_seconds": 1e6, "hung_after_seconds": 2e6}
        yield gateway_settings(tmp_path, engine_url, reward_url, redis_url, **patience)


def test_a_slow_engine_is_waited_for_with_one_comment_after_another(engine, settings):
    engine.script.delays = [3600.0]

    async def three(loop: MovedLoop) -> None:
        async with asked(settings) as (reader, _):
            await reader.readuntil(PING)
            for _ in range(3):
                loop.ahead += KEEP_ALIVE_SECONDS
                assert (await reader.readuntil(PING)).count(b":") == 1

    on_a_moved_loop(three)


def test_what_is_heard_and_not_passed_on_does_not_put_off_the_comment(engine, settings):
    """A first piece of a candidate is kept until the choice: for the client it is silence."""
    engine.script.delays, engine.script.fault = [1.5], "stalls"

    async def through_a_piece(loop: MovedLoop) -> None:
        async with asked(settings) as (reader, serving):
            await reader.readuntil(PING)
            loop.ahead += 0.6 * KEEP_ALIVE_SECONDS
            replica = serving.engine.replica("policy-0")
            assert replica is not None
            while not replica.last_used_at(BASE):
                await asyncio.sleep(0.005)
            for _ in range(20):  # so many steps of the loop from the engine's socket to the stream
                await asyncio.sleep(0)
            loop.ahead += 0.5 * KEEP_ALIVE_SECONDS
            async with asyncio.timeout(0.3 * KEEP_ALIVE_SECONDS):
                assert (await reader.readuntil(PING)).count(b":") == 1

    on_a_moved_loop(through_a_piece)


def on_a_moved_loop(watch: Callable[[MovedLoop], Coroutine[Any, Any, None]]) -> None:
    loop = MovedLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(watch(loop))


@asynccontextmanager
async def asked(settings: GatewaySettings) -> AsyncIterator[tuple[asyncio.StreamReader, Serving]]:
    """The stream of a best-of-2, of a gateway on this loop."""
    app = create_app(partial(open_gateway, settings))
    server = PromptServer(server_config(app, settings))
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(30):
        while not server.started:
            await asyncio.sleep(0.005)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname()[:2])
    address = "http://{}:{}".format(*writer.get_extra_info("peername"))
    client = Client(address, read_admin_key(settings.admin_key_file))
    writer.write(client.written("POST", "/v1/completions", json.dumps(HI).encode()))
    async with asyncio.timeout(3 * KEEP_ALIVE_SECONDS + 30):
        yield reader, app.state.serving
    writer.close()
    server.end()
    await task

"""A stream whose engine is slow is never silent for long: on a loop whose clock the test moves."""

from __future__ import annotations

import asyncio
import json
from functools import partial

from service.api_key import read_admin_key
from service.app import create_app, open_gateway
from service.openai_stream import KEEP_ALIVE_SECONDS, PING
from service.server import server_config
from service.settings import GatewaySettings
from tests.fixtures.gateway import Client, PromptServer, gateway_settings
from tests.stubs.server import running

HI = {"model": "default", "prompt": "hi", "stream": True, "best_of": 2}


class MovedLoop(asyncio.SelectorEventLoop):
    """Its clock is as far ahead as it is told to be."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


def test_a_slow_engine_is_waited_for_with_one_comment_after_another(tmp_path, engine, reward, redis_url):
    engine.script.delays = [3600.0]
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        # No canary: what its engine takes to answer is nothing on this clock.
        patience = {"canary_after_seconds": 1e6, "hung_after_seconds": 2e6}
        settings = gateway_settings(tmp_path, engine_url, reward_url, redis_url, **patience)
        loop = MovedLoop()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(_three_comments(loop, settings))


async def _three_comments(loop: MovedLoop, settings: GatewaySettings) -> None:
    server = PromptServer(server_config(create_app(partial(open_gateway, settings)), settings))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(30):
        while not server.started:
            await asyncio.sleep(0.005)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname()[:2])
    address = "http://{}:{}".format(*writer.get_extra_info("peername"))
    client = Client(address, read_admin_key(settings.admin_key_file))
    writer.write(client.written("POST", "/v1/completions", json.dumps(HI).encode()))
    async with asyncio.timeout(3 * KEEP_ALIVE_SECONDS + 30):
        await reader.readuntil(PING)
        for _ in range(3):
            loop.ahead += KEEP_ALIVE_SECONDS
            assert (await reader.readuntil(PING)).count(b":") == 1
    writer.close()
    server.end()
    await serving

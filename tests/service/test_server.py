"""What the server does when what runs beside its requests breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from service.draining import Draining
from service.loops import running_loops
from service.server import Server, server_config
from tests.fixtures.gateway import gateway_settings


def serve(settings: Any, loop_of: Any) -> Server:
    """A server of an application that has one loop beside its requests, run to its end."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        async with running_loops(loop_of(server)):
            yield

    server = Server(server_config(FastAPI(lifespan=lifespan), settings), Draining())
    server.run()
    return server


def test_a_loop_that_fails_ends_the_server(tmp_path, unused_port):
    """Its process could answer nothing but errors; ended, whoever watches over it starts another."""

    async def fails(server: Server) -> None:
        while not server.started:
            await asyncio.sleep(0)
        raise OSError("no descriptor is left")

    settings = gateway_settings(tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:2", "unix:///nowhere")
    server = serve(settings.model_copy(update={"port": unused_port}), fails)
    assert server.started
    assert server.has_failed


def test_a_server_that_is_told_to_end_has_not_failed(tmp_path, unused_port):
    async def ends_it(server: Server) -> None:
        while not server.started:
            await asyncio.sleep(0)
        server.should_exit = True
        await asyncio.Event().wait()

    settings = gateway_settings(tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:2", "unix:///nowhere")
    assert not serve(settings.model_copy(update={"port": unused_port}), ends_it).has_failed

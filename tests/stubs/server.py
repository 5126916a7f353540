"""Runs an aiohttp application on a loopback port in a thread of its own, so that tests may be ordinary functions."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

TURNS_TO_ACCEPT = 5
"""Of the event loop, from a connection's arrival to its protocol; more than it takes."""


@contextmanager
def running(app: web.Application, port: int = 0) -> Iterator[str]:
    """The application's base URL while it runs. port: 0 for any; the same one again after a restart."""
    started, url = threading.Event(), ""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        nonlocal url
        # A closed connection cancels its handler, as it aborts the request in vLLM.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        with socket.create_server(("127.0.0.1", port)) as listener:
            await web.SockSite(runner, listener).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            started.set()
            await stop.wait()
            # asyncio 3.11 never closes a connection whose acceptance is under way when its server is closed.
            loop.remove_reader(listener)
            for _ in range(TURNS_TO_ACCEPT):
                await asyncio.sleep(0)
            await runner.cleanup()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            started.set()
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait(10)
    if not url:
        raise RuntimeError("the stub did not start")
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)

"""A stream whose client has gone before its first event: nobody asks for events any more, and the engine must stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, Never

import pytest
from starlette.requests import ClientDisconnect

from service.openai_stream import Streamed, Work


async def _for_ever(*_: Any) -> Never:
    await asyncio.Event().wait()
    raise AssertionError("nothing sets it")


async def _gone() -> dict[str, str]:
    return {"type": "http.disconnect"}


async def _broken(_message: Any) -> Never:
    raise OSError("the client has gone")


@pytest.mark.parametrize(("version", "send"), [("2.3", _for_ever), ("2.4", _broken)])
def test_a_stream_that_nobody_reads_ends_its_work(version, send):
    """2.3: starlette hears that the client has gone, and leaves what it was sending; from 2.4 on sending fails."""
    asyncio.run(_left(version, send))


async def _left(version: str, send: Any) -> None:
    has_ended = asyncio.Event()

    async def make(_hear: Any) -> Any:
        try:
            await _for_ever()
        finally:
            has_ended.set()

    async def events() -> AsyncGenerator[bytes]:
        raise AssertionError("nobody asks for one")
        yield b""

    work = Work(make)
    with pytest.raises(TimeoutError):
        await work.next(0.001)  # it has begun
    response = Streamed(work, events(), {})
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "asgi": {"spec_version": version}}
    with suppress(ClientDisconnect):  # which is for the server
        await response(scope, _gone, send)
    assert has_ended.is_set()

"""Somebody whom webhooks tell: a real HTTP server on loopback that answers from a script and keeps what came.

Owns: the server. Does not own: what is delivered, nor how it is checked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Literal, NamedTuple

from aiohttp import web

from tests.stubs.server import running

Behaviour = int | Literal["hangs", "waits", "endless", "breaks", "redirects"]

WAITS_SECONDS = 10.0
"""For a test that never says so."""


class Received(NamedTuple):
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


@dataclass
class Receiver:
    """Answers one delivery after the other as its script says, and 204 when that has ended."""

    script: list[Behaviour] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    url: str = ""
    goes_on: Event = field(default_factory=Event)
    """Set by a test, it ends what waits."""

    @property
    def ids(self) -> list[str]:
        return [one.id for one in self.received]

    @contextmanager
    def listening(self) -> Iterator[Receiver]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        with running(app) as url:
            self.url = f"{url}/hooks"
            yield self

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.path, headers, await request.read()))
        behaviour = self.script.pop(0) if self.script else 204
        match behaviour:
            case "hangs":
                await asyncio.Event().wait()
            case "waits":
                await asyncio.to_thread(self.goes_on.wait, WAITS_SECONDS)
                return web.Response(status=204)
            case "endless":
                return await self._endless(request)
            case "breaks":
                assert request.transport is not None
                request.transport.abort()
            case "redirects":
                raise web.HTTPTemporaryRedirect("/elsewhere")
            case int():
                return web.Response(status=behaviour)
        return web.Response()

    @staticmethod
    async def _endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 2**16)

"""The end of a gateway: what was accepted is finished, nothing more is accepted.

Owns: whether the end has begun, how many requests are still open, the refusal of those that come after. Does not own:
the signal and the time that is left (server.py). Accepted is what came before the end began, whether it runs or waits.
"""

from __future__ import annotations

from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ShuttingDown, render

ALIVE: Final = "/health"
"""A process that finishes its work is alive, and must not be killed for it."""


class Draining:
    """Known to the server, which begins it, and to the door."""

    def __init__(self) -> None:
        self.has_begun = False
        self.num_open = 0
        """Requests that were accepted and are not answered to their end."""


class Door:
    """ASGI middleware inside the edge, which gives the refusals their request id."""

    def __init__(self, app: ASGIApp, draining: Draining) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and self._draining.has_begun:
                # The next request of this connection is for another gateway.
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        if self._draining.has_begun and scope["path"] != ALIVE:
            refusal = render(ShuttingDown("this gateway is shutting down"), Request(scope).state.request_id)
            await refusal(scope, receive, send_and_close)
            return
        self._draining.num_open += 1
        try:
            await self._app(scope, receive, send_and_close)
        finally:
            self._draining.num_open -= 1

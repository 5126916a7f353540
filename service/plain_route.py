"""A route whose endpoint takes the request and what its path names, and gives a response.

Owns: calling it once the caller has the right that the route declares. Does not own: which rights there are
(access.py). In place of FastAPI's own way to an endpoint, which opens two exit stacks, solves dependencies that are not
there and looks for values to convert: a twentieth of what a completion takes.
"""

from __future__ import annotations

from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import Receive, Scope, Send


class PlainRoute(APIRoute):
    """For routers: `APIRouter(route_class=PlainRoute)`."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._checks = [one.dependency for one in self.dependencies if one.dependency is not None]
        self.app = self._answered

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        for check in self._checks:
            await check(request)
        response = await self.endpoint(request, **scope["path_params"])
        await response(scope, receive, send)

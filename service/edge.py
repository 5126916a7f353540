"""Between the server and the routes: the request's id and caller, bounds and headers of all, errors in our shape.

Owns: `X-Request-Id`, the trace, the number of headers, what every reply tells browsers and caches, the handlers that
turn every exception into the one error body, and the one log line of a failed request. Does not own: the body's format
(errors.py), whose key it is (authentication.py). No line ever holds a payload.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from typing import Final, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid4

from service.authentication import Authentication
from service.errors import (
    BodyTimeout,
    BodyTooLarge,
    GatewayError,
    HeadersTooLarge,
    InvalidField,
    MethodNotAllowed,
    NotFound,
    Unparseable,
    render,
)
from service.headers import ARM, IDEMPOTENCY_KEY, REQUEST_ID, TIMEOUT, UNIT
from service.tracing import TRACE, named, trace_of

MAX_HEADERS: Final = 100
MAX_HEADER_BYTES: Final = 32_768
ALWAYS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""No reply is kept by a cache, taken for another type than it says, or shown inside a page."""
SINGLE: Final = {name.lower().encode(): name for name in (IDEMPOTENCY_KEY, ARM, TIMEOUT, UNIT)}
"""Twice they would say two things, of which each of several proxies may believe another."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger("bonsai.requests")


class Edge:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request_id = request.state.request_id = _request_id(request)
        request.state.reply_headers = dict
        # Also where there is none: the next request of a connection may inherit what the one before it was in.
        TRACE.set(trace_of(scope["headers"]))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = {**ALWAYS, REQUEST_ID: request_id, **request.state.reply_headers()}
                MutableHeaders(scope=message).update(headers)
            await send(message)

        if (error := _wrong_headers(scope)) is not None:
            # Where its body ends is not known, or not worth to be read.
            refused = _rendered(request, error, {"Connection": "close"})
            await refused(scope, receive, send_with_id)
        else:
            request.state.caller = cast(Authentication, request.app.state.authentication).caller(scope)
            await self._app(scope, receive, send_with_id)


def _wrong_headers(scope: Scope) -> GatewayError | None:
    """What is wrong with the headers of a request whoever sent it."""
    if len(scope["headers"]) > MAX_HEADERS:
        return HeadersTooLarge(f"a request may have at most {MAX_HEADERS} headers")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        return HeadersTooLarge(f"a request's headers may take at most {MAX_HEADER_BYTES} bytes")
    names = [name for name, _ in scope["headers"]]
    if b"content-length" in names and b"transfer-encoding" in names:
        # A proxy in front may have believed the other one of them (RFC 9112, 6.3).
        return Unparseable("a request may have a Content-Length or a Transfer-Encoding, not both")
    if names.count(b"host") != 1 and scope["http_version"] == "1.1":
        return Unparseable("a request must have one Host (RFC 9112, 3.2)")
    if (twice := next((said for name, said in SINGLE.items() if names.count(name) > 1), None)) is not None:
        return Unparseable(f"a request has at most one {twice}", param=twice)
    return None


def install_edge(app: FastAPI) -> None:
    """Put the edge around the app and our error body into every answer that is not a success."""
    app.add_middleware(Edge)
    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        GatewayError: _gateway_error,
        HTTPException: _http_exception,
        RequestValidationError: _path_error,
        Exception: _unexpected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _request_id(request: Request) -> str:
    given = request.headers.get(REQUEST_ID, "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid4().hex}"


async def _gateway_error(request: Request, error: Exception) -> Response:
    return _rendered(request, cast(GatewayError, error))


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router raises: no such path, or not with this method. Whom nobody knows learns neither."""
    raised = cast(HTTPException, error)
    if isinstance(request.state.caller, GatewayError):
        return _rendered(request, request.state.caller)
    if raised.status_code == MethodNotAllowed.status:
        return _rendered(request, MethodNotAllowed("this path does not take this method"), _allowed(request))
    if raised.status_code == NotFound.status:
        return _rendered(request, NotFound("there is nothing at this path"))
    return _rendered(request, GatewayError("the request could not be handled"))


def _allowed(request: Request) -> dict[str, str]:
    """Of all routes at this path; the router looks at the first one alone."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return {"Allow": ", ".join(sorted({method for route in routes for method in route.methods}))}


async def _path_error(request: Request, _error: Exception) -> Response:
    return _rendered(request, InvalidField("a part of the path or the query is not valid"))


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("request %s failed", named(request.state.request_id), exc_info=error)
    return _rendered(request, GatewayError("the gateway failed; the log has the details under this request's id"))


def _rendered(request: Request, error: GatewayError, headers: object = None) -> Response:
    request_id = request.state.request_id
    level = logging.WARNING if error.status >= 500 else logging.INFO
    log.log(level, "%s %d %s %s", named(request_id), error.status, error.code, error.param or "")
    response = render(error, request_id, cast("dict[str, str] | None", headers))
    response.headers.update({**ALWAYS, REQUEST_ID: request_id})
    if error.status in (BodyTimeout.status, BodyTooLarge.status):
        # The rest of the body is still on its way, and nobody will read it.
        response.headers["Connection"] = "close"
    return response

"""HTTP/1.1 to one engine, as much of it as a call needs: a request in one write, its answer as it comes.

Owns: the connections that are kept for the next call and their number, how long an answer may be, where it ends. Does
not own: what a failure means (engine_http.py), deadlines (the caller's `asyncio.timeout`). Engines are on this machine:
there are no redirects, no compression and no TLS. Whoever waits is woken when there is what he waits for, not by every
packet (docs/decisions/0018).
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from service.tracing import TRACE

CONNECT_SECONDS: Final = 1.0
MAX_CONNECTIONS: Final = 512
IDLE_SECONDS: Final = 2.0
"""Shorter than the engine's own five: a connection it is about to close must not carry a request."""


class Unreachable(ConnectionError):
    """There is no connection: nothing was asked."""


class BrokenOff(ConnectionError):
    """The connection ended before the answer did, or what came was no HTTP."""


class TooLong(Exception):
    """The answer has more bytes than it may have; the text says how many."""


class Connection(asyncio.Protocol):
    """One connection, and the answer that it carries."""

    def __init__(self) -> None:
        self.status: int | None = None
        """None until the headers are here."""
        self.is_whole = True
        """Nothing of the answer is still to come."""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.idle_since = 0.0
        self._parser = HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._room = self._most = 0
        self._is_kept_open = True
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_awaited: Callable[[], bool] = bool

    # --- for the caller ------------------------------------------------------------------------------------

    def send(self, request: bytes, max_bytes: int, came: Callable[[], None]) -> None:
        """Begin the next call. came: told of each piece of the answer's body. Raises BrokenOff."""
        if self._transport.is_closing():
            raise BrokenOff
        self.status, self.is_whole, self._pieces, self._came = None, False, [], came
        self._room = self._most = max_bytes
        self._transport.write(request)

    async def head(self) -> int:
        """The status, when it is here. Raises BrokenOff, TooLong."""
        await self._until(lambda: self.status is not None)
        return cast(int, self.status)

    async def piece(self) -> bytes:
        """What has come of the body and was not taken yet; nothing at its end. Raises BrokenOff, TooLong."""
        await self._until(lambda: self.is_whole or bool(self._pieces))
        piece, self._pieces = b"".join(self._pieces), []
        return piece

    async def answer(self) -> tuple[int, bytes]:
        """Status and body. Raises BrokenOff, TooLong."""
        await self._until(lambda: self.is_whole)
        return await self.head(), await self.piece()

    async def whole(self) -> None:
        """Wait for the end of the answer, or for a status that is not 200. Raises BrokenOff, TooLong."""
        await self._until(lambda: self.is_whole or self.status not in (None, 200))

    @property
    def can_be_used_again(self) -> bool:
        return self.is_whole and self._is_kept_open and not self._transport.is_closing()

    def leave(self) -> None:
        """At once, whatever was still to be written: that is what makes an engine stop."""
        self._transport.abort()

    async def _until(self, is_awaited: Callable[[], bool]) -> None:
        self._is_awaited = is_awaited
        if self._failure is None and not is_awaited():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure

    def _tell(self) -> None:
        if self._waiter is not None and not self._waiter.done() and (self._failure or self._is_awaited()):
            self._waiter.set_result(None)

    def _fail(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self._transport.abort()

    # --- for the event loop --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._room -= len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self._fail(BrokenOff())
        if self._room < 0 and not self.is_whole:
            self._fail(TooLong(f"it is longer than {self._most} bytes"))
        self._tell()

    def connection_lost(self, _error: Exception | None) -> None:
        # Without a length an answer ends with its connection, and then is never told to keep that open.
        ends_here = self.status is not None and not self._parser.should_keep_alive()
        if not self.is_whole and not ends_here:
            self._failure = self._failure or BrokenOff()
        self.is_whole = True
        self._tell()
        self.lost.set_result(None)

    # --- for the parser ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.is_whole:
            raise ValueError("nobody asked for this answer")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._came()

    def on_message_complete(self) -> None:
        if cast(int, self.status) < 200:  # "continue" and the like: the answer comes behind it
            self.status = None
            return
        self.is_whole, self._is_kept_open = True, self._parser.should_keep_alive()


class Connections:
    """The connections to one engine. Must be made inside a running event loop and closed."""

    def __init__(self, url: str) -> None:
        """url: unix:///path or http://127.0.0.1:port."""
        parts, loop = urlsplit(url), asyncio.get_running_loop()
        if parts.scheme == "unix":
            self._open = partial(loop.create_unix_connection, Connection, parts.path)
        else:
            self._open = partial(loop.create_connection, Connection, parts.hostname, parts.port)
        self._host = parts.netloc or "engine"
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._idle: deque[Connection] = deque()
        """The one that was used last is the last one."""
        self._sweep: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._clock = loop.time

    @asynccontextmanager
    async def call(
        self, method: str, path: str, body: bytes, *, max_bytes: int, came: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Connection]:
        """The connection that carries the answer. Leaving before its end closes it. body: JSON, or nothing. came: told
        of each piece of the answer's body. Raises Unreachable, BrokenOff."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n"
        if body:
            head += "Content-Type: application/json\r\n"
        head += TRACE.get().lines
        async with self._room:
            connection = self._kept() or await self._opened()
            try:
                connection.send(head.encode() + b"\r\n" + body, max_bytes, came)
                yield connection
            finally:
                self._put_back(connection)

    async def close(self) -> None:
        """Those that carry an answer are not kept any more when it has ended."""
        self._is_closed = True
        closing = list(self._idle)
        self._close_idle(since=math.inf)
        for connection in closing:
            await connection.lost

    def _kept(self) -> Connection | None:
        self._close_idle(since=self._clock() - IDLE_SECONDS)
        while self._idle:
            connection = self._idle.pop()
            if connection.can_be_used_again:
                return connection
        return None

    async def _opened(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await self._open()
        except OSError as error:  # so is TimeoutError
            raise Unreachable from error
        return connection

    def _put_back(self, connection: Connection) -> None:
        if self._is_closed or not connection.can_be_used_again:
            connection.leave()
            return
        connection.idle_since = self._clock()
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._sweep_up)

    def _sweep_up(self) -> None:
        """So that also what nobody asks for again is closed."""
        self._close_idle(since=self._clock() - IDLE_SECONDS)
        again = asyncio.get_running_loop().call_later
        self._sweep = again(IDLE_SECONDS, self._sweep_up) if self._idle else None

    def _close_idle(self, since: float) -> None:
        while self._idle and self._idle[0].idle_since <= since:
            self._idle.popleft().leave()

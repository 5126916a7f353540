"""The HTTP server: uvicorn, with an end that loses nothing and patience that ends.

Owns: what a signal does, how long a connection may take for its headers and leave a reply unread, what becomes of what
comes behind a request that runs. Does not own: what is still accepted (draining.py), the time a body may take
(json_body.py).
"""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any, Final, cast
from uuid import uuid4

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.draining import Draining
from service.edge import MAX_HEADER_BYTES
from service.errors import GatewayError, HeadersTimeout, HeadersTooLarge, render
from service.settings import GatewaySettings

YOUNG_OBJECTS: Final = 20_000
"""Between two searches for garbage among the youngest; a request makes about a thousand, and nearly all of them go by
themselves."""
LEAST_PROGRESS_BYTES: Final = 16_384
"""Of a reply that waits for its reader, within the time that it may be left unread."""


def server_config(app: FastAPI, settings: GatewaySettings) -> uvicorn.Config:
    """How the gateway is served."""
    protocol = partial(
        ImpatientProtocol,
        header_seconds=settings.header_seconds,
        max_header_bytes=MAX_HEADER_BYTES,
        unread_seconds=settings.unread_seconds,
    )
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # uvicorn only ever calls it.
        http=cast("type[asyncio.Protocol]", protocol),
        loop="uvloop",
        ws="none",
        lifespan="on",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )


class Server(uvicorn.Server):
    """uvicorn closes its listener at once and cancels what the time does not suffice for. Here the listener stays open
    until everything accepted is answered, so that whoever comes meanwhile is told where he is."""

    def __init__(self, config: uvicorn.Config, draining: Draining) -> None:
        super().__init__(config)
        self._draining = draining
        self._seconds = config.timeout_graceful_shutdown or 0
        self._latest = math.inf
        self.has_failed = False
        """What runs beside the requests ended with an error: nothing would ever be right again in this process."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """What lives as long as the process is left out of every later search for garbage: such a search holds up all
        requests, by 50 to 80 ms where it looks at everything that was imported."""
        await super().startup(sockets)
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, 10, 10)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end. The second is the end, as `kill -9` is: what was promised is on disk."""
        if self._draining.has_begun:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._captured_signals.append(sig)
        self._draining.has_begun = True
        self._latest = monotonic() + self._seconds

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the loop, and then uvicorn shuts down. uvicorn itself goes on answering
        when its lifespan fails."""
        left = self._latest - monotonic()
        if self._draining.has_begun and (self._draining.num_open == 0 or left <= 0):
            self.config.timeout_graceful_shutdown = max(0, math.ceil(left))
            self.should_exit = True
        if not self._draining.has_begun and (self.lifespan.error_occurred or self.lifespan.shutdown_failed):
            self.has_failed = self.should_exit = True
        return await super().on_tick(counter)


class ImpatientProtocol(HttpToolsProtocol):
    """One connection. uvicorn waits for ever for a first request, for the end of headers and for a reader, and takes
    headers of any length.

    It also queues a request that comes while another runs, and reads no more until then: nobody would hear that the
    client has gone, and engines would work on for it. Here a request that comes behind one that runs is read and thrown
    away, and the connection is closed after the answer: the client has to ask for the rest again (RFC 9112, 9.3.2). A
    client that has all of an answer may ask for the next thing while whoever sent it has not ended yet; that is queued.
    """

    def __init__(
        self, *args: Any, header_seconds: float, max_header_bytes: int, unread_seconds: float, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self._header_seconds = header_seconds
        self._max_header_bytes = max_header_bytes
        self._header_bytes: int | None = None
        """Of a request whose headers have begun and not ended."""
        self._is_overtaken = False
        """Whether another request has begun behind the one that runs."""
        self._unread_seconds = unread_seconds
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Nothing is kept for a slow reader beyond what is being written: the next chunk waits with whoever makes it.
        transport.set_write_buffer_limits(high=0)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._is_overtaken:
            return
        if self._header_bytes is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes is not None and self._header_bytes > self._max_header_bytes:
            self._refuse(HeadersTooLarge(f"a request's headers may take at most {self._max_header_bytes} bytes"))
        if self.cycle is None or self.cycle.response_complete:
            self._expect_headers()
        else:
            self._expect_no_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.cycle is None or _is_answered(self.cycle):
            self._header_bytes = 0
        else:
            self._is_overtaken = True
            self.cycle.keep_alive = False

    def on_headers_complete(self) -> None:
        if not self._is_overtaken:
            self._header_bytes = None
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_overtaken:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_overtaken:
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._expect_no_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_no_headers()
        self._expect_no_reading()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        """Whole headers from here on within the time, however many pieces they come in."""
        if self._headers_due is None and not self.transport.is_closing():
            self._headers_due = self.loop.call_later(self._header_seconds, self._without_headers)

    def _expect_no_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _without_headers(self) -> None:
        if self._header_bytes is not None and (self.cycle is None or self.cycle.response_complete):
            self._refuse(HeadersTimeout(f"the headers did not arrive within {self._header_seconds:g} s"))
        self.transport.close()

    def _refuse(self, error: GatewayError) -> None:
        """Before there is a request that the app could answer."""
        refusal = render(error, f"req_{uuid4().hex}", {"Connection": "close"})
        lines = [STATUS_LINE[refusal.status_code], *(b"%s: %s\r\n" % header for header in refusal.raw_headers)]
        self.transport.write(b"".join([*lines, b"\r\n", bytes(refusal.body)]))
        self.transport.close()

    def _expect_reading(self, unread: int) -> None:
        self._reading_due = self.loop.call_later(self._unread_seconds, self._without_reading, unread)

    def _expect_no_reading(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def _without_reading(self, before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread > before - LEAST_PROGRESS_BYTES:
            self.transport.abort()
        else:
            self._expect_reading(unread)


def _is_answered(cycle: RequestResponseCycle) -> bool:
    """Whether the client has all of the answer."""
    if cycle.response_complete or not cycle.response_started:
        return cycle.response_complete
    has_length = not cycle.chunked_encoding
    return has_length and (cycle.expected_content_length == 0 or cycle.scope["method"] == "HEAD")

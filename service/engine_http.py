"""One HTTP connection pool to one engine, and the one place where its failures get a meaning.

Owns: Unix socket or loopback, bounded bytes, refused or dead engines translated into the gateway's errors.
Does not own: what is asked (vllm.py, reward.py), deadlines (the caller's `asyncio.timeout`), retries: there are
none, a call that an engine accepted was paid for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import Any

import aiohttp
from pydantic_core import to_json

from bon_algos.vllm_protocol import MalformedReply, RefusedReply, json_object
from service.errors import EngineBroken, EngineRefused, Unavailable

CONNECT_SECONDS = 1.0
MAX_CONNECTIONS = 512
IDLE_SECONDS = 2.0
"""Shorter than the engine's own five: a connection it is about to close must not carry a request."""
MAX_REPLY_BYTES = 16 * 2**20
_END = b"[DONE]"
_JSON = {"Content-Type": "application/json"}


class EngineHttp:
    """Requests to one engine. Must be made inside a running event loop and closed."""

    def __init__(
        self,
        url: str,
        *,
        title: str,
        unavailable: type[Unavailable],
        not_served: type[Unavailable],
        broken_code: str,
    ) -> None:
        """url: unix:///path or http://127.0.0.1:port. title: what messages call it. unavailable: raised when it
        cannot be reached or has no room. not_served: raised when it does not know the model. broken_code: the
        code of EngineBroken when it did not deliver."""
        self._title = title
        self._unavailable = unavailable
        self._not_served = not_served
        self._broken_code = broken_code
        connector: aiohttp.BaseConnector
        if url.startswith("unix://"):
            base = "http://engine"
            connector = aiohttp.UnixConnector(
                url.removeprefix("unix://"), limit=MAX_CONNECTIONS, keepalive_timeout=IDLE_SECONDS
            )
        else:
            base = url
            connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS, keepalive_timeout=IDLE_SECONDS)
        self._session = aiohttp.ClientSession(
            base,
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, seconds: float) -> dict[str, Any]:
        """A JSON object; no answer within `seconds` means the engine is away."""
        with self.translated():
            async with asyncio.timeout(seconds), self._session.get(path) as response:
                self._require_ok(response)
                return json_object(await _read_bounded(response))

    async def get_text(self, path: str, seconds: float) -> tuple[int, str]:
        """Status and text; whatever the status, it is an answer."""
        with self.translated():
            async with asyncio.timeout(seconds), self._session.get(path) as response:
                return response.status, (await _read_bounded(response)).decode("utf-8", "replace")

    async def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The answer to a JSON object. How long to wait is the caller's affair."""
        with self.translated():
            async with self._session.post(path, data=to_json(body), headers=_JSON) as response:
                self._require_ok(response)
                return await _read_bounded(response)

    async def post_for_status(self, path: str, body: dict[str, Any], seconds: float) -> tuple[int, str]:
        """Status and text of a request whose refusal is an answer."""
        with self.translated():
            async with (
                asyncio.timeout(seconds),
                self._session.post(path, data=to_json(body), headers=_JSON) as response,
            ):
                return response.status, (await _read_bounded(response)).decode("utf-8", "replace")

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any], max_bytes: int) -> AsyncIterator[Events]:
        """A server-sent stream. Leaving before its end closes the connection, which is what makes the engine stop
        working on it."""
        with self.translated():
            async with self._session.post(path, data=to_json(body), headers=_JSON, read_bufsize=max_bytes) as response:
                self._require_ok(response)
                async with aclosing(Events(response, max_bytes)) as events:
                    yield events

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Failures of the connection and malformed answers, in the gateway's words."""
        try:
            yield
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise self._unavailable(f"the {self._title} cannot be reached") from error
        except TimeoutError as error:
            raise self._unavailable(f"the {self._title} does not answer") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineBroken(f"the {self._title} broke off its answer", code=self._broken_code) from error
        except RefusedReply as error:
            raise EngineRefused(f"the {self._title} refuses the request") from error
        except MalformedReply as error:
            raise EngineBroken(f"the {self._title} gave a malformed answer: {error}", code=self._broken_code) from error

    def _require_ok(self, response: aiohttp.ClientResponse) -> None:
        if response.status in (429, 503):
            raise self._unavailable(f"the {self._title} has no room for this request now")
        if response.status == 404:
            raise self._not_served(f"the {self._title} does not serve this model now")
        if response.status == 400:
            raise EngineRefused(f"the {self._title} refuses the request")
        if response.status != 200:
            raise EngineBroken(f"the {self._title} answered with status {response.status}", code=self._broken_code)


class Events:
    """The data of each event up to `[DONE]`; a stream that ends without it was cut."""

    def __init__(self, response: aiohttp.ClientResponse, max_bytes: int) -> None:
        self._response = response
        self._max_bytes = max_bytes
        self._events = self._read()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._events

    async def aclose(self) -> None:
        await self._events.aclose()

    async def whole(self, until: float) -> None:
        """Wait until everything is here, or for so long; a time of the event loop's clock. To be woken once, and not by
        every piece, is a tenth of what a request takes."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._response.content.wait_eof()

    async def _read(self) -> AsyncGenerator[bytes, None]:
        pending, total = b"", 0
        async for piece in self._response.content.iter_any():
            total += len(piece)
            if total > self._max_bytes:
                raise MalformedReply(f"it is longer than {self._max_bytes} bytes")
            *events, pending = (pending + piece).split(b"\n\n")
            for event in events:
                data = event.strip().removeprefix(b"data:").strip()
                if data == _END:
                    # To the end of the connection's turn, so that it can be used again.
                    await self._response.read()
                    return
                if data and not event.startswith(b":"):
                    yield data
        raise MalformedReply("it ends in the middle")


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MAX_REPLY_BYTES:
            raise MalformedReply(f"it is longer than {MAX_REPLY_BYTES} bytes")
    return bytes(body)

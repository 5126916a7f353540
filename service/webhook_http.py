"""One attempt to deliver: a POST, and what came of it.

Owns: the time an attempt may take, what of an answer is read (its status, nothing else), the words for what went wrong.
Does not own: where it may lead (webhook_reach.py), further attempts (webhook_delivery.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import aiohttp

from service.webhook_reach import AddressRefused, Reach

ATTEMPT_SECONDS: Final = 15.0
GONE: Final = 410
MAX_CONNECTIONS: Final = 256


class Answer(NamedTuple):
    """status: None where none came. error: why not, or what is wrong with it; "" where nothing is."""

    status: int | None
    error: str = ""

    @property
    def is_accepted(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Sender:
    """Made by `open_sender`."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """What became of one attempt, whatever it was. A redirect is followed nowhere: it is no acceptance."""
        try:
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                # Before anything of the body is waited for: it may never end.
                response.close()
                return _judged(response.status)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Answer(None, _reason(error))


@asynccontextmanager
async def open_sender(reach: Reach, *, seconds: float = ATTEMPT_SECONDS) -> AsyncGenerator[Sender]:
    """seconds: that one attempt may take, from the name's look-up to the answer's head."""
    connector = aiohttp.TCPConnector(
        resolver=reach.resolver,
        socket_factory=reach.socket_for,
        use_dns_cache=False,
        force_close=True,
        limit=MAX_CONNECTIONS,
    )
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=seconds),
        headers={"Content-Type": "application/json", "User-Agent": "bonsai-webhooks"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    ) as session:
        yield Sender(session)


@asynccontextmanager
async def sending(reach: Reach) -> AsyncGenerator[Sender]:
    """The sender of a whole gateway, with which the resolver ends too."""
    try:
        async with open_sender(reach) as sender:
            yield sender
    finally:
        await reach.resolver.close()


def _judged(status: int) -> Answer:
    if 200 <= status < 300:
        return Answer(status)
    if 300 <= status < 400:
        return Answer(status, "it redirects, which is not followed")
    return Answer(status, "it is gone" if status == GONE else "it did not accept")


def _reason(error: Exception) -> str:
    """Never the exception's own words, which may name what is behind a private address."""
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, AddressRefused):
        return "its address is not public"
    match error:
        case TimeoutError():
            return "no answer in time"
        case aiohttp.ClientConnectorDNSError():
            return "its name was not found"
        case aiohttp.ClientSSLError():
            return "TLS could not be agreed on, or its certificate is not good"
        case aiohttp.ClientConnectorError():
            return "no connection"
        case aiohttp.ClientResponseError():
            return "it does not speak HTTP"
        case _:
            return "the connection broke"

"""Whether an engine still samples: one token, asked for when none came for a while.

Owns: when it is asked for, how long it may take, and tripping or closing the breaker by it. Does not own: the breaker's
states (breaker.py), what becomes of an engine that failed (replica.py).

A canary waits as long as other tokens come: an engine with much to do is not hung. One behind an open breaker is its
probe. Canaries are in no ledger and in nobody's count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic

from service.breaker import Breaker
from service.errors import EngineBroken, Unavailable


class Canary:
    """The canaries of one engine."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[None]],
        breaker: Breaker,
        tell: Callable[[str, bool], None],
        *,
        after: float,
        hung_after: float,
    ) -> None:
        """ask: returns when the engine gave a token. tell: hears after each canary why it failed, "" if it did not,
        and whether because no token came. after: seconds without a token until one is asked for. hung_after: seconds
        without a token until a canary has failed; larger."""
        self._ask = ask
        self._breaker = breaker
        self._tell = tell
        self._after = after
        self._patience = hung_after - after
        self._limit: asyncio.Timeout | None = None
        self._last_token_at = monotonic()
        self._wake = asyncio.Event()

    def token_came(self) -> None:
        """By whichever request."""
        self._last_token_at = monotonic()
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(self._last_token_at + self._patience)

    def look_again(self) -> None:
        """The breaker has changed."""
        self._wake.set()

    async def run(self) -> None:
        """Ask whenever it is time, until cancelled."""
        while True:
            wait = self._due() - monotonic()
            if wait <= 0:
                await self._send()
                continue
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    def _due(self) -> float:
        return self._breaker.probe_at if self._breaker.state == "open" else self._last_token_at + self._after

    async def _send(self) -> None:
        self._breaker.try_probe()
        try:
            async with asyncio.timeout(self._patience) as self._limit:
                await self._ask()
        except TimeoutError:
            self._failed("it gave no token when one was asked for", is_hung=True)
        except (Unavailable, EngineBroken) as error:
            self._failed(error.message, is_hung=False)
        else:
            self._last_token_at = monotonic()
            self._breaker.close()
            self._tell("", False)
        finally:
            self._limit = None

    def _failed(self, reason: str, *, is_hung: bool) -> None:
        self._breaker.trip()
        self._tell(reason, is_hung)

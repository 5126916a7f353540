"""Who writes into the archive: one process at a time, as long as it says so.

Owns: taking the lease, keeping it by a thread, asking before an effect. Does not own: what is written. The lease ends
by Redis' clock; who was frozen past its end is told at the next `confirm`.
"""

from __future__ import annotations

import logging
import threading
from secrets import token_hex
from types import TracebackType
from typing import Final, Self

import redis

from bon_algos.contracts import COMPACTOR_LEASE

# KEYS: lease. ARGV: token, ms. Takes the lease, or extends our own. One that ends later than any could is of before the
# clock was set back: whose it was may be dead for long, and asks before every effect if it is not.
_TAKE: Final = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] and redis.call('PTTL', KEYS[1]) <= tonumber(ARGV[2]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# KEYS: lease. ARGV: token.
_GIVE_BACK: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
BEATS: Final = 3
"""In the time of one lease."""
log = logging.getLogger("bonsai.compactor")


class ArchiveLeaseLost(Exception):
    """Another process may write by now: whatever was under way is its to repeat."""


class ArchiveLease:
    """A context: taken where it is entered, given back where it is left. Raises ArchiveLeaseLost where it is held."""

    def __init__(self, client: redis.Redis, seconds: float) -> None:
        self._client = client
        self._seconds = seconds
        self._token = token_hex(16)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="archive-lease", daemon=True)

    def __enter__(self) -> Self:
        if not self._take():
            raise ArchiveLeaseLost("another process writes into the archive")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        try:
            self._client.eval(_GIVE_BACK, 1, COMPACTOR_LEASE, self._token)
        except redis.RedisError as away:
            log.warning("the archive's lease is left to run out: %s", type(away).__name__)

    def confirm(self) -> None:
        """Have Redis say that the lease is ours, and for a whole time of it. Raises ArchiveLeaseLost, RedisError."""
        if not self._take():
            raise ArchiveLeaseLost("the lease ran out, and another process writes into the archive")

    def _take(self) -> bool:
        return bool(self._client.eval(_TAKE, 1, COMPACTOR_LEASE, self._token, round(self._seconds * 1000)))

    def _keep(self) -> None:
        while not self._stopping.wait(self._seconds / BEATS):
            try:
                self._take()
            except redis.RedisError as away:
                log.warning("the archive's lease is not extended: %s", type(away).__name__)

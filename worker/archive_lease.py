"""Who writes into the archive: one process at a time, as long as it says so.

Owns: taking the lease, keeping it by a thread, asking before an effect. Does not own: what is written. The lease ends
by Redis' clock; who was frozen past its end is told at the next `confirm`.
"""

from __future__ import annotations

import logging
import threading
from secrets import token_hex
from types import TracebackType
from typing import Final, Self, cast

import redis

from archive.fence import Overtaken
from archive.reading import Archive
from bon_algos.contracts import COMPACTOR_EPOCH, COMPACTOR_LEASE

# KEYS: lease, epoch. ARGV: token, ms, the newest epoch in the archive, which Redis may have lost. -> 0 held, or the
# new epoch. One that ends later than any could is of before the clock was set back: whose it was may be dead for long,
# and is overtaken if it is not.
_TAKE: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('PTTL', KEYS[1]) <= tonumber(ARGV[2]) then return 0 end
local epoch = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[2], epoch)
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return epoch
"""
# KEYS: lease, epoch. ARGV: token, ms, epoch. Extends our own, also one that ran out when nobody came in between.
_KEEP: Final = """
local holder = redis.call('GET', KEYS[1])
if (holder and holder ~= ARGV[1]) or redis.call('GET', KEYS[2]) ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# KEYS: lease. ARGV: token.
_GIVE_BACK: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
BEATS: Final = 3
"""In the time of one lease."""
log = logging.getLogger("bonsai.compactor")


class ArchiveLease:
    """A context: taken where it is entered, given back where it is left. Raises Overtaken where it is held."""

    def __init__(self, client: redis.Redis, archive: Archive, seconds: float) -> None:
        self.epoch = 0
        """Of ours, once it is taken."""
        self._client = client
        self._archive = archive
        self._seconds = seconds
        self._token = token_hex(16)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="archive-lease", daemon=True)

    def __enter__(self) -> Self:
        newest = self._archive.manifest.newest_epoch()
        self.epoch = self._ask(_TAKE, newest)
        if not self.epoch:
            raise Overtaken("another process writes into the archive")
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
        """Have Redis say that the lease is ours, has been all the time, and is for a whole time of it. Raises
        Overtaken, RedisError."""
        if not self._ask(_KEEP, self.epoch):
            raise Overtaken("the lease ran out, and another process writes into the archive, or did")

    def _ask(self, script: str, epoch: int) -> int:
        keys = (COMPACTOR_LEASE, COMPACTOR_EPOCH)
        return cast(int, self._client.eval(script, len(keys), *keys, self._token, round(self._seconds * 1000), epoch))

    def _keep(self) -> None:
        while not self._stopping.wait(self._seconds / BEATS):
            try:
                self._ask(_KEEP, self.epoch)
            except redis.RedisError as away:
                log.warning("the archive's lease is not extended: %s", type(away).__name__)

"""One of several gateways does what must not be done by two at once: a lease that its holder extends.

Owns: taking and keeping it. Does not own: what the holder does, which must be safe all the same: a holder that was held
up may find that another has taken over.
"""

from __future__ import annotations

from typing import Final
from uuid import uuid4

from redis.asyncio import Redis

from service.store import translated

# KEYS: lease. ARGV: token, ms. Takes the lease, or extends our own.
_LEASE: Final = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""


class Leadership:
    """This gateway's claim to one lease."""

    def __init__(self, redis: Redis, key: str, *, seconds: float) -> None:
        """seconds: how long it lasts when it is not extended."""
        self._key = key
        self._milliseconds = int(seconds * 1000)
        self._token = uuid4().hex
        self._script = redis.register_script(_LEASE)

    async def is_ours(self) -> bool:
        """Whether we hold it, from now on for its whole time. Raises StoreUnavailable."""
        with translated():
            return bool(await self._script(keys=[self._key], args=[self._token, self._milliseconds]))

"""A worker's connections to Redis: no command takes longer than a lease can bear.

Owns their bounds. Does not own what is asked. A link may go silent while Redis is well: what is asked over it fails,
and over a new one there are several chances before the lease is over.
"""

from __future__ import annotations

from typing import Final

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

LONGEST_SILENCE_SECONDS: Final = 5.0
SILENCES_IN_A_LEASE: Final = 5
TRIES_AGAIN: Final = 5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 8.0


def open_redis(url: str, lease_seconds: float, *, tries_again: bool = False) -> redis.Redis:
    """A client whose commands fail within a fraction of the lease.

    tries_again: for what may be carried out twice, as reading may; it is asked again for about a quarter of a minute.
    """
    seconds = min(LONGEST_SILENCE_SECONDS, lease_seconds / SILENCES_IN_A_LEASE)
    again = Retry(ExponentialBackoff(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS), TRIES_AGAIN)
    return redis.Redis.from_url(
        url,
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        retry=again if tries_again else Retry(NoBackoff(), 0),
    )

"""The control plane's connection to Redis: text in and out, bounded in time, failures translated.

Owns: how the connection is opened, what its failures mean to a caller, optimistic transactions.
Does not own: any key (docs/redis.md).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.exceptions import OutOfMemoryError, RedisError

from bon_algos.crash_points import crash_point
from service.errors import StoreFull, StoreUnavailable

T = TypeVar("T")
DRIVER: Final = DriverInfo()
"""Made once: redis-py would read a file of its package for every new connection, and fail where there is no descriptor
left for that."""


def open_redis(url: str, *, connect_seconds: float = 1.0, reply_seconds: float = 2.0, in_bytes: bool = False) -> Redis:
    """A client of `redis://`, `rediss://` or `unix:///path` that answers in text, unless bytes are wanted, and never
    retries: a command that timed out may have been carried out."""
    return Redis.from_url(
        url,
        decode_responses=not in_bytes,
        socket_connect_timeout=connect_seconds,
        socket_timeout=reply_seconds,
        retry=Retry(NoBackoff(), 0),
        driver_info=DRIVER,
    )


@contextmanager
def translated() -> Iterator[None]:
    """Redis away is 503, Redis full (noeviction) is 507."""
    try:
        yield
    except OutOfMemoryError as error:
        raise StoreFull("Redis has no memory left; nothing was changed") from error
    except RedisError as error:
        raise StoreUnavailable("Redis did not answer; whether the change was made is not known") from error


async def transact(redis: Redis, keys: Sequence[str], change: Callable[[Pipeline], Awaitable[T]]) -> T:
    """Run `change` as one transaction over `keys`: it reads, calls `multi()`, queues its writes. It runs again
    when somebody else wrote one of the keys in between."""
    with translated():
        crash_point("transaction.asked")
        answer = cast(T, await redis.transaction(change, *keys, value_from_callable=True))
        crash_point("transaction.committed")
        return answer

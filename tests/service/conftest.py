"""The fixtures of a whole gateway, for every test of the service."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from service.store import open_redis
from tests.fixtures.gateway import engine, reward, still_world, store, unused_port, world

__all__ = ["engine", "reward", "still_world", "store", "unused_port", "world"]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests (`pytest.mark.anyio`) run on asyncio, as the gateway does."""
    return "asyncio"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """As the gateway opens it; empty."""
    async with open_redis(redis_url) as client:
        yield client

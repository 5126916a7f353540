"""The fixtures of a whole gateway, for every test of the service."""

import pytest

from tests.fixtures.gateway import engine, reward, still_world, unused_port, world

__all__ = ["engine", "reward", "still_world", "unused_port", "world"]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests (`pytest.mark.anyio`) run on asyncio, as the gateway does."""
    return "asyncio"

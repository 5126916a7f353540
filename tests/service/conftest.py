"""The fixtures of a whole gateway, for every test of the service."""

from tests.fixtures.gateway import engine, reward, unused_port, world

__all__ = ["engine", "reward", "unused_port", "world"]

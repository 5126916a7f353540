"""Where the registry of a user's stack is: its gateway, its Redis, its artefacts.

Owns the way from `--dir` and `--redis-url` to them. Starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import ValidationError

from bonsai.client import BonsaiClient, open_client
from bonsai.leftovers import RunRecord
from bonsai.runtime_directory import StateDirectory, runtime_directory


class NoStack(Exception):
    """Nothing runs there; the text says what to do."""


def state_of(directory: Path) -> StateDirectory:
    root = directory.absolute()
    return StateDirectory(root, runtime_directory(root, os.environ))


def redis_url_of(directory: Path, redis_url: str | None) -> str:
    """Raises NoStack."""
    if redis_url is not None:
        return redis_url
    socket = state_of(directory).redis_socket
    if not socket.exists():
        raise NoStack(f"no stack runs in {directory}: start it with `bonsai up`, or give --redis-url")
    return f"unix://{socket}"


@asynccontextmanager
async def client_of(directory: Path) -> AsyncIterator[BonsaiClient]:
    """A client of the running stack's gateway with its administrator's key. Raises NoStack."""
    state = state_of(directory)
    try:
        url = RunRecord.model_validate_json(state.record.read_bytes()).url
        key = state.admin_key.read_text().strip()
    except (OSError, ValidationError) as error:
        raise NoStack(f"no stack runs in {directory}: start it with `bonsai up`") from error
    async with open_client(url, api_key=key) as client:
        yield client

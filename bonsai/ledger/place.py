"""Where a ledger is: a stack's directory, or a Redis and an archive of the user's.

Owns: finding both, and turning what can go wrong into words. Does not own: what is done with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis
from pydantic import ValidationError

from archive.fence import Overtaken
from archive.reading import Archive
from archive.storage import archive_url
from bonsai.runtime_directory import StateDirectory, UnsafeDirectory, runtime_directory

REDIS_SECONDS: Final = 30.0


class NoLedger(Exception):
    """What was named is no place of a ledger, or nothing may be written there."""


@dataclass(frozen=True)
class Place:
    client: redis.Redis
    archive: Archive
    artefacts: Path


@contextmanager
def opened(directory: Path, redis_url: str | None, archive: str, on_failure: Callable[[str], None]) -> Iterator[Place]:
    """on_failure: told why it cannot be; ends the process."""
    try:
        state = StateDirectory(directory.absolute(), runtime_directory(directory.absolute(), os.environ))
        url = redis_url or f"unix://{state.redis_socket}"
        if redis_url is None and not state.redis_socket.exists():
            raise NoLedger(f"no stack runs in {directory}: start it with `bonsai up`, or give --redis-url")
        with redis.Redis.from_url(url, socket_timeout=REDIS_SECONDS) as client:
            yield Place(client, Archive.at(archive_url(archive, state.artefacts)), state.artefacts)
    except ValidationError as error:
        on_failure(f"--retention: {error.errors(include_url=False)[0]['msg']}")
    except (NoLedger, UnsafeDirectory, Overtaken, redis.RedisError, OSError, ValueError) as error:
        on_failure(str(error))

"""A replay from a user's words to its report: the ledger is found, the reward model answers, a bar moves.

Owns the order of these and what can go wrong with them. Does not own any of them (`reward`, `scores`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from archive.reading import Archive
from archive.storage import archive_url
from bonsai.function_call import FunctionError
from bonsai.model_directory import BadModel
from bonsai.processes import ProcessFailed
from bonsai.redis_server import UnusableRedis, check_foreign
from bonsai.replay.reward import RewardOptions, answering
from bonsai.replay.scores import ReplayFailed, ReplayReport, Told, Window, replay
from bonsai.runtime_directory import StateDirectory, UnsafeDirectory, runtime_directory
from service.errors import GatewayError
from service.store import open_redis

REDIS_SECONDS: Final = 30.0
"""For a page of the ledger."""
KNOWN: Final = (
    BadModel,
    FunctionError,
    GatewayError,
    OSError,
    ProcessFailed,
    RedisError,
    ReplayFailed,
    UnsafeDirectory,
    UnusableRedis,
)
"""Failures whose text tells a user what to do."""


async def replayed(
    directory: Path, redis_url: str | None, archive: str, window: Window, reward: RewardOptions, console: Console
) -> ReplayReport:
    """archive: its address; "" for the stack's own. Raises one of `KNOWN`."""
    root = directory.absolute()
    state = StateDirectory(root, runtime_directory(root, os.environ))
    url = await _ledger(directory, state, redis_url)
    older = _archive(archive_url(archive, state.artefacts))
    async with answering(reward) as reward_model, open_redis(url, reply_seconds=REDIS_SECONDS, in_bytes=True) as redis:
        with _bar(console, window.num_groups) as told:
            return await replay(redis, older, reward_model, window, told)


def _archive(url: str) -> Archive:
    try:
        return Archive.at(url)
    except ValueError as error:
        raise ReplayFailed(str(error)) from None


async def _ledger(directory: Path, state: StateDirectory, redis_url: str | None) -> str:
    if redis_url is not None:
        await check_foreign(redis_url)
        return redis_url
    if not state.redis_socket.exists():
        raise ReplayFailed(f"no stack runs in {directory}: start it with `bonsai up`, or give --redis-url")
    return f"unix://{state.redis_socket}"


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Told]:
    """How many groups of those wanted have been replayed, and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("groups", total=total)
        yield lambda done: progress.update(task, completed=done)

"""Background loops with an owner: they run as long as a block, and leaving the block really ends them.

Owns: starting them, stopping them. Does not own: what they do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

AGAIN_SECONDS: Final = 0.1


@asynccontextmanager
async def running_loops(*loops: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """Runs the loops until the block is left. One that fails ends the block with its error."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop) for loop in loops]
        try:
            yield
        finally:
            for task in tasks:
                await stop(task)


async def stop(task: asyncio.Task[None]) -> None:
    """Cancel a task until it has ended. Once is not always enough: `asyncio.wait_for`, through which redis-py sends,
    loses a cancellation that comes just as its own work is done (Python 3.11, bpo-37658)."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=AGAIN_SECONDS)

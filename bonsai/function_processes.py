"""The processes in which a reward function runs: fed one call at a time, killed when one hangs, started again.

Owns their number, the queue in front of them and the deadline of a call. Does not own what happens inside one
(`function_call`) nor HTTP (`function_reward`).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import bonsai
from bonsai.function_call import FunctionError

START_SECONDS: Final = 300.0
"""For importing the function: it may load a model."""
MOST_WAITING: Final = 256
"""Calls; beyond them there is no room."""
LONGEST_LINE: Final = 64 * 2**20


class CallFailed(Exception):
    """A call came to nothing: its process died, or answered nonsense."""


class CallTooLong(CallFailed):
    """Its process was killed."""


class NoRoom(Exception):
    """Too many calls wait already."""


@dataclass(frozen=True)
class _Job:
    request: dict[str, Any]
    answer: asyncio.Future[dict[str, Any]]


class FunctionProcesses:
    """Must be started, and kept (`keep`) for as long as it is called."""

    def __init__(self, name: str, *, processes: int, seconds: float) -> None:
        """seconds: how long a call may take, from when a process has taken it up."""
        self._name = name
        self._count = processes
        self._seconds = seconds
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue(MOST_WAITING)
        self._first: Process | None = None
        self.model = ""
        """The function's id, once started."""

    async def start(self) -> None:
        """Import the function once. Raises FunctionError."""
        self._first, self.model = await _started(self._name)

    async def keep(self) -> None:
        """Answer calls until cancelled. Raises FunctionError when the function cannot be imported again as it was."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve(self._first))
            for _ in range(self._count - 1):
                group.create_task(self._serve(None))

    async def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the function says. Raises CallFailed or NoRoom."""
        job = _Job(request, asyncio.get_running_loop().create_future())
        try:
            self._jobs.put_nowait(job)
        except asyncio.QueueFull:
            raise NoRoom from None
        return await job.answer

    async def _serve(self, process: Process | None) -> None:
        while True:
            process = process or await self._again()
            try:
                while await self._next(process):
                    pass
            finally:
                await _kill(process)
            process = None

    async def _again(self) -> Process:
        process, model = await _started(self._name)
        if model != self.model:
            await _kill(process)
            raise FunctionError(f"the source of {self._name} has changed: it is another reward model now")
        return process

    async def _next(self, process: Process) -> bool:
        """One call; False when the process cannot be used any longer."""
        job = await self._jobs.get()
        if job.answer.done():  # who asked has left
            return True
        try:
            async with asyncio.timeout(self._seconds):
                answer = await _exchange(process, job.request)
        except TimeoutError:
            _fail(job, CallTooLong(f"the function took longer than {self._seconds:g} s"))
            return False
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError):
            _fail(job, CallFailed("the function's process died"))
            return False
        if not job.answer.done():
            job.answer.set_result(answer)
        return True


def _fail(job: _Job, failure: CallFailed) -> None:
    if not job.answer.done():
        job.answer.set_exception(failure)


async def _started(name: str) -> tuple[Process, str]:
    process = await asyncio.create_subprocess_exec(
        *function_argv(name), stdin=PIPE, stdout=PIPE, limit=LONGEST_LINE, env=call_environment(os.environ)
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            return process, model_of(await _line(process), name)
    except TimeoutError:
        await _kill(process)
        raise FunctionError(f"importing {name} took longer than {START_SECONDS:g} s") from None
    except (asyncio.IncompleteReadError, FunctionError) as error:
        await _kill(process)
        raise error if isinstance(error, FunctionError) else FunctionError(f"importing {name} ended Python") from None


def function_argv(name: str) -> tuple[str, ...]:
    """The command that says the function's id and then calls it."""
    return (sys.executable, "-m", "bonsai.function_call", name, str(os.getpid()))


def call_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Our own package comes from where this one does; the function from the directory the process runs in."""
    home = str(Path(bonsai.__file__).parents[1])
    paths = [home, *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def model_of(line: bytes, name: str) -> str:
    """The id in the first line. Raises FunctionError with the words that stand there instead."""
    try:
        said = json.loads(line)
    except ValueError:
        raise FunctionError(f"importing {name} ended Python") from None
    if "error" in said:
        raise FunctionError(said["error"])
    return str(said["model"])


async def _exchange(process: Process, request: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    await process.stdin.drain()
    return dict(json.loads(await _line(process)))


async def _line(process: Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readuntil(b"\n")


async def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()

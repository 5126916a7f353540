"""Which policy engines there are now: those of the settings, and those of a file that changes while the gateway runs.

Owns: reading the file, who joins and who leaves. Does not own: what a member is made of (app.py), how it does
(replica.py). A file, because whoever may write it runs the installation anyway: a URL that came with a request would
make the gateway ask wherever the sender likes. Each engine is still reached over a Unix socket or loopback alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, TypeAdapter, ValidationError

from bon_algos.contracts import PrivateUrl
from service.loops import stop

MOST_ENGINES: Final = 64
MOST_BYTES: Final = 64 * 1024
LOOK_SECONDS: Final = 1.0
log = logging.getLogger("bonsai.engines")
EngineName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")]
_ENGINES: Final = TypeAdapter(Annotated[dict[EngineName, PrivateUrl], Field(max_length=MOST_ENGINES)])
Admit = Callable[[str, str], AbstractAsyncContextManager[None]]


def read_engines(file: Path) -> dict[str, str]:
    """Name -> URL of each engine in the file. Raises ValueError, which says what is wrong with it."""
    try:
        with file.open("rb") as content:
            data = content.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"{file} is longer than {MOST_BYTES} bytes")
        engines = _ENGINES.validate_python(json.loads(data))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{file} is not JSON: it must be an object of engine names and URLs") from None
    return engines


def together(fixed: Mapping[str, str], file: Path | None) -> dict[str, str]:
    """All engines. Raises ValueError: see `read_engines`; or when a name or a URL stands there twice."""
    more = {} if file is None else read_engines(file)
    urls = [*fixed.values(), *more.values()]
    if fixed.keys() & more.keys() or len(set(urls)) < len(urls):
        raise ValueError(f"{file} names an engine that is there already, or one URL twice")
    if len(urls) > MOST_ENGINES:
        raise ValueError(f"{file}: there may be {MOST_ENGINES} engines, those of BONSAI_POLICY_ENGINE_URLS counted")
    return {**fixed, **more}


@dataclass
class _Member:
    url: str
    task: asyncio.Task[None] = field(init=False)
    has_joined: asyncio.Event = field(default_factory=asyncio.Event)
    shall_leave: asyncio.Event = field(default_factory=asyncio.Event)

    async def live(self, name: str, admit: Admit) -> None:
        async with admit(name, self.url):
            self.has_joined.set()
            await self.shall_leave.wait()


class Fleet:
    """Keeps a member for each engine there is."""

    def __init__(self, fixed: Mapping[str, str], file: Path | None, admit: Admit, tasks: asyncio.TaskGroup) -> None:
        """fixed: engines that are always there, by name. admit: a member for as long as its block lasts; leaving the
        block takes as long as its requests do."""
        self._fixed = fixed
        self._file = file
        self._admit = admit
        self._tasks = tasks
        self._members: dict[str, _Member] = {}
        self._complaint = ""

    async def follow(self) -> None:
        """One look at the file, and what follows from it. Joining is waited for, leaving is not."""
        try:
            engines = await asyncio.to_thread(together, self._fixed, self._file)
        except ValueError as error:
            if str(error) != self._complaint:
                log.error("the engines stay as they are: %s", error)
            self._complaint = str(error)
            return
        self._complaint = ""
        for name in [name for name, one in self._members.items() if engines.get(name) != one.url]:
            log.info("%s leaves", name)
            self._members.pop(name).shall_leave.set()
        for name in [name for name in engines if name not in self._members]:
            log.info("%s joins", name)
            await self._join(name, engines[name])

    async def run(self) -> None:
        """Follow the file until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.follow()

    async def _join(self, name: str, url: str) -> None:
        member = self._members[name] = _Member(url)
        member.task = self._tasks.create_task(member.live(name, self._admit))
        await member.has_joined.wait()

    def dismiss(self) -> None:
        """All of them leave."""
        for member in self._members.values():
            member.shall_leave.set()


@asynccontextmanager
async def running_fleet(fixed: Mapping[str, str], file: Path | None, admit: Admit) -> AsyncGenerator[None]:
    """All engines as members, and the file followed, until the block is left. A member that fails ends the block with
    its error. Raises ValueError when the file cannot be followed at all."""
    together(fixed, file)
    async with asyncio.TaskGroup() as tasks:
        fleet = Fleet(fixed, file, admit, tasks)
        await fleet.follow()
        following = tasks.create_task(fleet.run())
        try:
            yield
        finally:
            await stop(following)
            fleet.dismiss()

"""One process of the stack, kept running: started under a guard, probed, restarted, stopped.

Owns the life of a process and its status. Does not own what the processes are (`stack_plan`) or in which order
they come and go (`up`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bonsai import guard
from bonsai.failure_reason import KILLED, failure_reason
from bonsai.leftovers import Guard, read_row

State = Literal["waiting", "starting", "ready", "restarting", "stopping", "failed", "stopped"]
LogTail = Callable[[], str]
Probe = Callable[[LogTail], Awaitable[str | None]]
"""None when the process can do its work, else what it waits for. Gets the log of this life so far. Raises Hopeless."""

TAIL_BYTES = 64 * 1024
PROBE_SECONDS = 5.0
"""A probe that takes longer counts as no answer."""
STARTING_INTERVAL, READY_INTERVAL = 0.2, 2.0
KILL_SECONDS = 2.0
"""For a guard to kill everything below it; longer only when a process hangs in the kernel."""
LONG_LIFE_SECONDS = 60.0
DEATHS_IN_A_ROW = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0


@dataclass(frozen=True)
class ProcessSpec:
    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """All of it; nothing is inherited. Secrets travel here, never in `argv`."""
    directory: Path
    log: Path
    probe: Probe
    socket: Path | None = None
    """Removed before each start: servers refuse a socket that a killed predecessor left."""
    niceness: int = 0
    grace_seconds: float = 2.5
    """From the request to stop to the kill."""


@dataclass(frozen=True)
class ProcessStatus:
    name: str
    state: State
    detail: str
    """What it waits for, or why it ended."""
    log: Path
    pid: int | None
    """Of its guard, which leads its session."""
    restarts: int


class ProcessFailed(Exception):
    """A process did not come up, or does not stay up."""

    def __init__(self, name: str, reason: str, log: Path, tail: str) -> None:
        super().__init__(name, reason, log, tail)
        self.name, self.reason, self.log, self.tail = name, reason, log, tail

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Hopeless(Exception):
    """What a probe has found will not change while this process lives; the message says what it is."""


def back_off(deaths: int) -> float:
    """Seconds before the next start after `deaths` (at least 1) quick deaths in a row: doubles, up to 10 s."""
    return min(FIRST_PAUSE * 2.0 ** (deaths - 1), LONGEST_PAUSE)


class SupervisedProcess:
    def __init__(self, spec: ProcessSpec, changed: Callable[[], None]) -> None:
        self.spec = spec
        self.ready = asyncio.Event()
        """Set while the probe is content."""
        self.guard: Guard | None = None
        self._changed = changed
        self._stopping = asyncio.Event()
        self._state: State = "waiting"
        self._detail = ""
        self._was_ready = False
        self._refusal = ""
        self._restarts = 0
        self._log_start = 0

    @property
    def status(self) -> ProcessStatus:
        pid = None if self.guard is None else self.guard.pid
        return ProcessStatus(self.spec.name, self._state, self._detail, self.spec.log, pid, self._restarts)

    async def keep(self) -> None:
        """Run it, and run it again when it dies, until `stop`. Raises ProcessFailed when that is hopeless:
        a first life that ends before it was ready, or of which its probe says so, or five deaths in a row."""
        deaths = 0
        while True:
            began = time.monotonic()
            exit_status = await self._live()
            if self._refusal:
                self._set("failed", self._refusal)
                raise ProcessFailed(self.spec.name, self._refusal, self.spec.log, self.log_tail())
            if self._stopping.is_set():
                return self._set("stopped", "")
            deaths = 1 if time.monotonic() - began > LONG_LIFE_SECONDS else deaths + 1
            reason = failure_reason(exit_status, self.log_tail())
            if not self._was_ready or deaths >= DEATHS_IN_A_ROW:
                self._set("failed", reason)
                raise ProcessFailed(self.spec.name, reason, self.spec.log, self.log_tail())
            self._restarts += 1
            pause = back_off(deaths)
            self._set("restarting", f"{reason}; again in {pause:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
                return self._set("stopped", "")

    def stop(self) -> None:
        """Ask it to end. `keep` returns when it has, at the latest when the grace is over and it was killed."""
        self._stopping.set()
        if self.guard is None:
            return
        with suppress(ProcessLookupError):
            os.kill(self.guard.pid, signal.SIGTERM)

    async def _live(self) -> int:
        """One life; its exit status. Whatever happens here, the lifeline is cut at the end and nothing is left."""
        if self.spec.socket is not None:
            self.spec.socket.unlink(missing_ok=True)
        read_end, lifeline = os.pipe()
        try:
            process = await self._start(read_end)
        except BaseException:
            os.close(lifeline)
            raise
        probing = asyncio.create_task(self._probe())
        try:
            return await self._end_of(process)
        finally:
            probing.cancel()
            os.close(lifeline)
            await asyncio.wait((asyncio.create_task(process.wait()),), timeout=KILL_SECONDS)
            self.guard = None
            self.ready.clear()

    async def _start(self, lifeline: int) -> asyncio.subprocess.Process:
        spec = self.spec
        try:
            with spec.log.open("ab") as log:
                self._log_start = log.tell()
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", guard.__file__, str(lifeline), str(spec.niceness), *spec.argv),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    env=dict(spec.environment),
                    cwd=spec.directory,
                    pass_fds=(lifeline,),
                    start_new_session=True,
                )
        finally:
            os.close(lifeline)
        row = read_row(process.pid)
        self.guard = Guard(name=spec.name, pid=process.pid, start_ticks=row.start_ticks if row else 0)
        self._set("starting", "")
        return process

    async def _end_of(self, process: asyncio.subprocess.Process) -> int:
        ended, stopping = asyncio.create_task(process.wait()), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                self._set("stopping", "")
                await asyncio.wait((ended,), timeout=self.spec.grace_seconds)
            return ended.result() if ended.done() else KILLED
        finally:
            ended.cancel()
            stopping.cancel()

    async def _probe(self) -> None:
        began = time.monotonic()
        while True:
            try:
                waits_for = await self._ask()
            except Hopeless as found:
                waits_for = str(found)
                # What worked once is not taken down by what a later life of it finds.
                self._refusal = "" if self._was_ready else waits_for
            if self._stopping.is_set():
                return
            if self._refusal:
                return self.stop()
            if waits_for is None:
                self._was_ready = True
                self.ready.set()
                self._set("ready", "")
            else:
                self.ready.clear()
                self._set("starting", f"{waits_for} ({time.monotonic() - began:.0f} s)")
            await asyncio.sleep(STARTING_INTERVAL if waits_for else READY_INTERVAL)

    async def _ask(self) -> str | None:
        try:
            return await asyncio.wait_for(self.spec.probe(self.log_tail), PROBE_SECONDS)
        except TimeoutError:
            return f"no answer within {PROBE_SECONDS:g} s"

    def log_tail(self) -> str:
        """What this life has logged, its last 64 KiB."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(max(self._log_start, os.fstat(log.fileno()).st_size - TAIL_BYTES))
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _set(self, state: State, detail: str) -> None:
        if (state, detail) != (self._state, self._detail):
            self._state, self._detail = state, detail
            self._changed()

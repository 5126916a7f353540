"""Several processes kept together: started tier by tier, recorded, taken down in reverse order.

Owns the order, the record of what runs and the moment when it can no longer be kept. One process's life is
`processes`; which processes there are is `stack_plan`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from bonsai.leftovers import RunRecord, boot_id, kill_leftovers, write_record
from bonsai.processes import ProcessFailed, ProcessSpec, ProcessStatus, SupervisedProcess
from bonsai.runtime_directory import StateDirectory, clear_runtime, remove_runtime

Watch = Callable[[Sequence[ProcessStatus]], None]
"""Called at every change of any process's status, with all of them."""


class Supervisor:
    """Made by `kept`."""

    def __init__(self, state: StateDirectory, url: str, watch: Watch) -> None:
        self._state, self._url, self._watch = state, url, watch
        self._tiers: list[dict[str, SupervisedProcess]] = []
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._failed: asyncio.Future[ProcessFailed] = asyncio.get_running_loop().create_future()

    @property
    def processes(self) -> dict[str, SupervisedProcess]:
        return {name: process for tier in self._tiers for name, process in tier.items()}

    @property
    def statuses(self) -> tuple[ProcessStatus, ...]:
        return tuple(process.status for process in self.processes.values())

    async def failure(self) -> ProcessFailed:
        """Waits until a process cannot be kept any longer."""
        return await asyncio.shield(self._failed)

    async def start(self, tiers: Sequence[Sequence[ProcessSpec]]) -> None:
        """The first tier is ready before the others start; those start at once. Raises ProcessFailed."""
        for tier in tiers:
            self._tiers.append({spec.name: SupervisedProcess(spec, self._note) for spec in tier})
        first, *others = self._tiers
        await self._until_ready(first)
        await self._until_ready({name: process for tier in others for name, process in tier.items()})

    async def _until_ready(self, processes: dict[str, SupervisedProcess]) -> None:
        for name, process in processes.items():
            self._keeping[name] = asyncio.create_task(process.keep(), name=name)
            self._keeping[name].add_done_callback(self._note_end)
        ready = asyncio.create_task(_all_ready(processes.values()))
        failed = asyncio.ensure_future(self.failure())
        try:
            await asyncio.wait((ready, failed), return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                raise failed.result()
        finally:
            ready.cancel()
            failed.cancel()

    async def stop(self) -> None:
        """Tier by tier, the last one first: who asks goes before who answers."""
        for tier in reversed(self._tiers):
            for process in tier.values():
                process.stop()
            keeping = (self._keeping[name] for name in tier if name in self._keeping)
            await asyncio.gather(*keeping, return_exceptions=True)

    def _note(self) -> None:
        """The record first: a killed supervisor's successor must find every process."""
        guards = tuple(process.guard for process in self.processes.values() if process.guard is not None)
        record = RunRecord(boot_id=boot_id(), supervisor=os.getpid(), url=self._url, guards=guards)
        write_record(self._state.record, record)
        self._watch(self.statuses)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._failed.done():
            return
        error = task.exception()
        if isinstance(error, ProcessFailed):
            self._failed.set_result(error)
        elif error is not None:
            self._failed.set_exception(error)


async def _all_ready(processes: Iterable[SupervisedProcess]) -> None:
    for process in processes:
        await process.ready.wait()


@asynccontextmanager
async def kept(
    state: StateDirectory, url: str, tiers: Sequence[Sequence[ProcessSpec]], watch: Watch
) -> AsyncIterator[Supervisor]:
    """Ready when the block is entered, gone when it is left. The caller holds the state directory's lock.

    Raises ProcessFailed, or TimeoutError when something of an earlier run cannot be killed.
    """
    kill_leftovers(state.record)
    clear_runtime(state)
    for spec in (spec for tier in tiers for spec in tier):
        if spec.log.exists():
            spec.log.replace(spec.log.with_suffix(".previous.log"))
    supervisor = Supervisor(state, url, watch)
    try:
        await supervisor.start(tiers)
        yield supervisor
    finally:
        await asyncio.shield(supervisor.stop())
        state.record.unlink(missing_ok=True)
        remove_runtime(state)

"""A Celery worker as it is started in production, with a reconciler that hands it jobs. Real processes.

Owns: their start, their end, who is who below the worker's main process. Does not own what happens to them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from service.dispatch import Dispatcher, open_producer, send_job
from service.store import open_redis
from tests.worker.forks import until

COMMAND = (
    *(sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-c", "1"),
    *("--without-gossip", "--without-mingle", "--loglevel", "INFO"),
)


class CeleryWorker:
    """One worker in a session of its own."""

    def __init__(self, environment: Mapping[str, str], log: Path, *arguments: str, name: str = "worker") -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*COMMAND, "-n", f"{name}@here", *arguments],
                env=os.environ | {"REMAP_SIGTERM": "SIGQUIT"} | dict(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def wait_until_ready(self) -> None:
        """Its consumer is set up."""
        until(lambda: self.is_ready or not self.is_alive, f"a ready worker ({self.log})")
        assert self.is_alive, self.log.read_text()

    @property
    def is_ready(self) -> bool:
        """It was, at least once."""
        return b" ready." in self.log.read_bytes()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def children(self) -> list[int]:
        """Of the pool: those that run tasks."""
        return [pid for pid in children_of(self.pid) if b"spawn_main" in _command(pid) or b"celery" in _command(pid)]

    @property
    def training(self) -> int | None:
        """The process that trains, if one does."""
        below = [pid for child in children_of(self.pid) for pid in children_of(child)]
        return next((pid for pid in below if b"worker.job_process" in _command(pid)), None)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)

    def kill(self) -> None:
        """kill -9 of the main process alone: what is below it must go by itself."""
        self._process.kill()
        self._process.wait()


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def reconciling(redis_url: str, *, seconds: float = 0.5) -> Iterator[None]:
    """A gateway's reconciler, as the gateway runs it."""

    async def reconcile(stop: asyncio.Event) -> None:
        producer = open_producer(redis_url)
        async with open_redis(redis_url) as client:
            loop = asyncio.create_task(Dispatcher(client, partial(send_job, producer), seconds=seconds).run())
            await stop.wait()
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)

    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(reconcile(stop)))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()

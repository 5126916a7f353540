"""A worker that is to stop tells its children, before it waits for them.

Owns the one signal handler. Celery's own soft shutdown waits for a task and then kills it, and never lets the task
know: a job would lose what it has done since its last state, and an attempt. Does not own what a child does then
(`tasks`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, cast

from celery.signals import worker_ready

SIGNALS = (signal.SIGTERM, signal.SIGQUIT)


@worker_ready.connect
def tell_children_first(sender: Any, **_: Any) -> None:
    """Put ourselves in front of the handlers that Celery has set up by now."""
    processes = sender.controller.pool._pool
    for number in SIGNALS:
        celerys = signal.getsignal(number)
        if callable(celerys):
            signal.signal(number, _before(celerys, lambda: [one.pid for one in processes._pool]))


def _before(
    celerys: Callable[[int, FrameType | None], Any], children: Callable[[], list[int]]
) -> Callable[[int, FrameType | None], None]:
    def stop(number: int, frame: FrameType | None) -> None:
        for pid in children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        celerys(number, frame)

    return cast("Callable[[int, FrameType | None], None]", stop)

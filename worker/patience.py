"""How long a job waits for an engine: with back-off, inside its lease, up to a bound."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from worker.errors import EngineUnavailable

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 15.0

Result = TypeVar("Result")


def patiently(operation: Callable[[], Result], wait: Callable[[float], None], bound_seconds: float) -> Result:
    """The operation's result, tried again while engines are unavailable.

    `wait` lets time pass and raises when the job must stop. When the bound has passed EngineUnavailable goes
    on to the caller, who gives the job back. The operation starts from nothing each time: an engine that came
    back has forgotten its adapters.
    """
    give_up_at = time.monotonic() + bound_seconds
    pause = FIRST_WAIT_SECONDS
    while True:
        try:
            return operation()
        except EngineUnavailable as error:
            if time.monotonic() + pause > give_up_at:
                raise
            log.warning("%s; trying again in %.1f s", error, pause)
            wait(pause)
            pause = min(2 * pause, LONGEST_WAIT_SECONDS)

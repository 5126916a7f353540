"""When an engine that fails is asked no more, and when it is tried again: a state machine without I/O.

Owns: the states below, what opens them, the growing pause. Does not own: what counts as a failure, nor sending the
probe (replica.py; reward.py, where the next call is the probe).

    closed      5 of the last 10 calls failed, or a canary failed       -> open
    open        its pause is over: one probe may go                     -> half_open
    half_open   the probe succeeded                                     -> closed
                it failed                                               -> open, for twice the pause
                it was given up before it told anything                 -> open, and the next one may go at once
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Literal

LAST_CALLS: Final = 10
FAILED_CALLS: Final = 5
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 10.0
LONGEST_PROBE_SECONDS: Final = 30.0
"""Of a probe that has told nothing for so long nobody waits for the end: another may go."""

BreakerState = Literal["closed", "open", "half_open"]


class Breaker:
    """The breaker of one engine."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds, never going back."""
        self._clock = clock
        self._state: BreakerState = "closed"
        self._epoch = 0
        self._failed: deque[bool] = deque(maxlen=LAST_CALLS)
        self._pause = FIRST_PAUSE_SECONDS
        self._probe_at = 0.0
        self._probe_lost_at = 0.0

    @property
    def state(self) -> BreakerState:
        return self._state

    @property
    def epoch(self) -> int:
        """Grows whenever the breaker opens. A call is counted with the epoch in which it began: what began before
        the breaker opened tells nothing of the engine after it closed."""
        return self._epoch

    @property
    def probe_at(self) -> float:
        """When an open breaker may be probed; the clock's time."""
        return self._probe_at

    def count(self, epoch: int, *, failed: bool) -> None:
        """How a call ended that began in `epoch`."""
        if self._state != "closed" or epoch != self._epoch:
            return
        self._failed.append(failed)
        if sum(self._failed) >= FAILED_CALLS:
            self._open(FIRST_PAUSE_SECONDS)

    def trip(self) -> None:
        """A canary failed; in half_open it was the probe."""
        if self._state == "closed":
            self._open(FIRST_PAUSE_SECONDS)
        elif self._state == "half_open":
            self._open(min(2 * self._pause, LONGEST_PAUSE_SECONDS))

    def hasten(self) -> None:
        """There is a reason to believe that the engine is back: the pause is over."""
        if self._state == "open":
            self._probe_at = min(self._probe_at, self._clock())

    @property
    def admits(self) -> bool:
        """Whether a call may go: any while it is closed, else the one probe when it is time."""
        if self._state == "half_open":
            return self._clock() >= self._probe_lost_at
        return self._state == "closed" or self._clock() >= self._probe_at

    def try_probe(self) -> bool:
        """Whether the one probe may go; who is told so must say how it ended, by `close`, `trip` or `give_up`."""
        if self._state == "closed" or not self.admits:
            return False
        self._state = "half_open"
        self._probe_lost_at = self._clock() + LONGEST_PROBE_SECONDS
        return True

    def give_up(self) -> None:
        """The probe was given up before it told anything: the next one may go at once."""
        if self._state == "half_open":
            self._state = "open"

    def close(self) -> None:
        """The probe succeeded."""
        if self._state == "half_open":
            self._state = "closed"
            self._failed.clear()

    def _open(self, pause: float) -> None:
        self._state = "open"
        self._epoch += 1
        self._pause = pause
        self._probe_at = self._clock() + pause

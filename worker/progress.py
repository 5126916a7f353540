"""What the owner of a job sees of it while it runs: phase, step, metrics, time left. Twice a second at most."""

from __future__ import annotations

import time
from collections.abc import Mapping

from bon_algos.contracts import JobPhase
from worker.lease import Lease

SECONDS_BETWEEN_REPORTS = 0.5
SMOOTHING = 0.1
"""Weight of the newest step in the mean time of a step."""


class Progress:
    """Reports under the job's lease; like every fenced write it raises when the job must stop."""

    def __init__(self, lease: Lease, steps: int) -> None:
        self._lease = lease
        self._steps = steps
        self._phase: JobPhase = "queued"
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._seconds_per_step: float | None = None
        self._stepped_at: float | None = None
        self._reported_at = 0.0

    def enter(self, phase: JobPhase) -> None:
        """A phase begins; always reported."""
        self._phase = phase
        self._report()

    def resume(self, step: int, metrics: Mapping[str, float]) -> None:
        """Steps that an earlier attempt has done."""
        self._step, self._metrics = step, dict(metrics)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; what it did not measure keeps its last value."""
        now = time.monotonic()
        if self._stepped_at is not None:
            took, mean = now - self._stepped_at, self._seconds_per_step
            self._seconds_per_step = took if mean is None else (1 - SMOOTHING) * mean + SMOOTHING * took
        self._stepped_at, self._step = now, step
        self._metrics |= metrics
        if step == self._steps or now - self._reported_at >= SECONDS_BETWEEN_REPORTS:
            self._report()

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of everything that was measured."""
        return dict(self._metrics)

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        per_step = self._seconds_per_step
        left = None if per_step is None else per_step * (self._steps - self._step)
        self._lease.progress(self._phase, self._step, self._steps, self._metrics, left)

"""What the owner of a job sees of it while it runs: phase, step, metrics, time left, tokens. Twice a second at most."""

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
        self._trained_tokens = self._sampled_tokens = 0
        self._evaluation_seconds: float | None = None
        self._entered_at = time.monotonic()

    def enter(self, phase: JobPhase) -> None:
        """A phase begins; always reported."""
        self._phase = phase
        self._entered_at = time.monotonic()
        self.report()

    def resume(self, step: int, metrics: Mapping[str, float]) -> None:
        """Steps that an earlier attempt has done."""
        self._step, self._metrics = step, dict(metrics)

    def count(self, *, trained: int, sampled: int, evaluation_seconds: float | None) -> None:
        """What the next report tells beside: tokens that this attempt has trained on and sampled so far, and how long
        the evaluation will take, None while nothing tells."""
        self._trained_tokens, self._sampled_tokens = trained, sampled
        self._evaluation_seconds = evaluation_seconds

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; what it did not measure keeps its last value."""
        now = time.monotonic()
        if self._stepped_at is not None:
            took, mean = now - self._stepped_at, self._seconds_per_step
            self._seconds_per_step = took if mean is None else (1 - SMOOTHING) * mean + SMOOTHING * took
        self._stepped_at, self._step = now, step
        self._metrics |= metrics
        if step == self._steps or now - self._reported_at >= SECONDS_BETWEEN_REPORTS:
            self.report()

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of everything that was measured."""
        return dict(self._metrics)

    @property
    def _seconds_left(self) -> float | None:
        """By the pace of the latest steps and of the engine; None while there is none."""
        evaluation = self._evaluation_seconds or 0.0
        if self._phase == "training" and self._seconds_per_step is not None:
            return self._seconds_per_step * (self._steps - self._step) + evaluation
        if self._phase == "evaluating" and self._evaluation_seconds is not None:
            return max(0.0, evaluation - (time.monotonic() - self._entered_at))
        return None

    def report(self) -> None:
        """Tell where the job is, whenever that was told last."""
        self._reported_at = time.monotonic()
        self._lease.progress(
            self._phase,
            self._step,
            self._steps,
            self._metrics,
            self._seconds_left,
            trained_tokens=self._trained_tokens,
            sampled_tokens=self._sampled_tokens,
        )

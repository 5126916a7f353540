"""The loop around training: feed a step, report it, keep a state, stop at once when the job must.

Owns the interval of checkpoints and where a step's groups come from. Does not own the step (`train`), its loss
(`bon_algos`) or the engine (`rollouts`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bon_algos.algorithms import BondStep, LoggedStep
from worker import checkpoint
from worker.dataset import FrozenWindow, PromptPool
from worker.errors import EngineUnavailable
from worker.lease import Lease
from worker.patience import patiently
from worker.progress import Progress
from worker.rollouts import Rollout, Rollouts, live_metrics, spread
from worker.train import Training, batch_of

log = logging.getLogger(__name__)

LIVE_PROMPTS = 32
"""Held-out prompts of which one sample each tells how a policy that learns from the ledger is doing."""

Learn = Callable[[], dict[str, float]]
"""One step on groups that are at hand; its metrics."""


class Loop:
    """One attempt's training, from the step its state has reached to the last."""

    def __init__(
        self,
        training: Training,
        window: FrozenWindow,
        *,
        lease: Lease,
        progress: Progress,
        rollouts: Rollouts,
        attempt: Path,
        prompts_per_step: int,
        seed: int,
        checkpoint_steps: int,
        checkpoint_seconds: float,
        patience_seconds: float,
    ) -> None:
        self._training = training
        self._window = window
        self._lease = lease
        self._progress = progress
        self._rollouts = rollouts
        self._attempt = attempt
        self._prompts_per_step, self._seed = prompts_per_step, seed
        self._checkpoint_steps, self._checkpoint_seconds = checkpoint_steps, checkpoint_seconds
        self._patience_seconds = patience_seconds
        self._seconds_drawing = 0.0
        self._fresh: deque[tuple[Learn, dict[str, float]]] = deque()

    def run(self, steps: int) -> None:
        training, saved_step, saved_at = self._training, self._training.done, time.monotonic()
        while training.done < steps:
            self._lease.check()
            metrics, started_at = self._groups_drawn(steps), time.monotonic()
            metrics |= self._learn()
            self._progress.step(training.done, metrics | {"seconds_training": time.monotonic() - started_at})
            is_due = training.done - saved_step >= self._checkpoint_steps
            if is_due or training.done == steps or time.monotonic() - saved_at >= self._checkpoint_seconds:
                self._save()
                saved_step, saved_at = training.done, time.monotonic()

    def _groups_drawn(self, steps: int) -> dict[str, float]:
        """Have fresh groups at hand for the next step, where it needs them; what its policy's samples say."""
        step, done = self._training.step, self._training.done
        if isinstance(step, LoggedStep):
            return {}
        if not self._fresh:
            last = min(done + step.refresh_steps, steps)
            started_at = time.monotonic()
            self._refresh([self._batch(number) for number in range(done, last)])
            self._seconds_drawing = (time.monotonic() - started_at) / (last - done)
        return self._fresh[0][1] | {"seconds_drawing": self._seconds_drawing}

    def _learn(self) -> dict[str, float]:
        if isinstance(self._training.step, LoggedStep):
            return self._training.learn_logged([pool.logged_group for pool in self._batch(self._training.done)])
        return self._fresh.popleft()[0]()

    def _batch(self, step: int) -> list[PromptPool]:
        return batch_of(self._window.train, step, size=self._prompts_per_step, seed=self._seed)

    def _refresh(self, batches: Sequence[list[PromptPool]]) -> None:
        """Fresh groups for the coming steps, all drawn from the policy and the anchor as they are now."""
        pools = [pool for batch in batches for pool in batch]
        learn, samples = patiently(lambda: self._drawn(pools), self._lease.wait, self._patience_seconds)
        start = 0
        for batch in batches:
            part = slice(start, start + len(batch))
            self._fresh.append((partial(learn, part), live_metrics(self._training.policy, batch, samples[part])))
            start += len(batch)

    def _drawn(self, pools: Sequence[PromptPool]) -> tuple[Callable[[slice], dict[str, float]], list[Rollout]]:
        """How to learn from a part of the prompts, and one fresh sample of the policy for each."""
        training, rollouts = self._training, self._rollouts
        if isinstance(training.step, BondStep):
            ranked, samples = rollouts.ranked_groups(training.policy, pools, training.step.samples_per_prompt)
            return lambda part: training.learn_ranked(ranked[part]), samples
        assert training.anchor is not None
        fresh, samples = rollouts.fresh_groups(training.policy, training.anchor.tensors, pools)
        return lambda part: training.learn_fresh(fresh[part]), samples

    def _save(self) -> None:
        if isinstance(self._training.step, LoggedStep):
            self._progress.step(self._training.done, self._measure_live())
        self._lease.confirm()
        checkpoint.save(self._attempt, self._training.state({"metrics": self._progress.metrics}))

    def _measure_live(self) -> dict[str, float]:
        """One sample each of some held-out prompts; nothing when the engine is away: this training needs none."""
        pools = spread(self._window.held_out, LIVE_PROMPTS)
        try:
            with self._rollouts.served(self._training.policy) as name:
                drawn = self._rollouts.draw([(name, pool, 1) for pool in pools])
        except EngineUnavailable as error:
            log.warning("no live metrics at step %d: %s", self._training.done, error)
            return {}
        return live_metrics(self._training.policy, pools, [group[0] for group in drawn])

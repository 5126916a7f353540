"""The loop around training: feed a step, report it, keep a state, stop at once when the job must.

Owns the interval of checkpoints and where a step's groups come from. Does not own the step (`train`), its loss
(`bon_algos`) or the engine (`rollouts`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bon_algos.steps import BondStep, FreshGroup, OnPolicyStep, RankedGroup, SampledStep
from worker import checkpoint
from worker.dataset import FrozenWindow, PromptPool
from worker.errors import EngineUnavailable, JobParked
from worker.lease import Lease
from worker.patience import patiently
from worker.progress import Progress
from worker.rollouts import Rollout, Rollouts, live_metrics, spread
from worker.train import Training, batch_of

log = logging.getLogger(__name__)

LIVE_PROMPTS = 32
"""Held-out prompts of which one sample each tells how a policy that learns from the ledger is doing."""

Ranked = tuple[list[RankedGroup], list[Rollout]]


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
        evaluation_samples: int,
    ) -> None:
        """evaluation_samples: that will be drawn after the last step, for an estimate of the time that takes."""
        self._training = training
        self._window = window
        self._lease = lease
        self._progress = progress
        self._rollouts = rollouts
        self._attempt = attempt
        self._prompts_per_step, self._seed = prompts_per_step, seed
        self._checkpoint_steps, self._checkpoint_seconds = checkpoint_steps, checkpoint_seconds
        self._patience_seconds = patience_seconds
        self._evaluation_samples = evaluation_samples
        self._fresh: deque[tuple[list[FreshGroup], dict[str, float]]] = deque()
        self._drawer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drawer")
        self._ahead: Future[Ranked] | None = None
        self._saved_step, self._saved_at = training.done, 0.0

    def run(self, steps: int) -> None:
        """Train until `steps` are done. A job that is parked keeps its state before it stops."""
        self._saved_step, self._saved_at = self._training.done, time.monotonic()
        with self._drawer:  # a job that stops waits for the call under way, which notices within half a second
            try:
                self._train(steps)
            except JobParked:
                if self._training.done > self._saved_step:
                    self._keep()
                self._progress.report()  # which is told again that it must stop
                raise

    def _train(self, steps: int) -> None:
        training = self._training
        while training.done < steps:
            self._lease.check()
            metrics = self._step(steps)
            self._count()
            self._progress.step(training.done, metrics)
            is_due = training.done - self._saved_step >= self._checkpoint_steps
            if is_due or training.done == steps or time.monotonic() - self._saved_at >= self._checkpoint_seconds:
                self._measure_live()
                self._keep()

    def _step(self, steps: int) -> dict[str, float]:
        """One step, with what it needs drawn before; its metrics and times."""
        training, started_at = self._training, time.monotonic()
        learn: Callable[[], dict[str, float]]
        live: dict[str, float] = {}
        if training.logged_step is not None:
            learn = partial(training.learn_logged, [pool.logged_group for pool in self._batch(training.done)])
        elif isinstance(training.step, BondStep | SampledStep):
            ranked, live = self._next_ranked(training.step, steps)
            learn = partial(training.learn_ranked, ranked)
        else:
            fresh, live = self._next_fresh(steps)
            learn = partial(training.learn_fresh, fresh)
        drawn_at = time.monotonic()
        metrics = learn()
        times = {"seconds_drawing": drawn_at - started_at, "seconds_training": time.monotonic() - drawn_at}
        return live | metrics | times

    def _batch(self, step: int) -> list[PromptPool]:
        return batch_of(self._window.train, step, size=self._prompts_per_step, seed=self._seed)

    # --- J-BOND and iterative BOND: policy and anchor as they are now -----------------------------------

    def _next_fresh(self, steps: int) -> tuple[list[FreshGroup], dict[str, float]]:
        """The next step's groups, and what its policy's samples say of it."""
        step, done = self._training.step, self._training.done
        assert isinstance(step, OnPolicyStep)
        if not self._fresh:
            last = min(done + step.refresh_steps, steps)
            self._refresh([self._batch(number) for number in range(done, last)])
        return self._fresh.popleft()

    def _refresh(self, batches: Sequence[list[PromptPool]]) -> None:
        """Fresh groups for the coming steps, all drawn from the policy and the anchor as they are now."""
        training = self._training
        assert training.anchor is not None
        assert isinstance(training.step, OnPolicyStep)
        num_anchor_samples = training.step.anchor_samples
        anchor, pools = training.anchor.tensors, [pool for batch in batches for pool in batch]
        groups, samples = patiently(
            lambda: self._rollouts.fresh_groups(training.policy, anchor, pools, num_anchor_samples),
            self._lease.wait,
            self._patience_seconds,
        )
        start = 0
        for batch in batches:
            part = slice(start, start + len(batch))
            self._fresh.append((groups[part], live_metrics(training.policy, batch, samples[part])))
            start += len(batch)

    # --- BOND, vBoN and RLOO: drawn while the step before trains ----------------------------------------

    def _next_ranked(self, step: BondStep | SampledStep, steps: int) -> tuple[list[RankedGroup], dict[str, float]]:
        """The next step's groups, and what they say of the policy; the drawing for the step after begins."""
        done = self._training.done
        groups, samples = (self._ahead or self._draw_ranked(step, done)).result()
        self._ahead = self._draw_ranked(step, done + 1) if done + 1 < steps else None
        return groups, live_metrics(self._training.policy, self._batch(done), samples)

    def _draw_ranked(self, step: BondStep | SampledStep, number: int) -> Future[Ranked]:
        """Have samples of the policy as it is now drawn for a step."""
        policy, factors, pools = self._training.policy, self._training.policy.factors, self._batch(number)

        def drawn() -> Ranked:
            return self._rollouts.ranked_groups(policy, factors, pools, step.samples_per_prompt)

        return self._drawer.submit(patiently, drawn, self._lease.wait, self._patience_seconds)

    # --- states ----------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Write the state as it is, and say so."""
        metrics = self._progress.metrics
        checkpoint.save(self._attempt, self._training.state({"metrics": metrics}), self._lease.confirm)
        self._saved_step, self._saved_at = self._training.done, time.monotonic()
        self._lease.tell_checkpoint(self._training.done, metrics, checkpoint.KEPT)

    def _count(self) -> None:
        pace = self._rollouts.seconds_per_sample
        self._progress.count(
            trained=self._training.tokens,
            sampled=self._rollouts.tokens,
            evaluation_seconds=None if pace is None else pace * self._evaluation_samples,
        )

    def _measure_live(self) -> None:
        """How a policy that learns from the ledger does, by one sample each of some held-out prompts; nothing when the
        engine is away: this training needs none."""
        if self._training.logged_step is None or not self._training.policy.is_adapter:
            return
        pools = spread(self._window.held_out, LIVE_PROMPTS)
        try:
            with self._rollouts.served(self._training.policy) as name:
                drawn = self._rollouts.draw([(name, pool, 1) for pool in pools])
        except EngineUnavailable as error:
            log.warning("no live metrics at step %d: %s", self._training.done, error)
            return
        metrics = live_metrics(self._training.policy, pools, [group[0] for group in drawn])
        self._progress.step(self._training.done, metrics)

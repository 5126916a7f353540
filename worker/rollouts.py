"""Fresh samples of the policy in training: drawn from the engine that serves users, scored by its reward model.

Owns the adapters a job lends to the engine, their names (never used twice, gone when the block is left) and the
scoring of what was drawn. Does not own HTTP (`engine`) nor what samples are for (`train`, `evaluate`).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from bon_algos.contracts import Candidate
from bon_algos.crash_points import crash_point
from bon_algos.logprobs import TokenGroup
from bon_algos.scoring import Completion
from bon_algos.serving_order import serving_ranks_of
from bon_algos.steps import FreshGroup, RankedGroup
from worker.dataset import LoggedCandidate, PromptPool
from worker.engine import Draw, Engines
from worker.errors import EngineUnavailable
from worker.models import TrainedPolicy

log = logging.getLogger(__name__)


class Rollout(NamedTuple):
    """One fresh completion."""

    candidate: Candidate
    reward: float | None
    """As the reward model says; None when it could not: such a one is never served."""

    @property
    def is_complete(self) -> bool:
        return self.candidate.is_complete

    @property
    def logprob(self) -> float:
        """Under the policy that was sampled, as the engine saw it; nats."""
        return sum(self.candidate.logprobs)


class Rollouts:
    """A job's use of the engines."""

    def __init__(
        self,
        engines: Engines,
        *,
        directory: Path,
        job_id: str,
        attempt: str,
    ) -> None:
        self.engines = engines
        self._directory = directory
        self._job_prefix = f"{job_id}-"
        self._attempt = attempt
        self._numbers = count()
        self.tokens = 0
        """Sampled so far, for training and for judging."""
        self.seconds_per_sample: float | None = None
        """Of the latest draw, scoring included; None before the first."""

    def unload_leftovers(self, has_ended: Callable[[str], bool]) -> None:
        """Have the engine forget what dead attempts of this job, and those of jobs that have ended, lent to it. An
        engine that is away has."""
        try:
            for name in self.engines.served_models():
                owner, lent, _ = name.partition("-")
                if name.startswith(self._job_prefix) or (owner.startswith("job_") and lent and has_ended(owner)):
                    self.engines.unload_adapter(name)
        except EngineUnavailable as error:
            log.warning("leftovers of an earlier attempt may still be loaded: %s", error)

    @contextmanager
    def served(self, policy: TrainedPolicy, replaced: Mapping[str, Tensor] | None = None) -> Iterator[str]:
        """The name under which the engine serves the policy as it is now, or with some factors replaced."""
        name = f"{self._job_prefix}{self._attempt}-{next(self._numbers)}"
        directory = self._directory / name
        policy.save_adapter(directory, replaced)
        try:
            self.engines.load_adapter(name, directory)
            crash_point("adapter.lent")
            yield name
        finally:
            try:
                self.engines.unload_adapter(name)
            except EngineUnavailable as error:
                log.warning("adapter %s may still be loaded: %s", name, error)
            shutil.rmtree(directory, ignore_errors=True)

    def draw(self, requests: Sequence[tuple[str, PromptPool, int]]) -> list[list[Rollout]]:
        """(model, prompt, n) each: its scored completions. All are drawn at once, then scored in one go."""
        started_at = time.monotonic()
        draws = [Draw(model, pool.prompt_ids, pool.sampling, n) for model, pool, n in requests]
        rollouts = self.scored([pool for _, pool, _ in requests], self.engines.sample(draws))
        self.seconds_per_sample = (time.monotonic() - started_at) / max(1, sum(map(len, rollouts)))
        return rollouts

    def scored(self, pools: Sequence[PromptPool], drawn: Sequence[Sequence[Candidate]]) -> list[list[Rollout]]:
        """What was drawn of each prompt, scored in one go."""
        pairs = [(pool, one) for pool, group in zip(pools, drawn, strict=True) for one in group]
        self.tokens += sum(len(one.token_ids) for _, one in pairs)
        rollouts = iter(self._score(pairs))
        return [[next(rollouts) for _ in group] for group in drawn]

    def fresh_groups(
        self, policy: TrainedPolicy, anchor: Mapping[str, Tensor], pools: Sequence[PromptPool], num_anchor_samples: int
    ) -> tuple[list[FreshGroup], list[Rollout]]:
        """One sample of the policy and some of its anchor for each prompt; and the policy's samples by themselves."""
        with self.served(policy) as policy_name, self.served(policy, anchor) as anchor_name:
            asked = ((policy_name, 1), (anchor_name, num_anchor_samples))
            drawn = self.draw([(name, pool, count) for name, count in asked for pool in pools])
        own = [group[0] for group in drawn[: len(pools)]]
        rows = zip(pools, own, drawn[len(pools) :], strict=True)
        return [fresh_group(*row) for row in rows], own

    def ranked_groups(
        self, policy: TrainedPolicy, factors: Mapping[str, Tensor], pools: Sequence[PromptPool], samples_per_prompt: int
    ) -> tuple[list[RankedGroup], list[Rollout]]:
        """Fresh samples of the policy with these factors for each prompt, beside its logged candidates; and the first
        one of each."""
        with self.served(policy, factors) as name:
            drawn = self.draw([(name, pool, samples_per_prompt) for pool in pools])
        groups = [ranked_group(pool, samples) for pool, samples in zip(pools, drawn, strict=True)]
        return groups, [samples[0] for samples in drawn]

    def _score(self, pairs: Sequence[tuple[PromptPool, Candidate]]) -> list[Rollout]:
        scores = self.engines.score(
            [Completion(pool.prompt, pool.messages, candidate.text) for pool, candidate in pairs]
        )
        return [Rollout(candidate, score.reward) for (_, candidate), score in zip(pairs, scores, strict=True)]


def fresh_group(pool: PromptPool, sample: Rollout, of_anchor: Sequence[Rollout]) -> FreshGroup:
    """A sample of the policy, ranked together with those of its anchor."""
    (rank,), anchor_ranks = serving_ranks_of([sample], of_anchor)
    return FreshGroup(
        pool.prompt_ids,
        sample.candidate.token_ids,
        float(rank),
        [one.candidate.token_ids for one in of_anchor],
        anchor_ranks.tolist(),
    )


def ranked_group(pool: PromptPool, samples: Sequence[Rollout]) -> RankedGroup:
    """Samples of the policy, ranked together with the logged candidates."""
    ranks, logged_ranks = serving_ranks_of(samples, pool.candidates)
    return RankedGroup(
        pool.logged_group._replace(rewards=logged_ranks.tolist()),
        [sample.candidate.token_ids for sample in samples],
        ranks.tolist(),
        [sample.logprob for sample in samples],
        [sample.reward for sample in samples],
    )


def spread(pools: Sequence[PromptPool], at_most: int) -> list[PromptPool]:
    """At most so many pools, evenly spread."""
    count = min(at_most, len(pools))
    return [pools[i * len(pools) // count] for i in range(count)]


def live_metrics(policy: TrainedPolicy, pools: Sequence[PromptPool], samples: Sequence[Rollout]) -> dict[str, float]:
    """What one fresh sample of the policy per prompt says: its reward, whether complete or not, KL(policy ‖ reference)
    in nats, and its win rate, as served, against the reference's logged candidates of the same prompt."""
    tokens = [
        TokenGroup(pool.prompt_ids, [sample.candidate.token_ids]) for pool, sample in zip(pools, samples, strict=True)
    ]
    reference = [float(logprob_1) for logprob_1 in policy.reference_logprobs(tokens)]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    wins = [win for pool, sample in zip(pools, samples, strict=True) for win in _wins(sample, pool.drawn_by_reference)]
    metrics = {
        "kl_policy_reference": fmean(
            sample.logprob - logprob for sample, logprob in zip(samples, reference, strict=True)
        ),
        "tokens": fmean(len(sample.candidate.token_ids) for sample in samples),
    }
    maybe = {"win_rate": wins, "reward": rewards}
    return metrics | {name: fmean(values) for name, values in maybe.items() if values}


def _wins(sample: Rollout, others: Sequence[LoggedCandidate]) -> list[float]:
    """1 against what it is served before, ½ where it ties."""
    own_1, other_M = serving_ranks_of([sample], others)
    return [float(win) for win in (own_1 > other_M) + (own_1 == other_M) / 2]

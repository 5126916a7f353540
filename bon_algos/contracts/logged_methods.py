"""The methods that learn from logged candidates alone: what each is asked to do, with vetted defaults.

Owns the parameters, their ranges and what they mean. Does not own the methods that need fresh samples, nor the choice
of one (`bon_algos.contracts.methods`).
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field

from bon_algos.contracts.method_families import (
    MOST_N,
    ContrastSpec,
    CountedQuantiles,
    LearnedQuantiles,
    LoggedSpec,
    WeighedSpec,
    a_little_above,
)


class OfflineBondSpec(LoggedSpec):
    """BOND (arXiv 2407.14622, eq. 15) from logged candidates alone: its backward part by importance weights, held to
    the reference by the exact KL of every token, which sees what no candidate says. Published: nothing, it is ours."""

    backward_n: int = Field(20, ge=2, le=MOST_N)
    """The best-of-n aimed at by the backward part, which may be more than there are candidates: a policy lands a little
    below. Left out: a quarter above the job's n."""
    jeffreys_weight: float = Field(0.6, ge=0, le=1)
    """Weight of the backward KL; 0 is imitation alone."""
    token_kl_weight: float = Field(0.12, ge=0, le=100)
    """Weight of the exact KL of every token; less lets mass leak to completions that no log holds."""
    max_importance: float = Field(4.0, ge=1, le=1e6)
    """A candidate's weight π/π_ref counts at most so much."""
    return_floor: float = Field(-10.0, ge=-1000, le=0)
    """Nats below which a candidate's return, log π_BoN/π, counts by its logarithm."""
    candidates_per_prompt: int = Field(8, ge=2, le=4096)
    """Candidates looked at when a prompt's turn comes: half of them drawn by best-of-n's weights, half evenly."""
    averaged_steps: int = Field(40, ge=1)
    """The policy is the mean of its weights over so many last steps (SWA, arXiv 1803.05407)."""
    interpolation: float = Field(0.96, gt=0, le=1)
    """How far from the reference's weights to those the policy is put in the end (LITI, WARP, arXiv 2406.16768): the
    last of the way brings little reward and much KL."""

    @property
    def log_aim(self) -> float | None:
        return math.log(self.backward_n if self.jeffreys_weight else self.n)

    def towards(self, n: int) -> Self:
        return super().towards(n)._with_missing(backward_n=a_little_above(n))


class TokenBondSpec(LoggedSpec):
    """BOND (arXiv 2407.14622, eq. 15) token by token, from logged candidates alone: a critic learns what each next
    token does to a candidate's rank, and the policy what best-of-n says next, over the whole vocabulary. Published:
    nothing, it is ours; values of prefixes guide a sampler in controlled decoding (arXiv 2310.17022) and Q♯ (arXiv
    2502.20548)."""

    n: int = Field(20, ge=2, le=MOST_N)
    """The best-of-n aimed at, which may be more than a prompt has candidates: the critic learns of all prompts. Left
    out: a quarter above the job's n."""
    steps: int = Field(1200, ge=2, le=1_000_000)
    """Of critic and policy together."""
    critic_share: float = Field(0.5, gt=0, lt=1)
    """Of the steps, the first: the critic learns, and the policy stands still."""
    critic_learning_rate: float = Field(3e-3, gt=0, le=1)
    critic_candidates: int = Field(16, ge=1, le=4096)
    """Candidates, evenly drawn, that the critic learns from when a prompt's turn comes: they cost a pass of the
    reference."""
    jeffreys_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the backward KL at each prefix."""
    value_weight: float = Field(0.1, ge=0, le=1000)
    """Weight of the error with which a linear probe reads a prefix's value off the policy's state: it makes the policy
    keep in mind what was said so far."""
    candidates_per_prompt: int = Field(8, ge=2, le=4096)
    """Candidates that the policy looks at when a prompt's turn comes: half of them drawn by best-of-n's weights, half
    evenly."""
    averaged_steps: int = Field(100, ge=1)
    """The policy is the mean of its weights over so many last steps (SWA, arXiv 1803.05407)."""
    interpolation: float = Field(0.95, gt=0, le=1)
    """How far from the reference's weights to those the policy is put in the end (LITI): it calms a policy where it
    has come off every candidate's way, which is in one completion of a hundred a tenth of all KL."""

    @property
    def critic_steps(self) -> int:
        """At least one, and one less than all."""
        return min(max(1, round(self.critic_share * self.steps)), self.steps - 1)

    @property
    def candidates_needed(self) -> int:
        return 2  # a rank needs another

    def towards(self, n: int) -> Self:
        return self._with_missing(n=a_little_above(n))


class BonSftSpec(LoggedSpec):
    """Supervised fine-tuning on the best of n logged candidates: the forward KL with the winner's sample alone.
    Published: it is BOND with a jeffreys_weight of 0, at n of 4, 8 and 16; its rate and batch are not told."""


class BonbonSpec(ContrastSpec):
    """BoNBoN (arXiv 2406.00832): the best and the worst of n logged candidates, as published. Its optimum is not
    best-of-n: it is stopped before. Published: n = 8, α = .005, RMSprop at 5e-7 on all weights, 150 steps of
    warm-up, batches of 64, gradients clipped at 10."""

    imitation_weight: float = Field(0.005, ge=0, le=1)
    """α: weight of imitation of the best; as published it is all but inert."""


class BonbonConsistentSpec(ContrastSpec, WeighedSpec):
    """BoNBoN with each pair's own target, over all pairs of the candidates looked at: its optimum is best-of-n.
    Published: nothing, it is ours."""

    candidates_per_prompt: int = Field(4, ge=2, le=4096)
    """Candidates looked at when a prompt's turn comes, of which every two are compared: drawn evenly, others at the
    next turn."""


class DpoSpec(ContrastSpec):
    """DPO (arXiv 2305.18290) on the best and the worst of n logged candidates. It has no optimum on such pairs: its
    strength and its steps decide where it stops. Published: β = .1, all weights at 1e-6."""

    learning_rate: float = Field(3e-4, gt=0, le=1)
    beta: float = Field(1.0, gt=0, le=100)
    """Inverse temperature: how much of a log-ratio counts as a reward."""


class IpoSpec(ContrastSpec):
    """IPO (arXiv 2310.12036, eq. 17, token sums) on the best and the worst of n logged candidates.
    Published, by BoNBoN: β of 1/(2(n − 1)·H_{n−1}), .0275 for n = 8."""

    learning_rate: float = Field(3e-4, gt=0, le=1)
    beta: float = Field(0.1, gt=0, le=100)
    """1/(2β) nats is the log-ratio that every pair is to have."""


class BonForwardKlSpec(WeighedSpec):
    """Imitation of best-of-n from logged candidates alone: forward KL with the exact (Rao–Blackwell) weights
    of every candidate (algorithms.md 1.1), i.e. the forward part of BOND without throwing candidates away. Published:
    nothing, it is ours."""


class BonRegressionSpec(ContrastSpec, WeighedSpec):
    """Pointwise log-quantile regression of the policy's log-ratio (algorithms.md 1.7, item 5; QRPO 2507.08068).
    Published: QRPO's loss, on quantiles and not their logs, at 8B; no setting for these."""

    huber_delta: float | None = Field(None, gt=0)
    """Nats beyond which the loss is linear; None is the square loss."""
    quantiles: Literal[CountedQuantiles, LearnedQuantiles] = "harmonic_mid"
    """Counted: of a reward among its prompt's other candidates. Learned, from other prompts' candidates (BOND, B.1):
    for prompts that hardly ever repeat, and groups smaller than n. Where a prompt's rewards tie levels are counted all
    the same, for n beyond 2: what is learned tells no level's breadth. With candidates of other policies harmonic_mid
    alone, which weighs them."""

    @property
    def counted(self) -> CountedQuantiles | None:
        """None: they are learned."""
        match self.quantiles:
            case "learned_law" | "learned_head":
                return None
            case counted:
                return counted

    @property
    def learned(self) -> LearnedQuantiles | None:
        """None: they are counted."""
        match self.quantiles:
            case "learned_law" | "learned_head" as learned:
                return learned
            case _:
                return None

    @property
    def candidates_needed(self) -> int:
        return 2 if self.learned else self.n

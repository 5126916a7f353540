"""What methods of distillation have in common: steps, rates, and how far they are to go.

Owns the parameters that several methods share, and the names of estimators. Does not own the methods
(`bon_algos.contracts.methods`).
"""

from __future__ import annotations

import math
from typing import Final, Literal, Self

from pydantic import Field

from bon_algos.contracts.record import Record

MOST_N: Final = 4096
LOGGED_N: Final = 16
"""Of the best-of-n that is learned from a log, where nobody says otherwise: more needs more candidates of a prompt."""


CountedQuantiles = Literal["harmonic_mid", "harmonic", "monte_carlo", "mid_rank", "add_one"]
"""How the log-quantile of a reward is estimated from so many of the reference's (`bon_algos.quantiles.log_quantile_…`).
harmonic_mid: half of the ties count as below, and the mean is that of a series of the log, without a clip; for n beyond
2 a level of tied rewards counts with its breadth. harmonic: the same of the share at or below, so ties count as beaten.
monte_carlo: the log of the share at or below, as BOND published it (eq. 10). mid_rank: of the share below and half of
the ties. Both lie below what they estimate in the mean (Jensen), and would be −∞ under all of the reference, where the
reward counts as half a draw instead. add_one: of one more than are strictly below, as vBoN released it; ties count as
unbeaten, and small quantiles come out too large."""


LearnedQuantiles = Literal["learned_law", "learned_head"]
"""learned_law: a law of rewards given the prompt. learned_head: BOND's head on prompt and completion, which also sees
the reward; it does not know that quantiles rise with rewards, and reads every candidate once more."""


class TrainingSpec(Record):
    """What every method needs to be trained."""

    steps: int = Field(200, ge=1, le=1_000_000)
    prompts_per_step: int = Field(16, ge=2, le=4096)
    """Each prompt brings its candidates; the baseline of on-policy methods needs at least two."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    warmup_steps: int = Field(10, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    lora_rank: Literal[1, 8, 16, 32, 64, 128, 256] = 8
    """One of the ranks the engine can serve."""
    lora_alpha: float = Field(32.0, gt=0, le=4096)

    @property
    def candidates_needed(self) -> int:
        """How many logged candidates a prompt must have, all its groups pooled."""
        return 2  # something to be ranked among

    @property
    def log_aim(self) -> float | None:
        """log n, where best-of-n of its reference is what a policy is to end at. None: it aims at none."""
        return None

    def towards(self, n: int) -> Self:
        """The spec that replaces best-of-n: what its caller left out of how far to go follows from n."""
        return self

    def _with_missing(self, **aims: int) -> Self:
        return self.model_copy(update={name: n for name, n in aims.items() if name not in self.model_fields_set})


def a_little_above(n: int) -> int:
    """A quarter more: policies land a little below what they aim at (docs/log.md)."""
    return min(5 * n // 4, MOST_N)


class LoggedSpec(TrainingSpec):
    """What methods that learn from n logged candidates of a prompt share."""

    n: int = Field(LOGGED_N, ge=2, le=MOST_N)
    """The best-of-n that is learned; at most the number of candidates of a prompt, all its groups pooled. Left out: the
    job's n, and no more than 16."""

    @property
    def candidates_needed(self) -> int:
        return self.n

    @property
    def log_aim(self) -> float | None:
        return math.log(self.n)

    def towards(self, n: int) -> Self:
        return self._with_missing(n=min(n, LOGGED_N))


class WeighedSpec(LoggedSpec):
    """What methods that look at all candidates of a prompt, some at a time, share."""

    candidates_per_prompt: int = Field(4, ge=1, le=4096)
    """Candidates looked at when a prompt's turn comes: drawn so that the loss is unbiased, others at the next turn."""


class SampledSpec(TrainingSpec):
    """What methods share that learn from fresh samples of the policy alone, several of each prompt: each one's baseline
    is the mean of the others. Samples are drawn while the step before trains, so they are one update old."""

    samples_per_prompt: int = Field(4, ge=2, le=64)
    """Fresh samples of a prompt at its turn."""


class ContrastSpec(LoggedSpec):
    """What methods share that also push logged completions down: in large steps they push the end of the sequence down
    with them, or mass to where no log looks, and it is their rate that keeps them near the reference."""

    learning_rate: float = Field(1e-4, gt=0, le=1)

"""When one sample of a distilled policy is not good enough: a threshold on its reward.

Owns: the threshold that keeps a chosen share of best-of-n's gain, learned from pairs, and what is missed by not
escalating. Does not own: drawing, nor which prompts are drawn from both policies (that must not depend on rewards).
numpy alone.

Where the sample's reward s is below the threshold, n candidates of the base policy are drawn beside it and the best of
all is served: max(s, b). The mean of what is served rises with the threshold, from E s to E max(s, b).

Dimension key:  P pairs, one prompt each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from bon_algos.reward_laws import Array

NEAR_SHARE: Final = 0.2
"""Of the pairs, those whose samples' rewards are nearest tell what escalating would have gained."""


class Pair(NamedTuple):
    """One prompt, drawn from both policies whatever either was worth."""

    sample: float
    """The distilled policy's one reward."""
    best: float
    """The highest of the base policy's n."""


@dataclass(frozen=True)
class EscalationRule:
    threshold: float
    """Samples with a lower reward are escalated; −∞: none is, ∞: every one."""
    escalated_share: float
    """Of the pairs."""
    sample_P: Array
    """Ascending."""
    gain_P: Array
    """What escalating adds to each: at least 0."""

    def gain_missed(self, sample: float) -> float:
        """What escalating is expected to add to a sample with this reward."""
        near = max(1, round(NEAR_SHARE * self.sample_P.size))
        return float(self.gain_P[np.argsort(np.abs(self.sample_P - sample), kind="stable")[:near]].mean())


def learned_escalation(pairs: Sequence[Pair], kept_gain: float) -> EscalationRule:
    """The lowest threshold at which the mean reward is E s + kept_gain · (E b − E s), or more.

    ValueError without pairs, for rewards that are not finite and for a share outside [0, 1].
    """
    if not 0 <= kept_gain <= 1:
        raise ValueError(f"a share is in [0, 1], got {kept_gain}")
    rewards = np.array(pairs, dtype=np.float64)
    if rewards.ndim != 2 or not np.isfinite(rewards).all():
        raise ValueError("a threshold is learned from pairs of finite rewards")
    sample_P, best_P = rewards[rewards[:, 0].argsort(kind="stable")].T
    gain_P = np.maximum(best_P - sample_P, 0.0)
    wanted = kept_gain * (best_P.mean() - sample_P.mean())
    # Entry m: gained in all by escalating the m lowest; where samples tie it is all of them or none.
    gained = np.concatenate(([0.0], np.cumsum(gain_P))) / gain_P.size
    thresholds = np.concatenate((sample_P, [np.inf]))
    is_whole = np.concatenate(([True], np.diff(sample_P) > 0, [True]))
    lowest = int(np.flatnonzero(is_whole & (gained >= wanted - 1e-12 * abs(wanted)))[0])
    threshold = -np.inf if lowest == 0 else float(thresholds[lowest])
    return EscalationRule(threshold, lowest / gain_P.size, sample_P, gain_P)

"""Who is served before whom: a complete candidate before an incomplete one, then the higher reward. As ranks, no torch.

Owns the order of candidates that are compared with each other, and of those without a reward, which are never served.
Does not own which of equals is served (`CandidateGroup.best`), nor estimates from ranks (`order`, `quantiles`).

A rank has a meaning within its pool alone: whatever is to be compared (fresh samples with logged candidates, a policy's
draws with its reference's) is ranked in one call. Being counted and not computed from rewards, ranks are the same for
every strictly increasing transform of them, and no reward is large enough to lift an incomplete candidate.

Dimension key:  M candidates of a pool
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bon_algos.order import Array


class Scored(Protocol):
    """What serving looks at."""

    @property
    def reward(self) -> float | None: ...

    @property
    def is_complete(self) -> bool: ...


def serving_ranks(reward_M: ArrayLike, is_complete_M: ArrayLike) -> Array:
    """0 for what is served last of all, and one more for each step up; who ties has one rank.

    Two arrays of one shape, all of it one pool -> that shape; whole numbers. ValueError when shapes differ or a reward
    is not finite.
    """
    return _ranks(np.asarray(reward_M, dtype=np.float64), np.asarray(is_complete_M, dtype=bool))


def serving_ranks_of(*sides: Sequence[Scored]) -> list[Array]:
    """Ranks of each side's candidates in the pool of all sides; those without a reward tie below all others.

    Sequences of M₁, M₂, … candidates -> (M₁,), (M₂,), …; as `serving_ranks`.
    """
    pool = [*chain.from_iterable(sides)]
    reward_M = np.array([0.0 if one.reward is None else one.reward for one in pool], dtype=np.float64)
    class_M = np.array([0 if one.reward is None else 1 + one.is_complete for one in pool], dtype=np.intp)
    return np.split(_ranks(reward_M, class_M), [*accumulate(map(len, sides))][:-1])


def _ranks(reward: Array, class_: NDArray[np.intp] | NDArray[np.bool_]) -> Array:
    """By class, a whole number at least 0, then by reward: two levels of rewards are never `reward.size` apart."""
    if reward.shape != class_.shape or not np.isfinite(reward).all():
        raise ValueError(f"need a finite reward of each candidate: {reward.shape}, {class_.shape}")
    _, level = np.unique(reward, return_inverse=True)
    _, rank = np.unique(level.reshape(reward.shape) + reward.size * class_, return_inverse=True)
    ranks: Array = rank.reshape(reward.shape).astype(np.float64)
    return ranks

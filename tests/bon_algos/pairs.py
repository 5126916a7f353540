"""The best and the worst of n draws, exactly: their law over all pairs of outcomes, and best-of-n's tilt of each."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bon_algos import quantiles
from tests.bon_algos.vectors import REWARDS, per_outcome, the_law_as_draws

Array = NDArray[np.float64]


def best_worst_law(mass_K: Array, reward_K: ArrayLike, n: int) -> Array:
    """P(best of n draws = row, worst = column), the first one drawn at ties. (K, K).

    Different levels are held by different draws, each spread over its level as the reference is; when all draws are on
    one level both are the first draw.
    """
    _, level_K = np.unique(reward_K, return_inverse=True)
    mass = np.bincount(level_K, weights=mass_K)
    edge = np.concatenate(([0.0], mass.cumsum()))
    all_within = np.maximum(edge[:, None] - edge, 0) ** n  # P(all draws below edge i and above edge j)
    of_levels = -np.diff(np.diff(all_within, axis=0), axis=1)
    share_K = mass_K / mass[level_K]
    law_KK = of_levels[level_K[:, None], level_K] * share_K[:, None] * share_K
    law_KK[level_K[:, None] == level_K] = 0
    np.fill_diagonal(law_KK, of_levels[level_K, level_K] * share_K)
    return np.asarray(law_KK, dtype=np.float64)


def exact_tilt(vector: str, n: int) -> Tensor:
    """log π_BoN/π_ref of each outcome, by the estimator on the 210 draws that are the law. (20,)."""
    standing = quantiles.standing_among_others(the_law_as_draws(REWARDS[vector]))
    return torch.tensor(per_outcome(quantiles.log_tilt_levels(standing, n)))

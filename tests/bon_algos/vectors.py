"""The finite policy every exact test enumerates: 20 outcomes, three rewards (unique, tied, binary)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_K = np.arange(20)

COUNT_K = 1 + (7 * _K) % 20
"""The reference's masses in units of 1/210, so that 210 draws can be the law itself."""
REFERENCE_K: NDArray[np.float64] = COUNT_K / 210

UNIQUE_K: NDArray[np.float64] = ((3 * _K + 5) % 20).astype(float)
TIED_K: NDArray[np.float64] = UNIQUE_K // 4
"""Five levels of four outcomes."""
BINARY_K: NDArray[np.float64] = (UNIQUE_K >= 14).astype(float)
"""Right with probability 67/210."""

REWARDS = {"U": UNIQUE_K, "T": TIED_K, "B": BINARY_K}


def kl(law_K: NDArray[np.float64], other_K: NDArray[np.float64]) -> float:
    return float((law_K * np.log(law_K / other_K)).sum())


def win_rate_against_reference(law_K: NDArray[np.float64], reward_K: NDArray[np.float64]) -> float:
    """P(a draw of the law > a draw of the reference) + half the ties, by enumerating all pairs."""
    beats_KK = (reward_K[:, None] > reward_K) + (reward_K[:, None] == reward_K) / 2
    return float(law_K @ beats_KK @ REFERENCE_K)


def the_law_as_draws(reward_K: NDArray[np.float64]) -> torch.Tensor:
    """210 reference rewards whose shares are the reference's law exactly. (1, 210)."""
    return torch.tensor(np.repeat(reward_K, COUNT_K))[None]


def per_outcome(value_draws: torch.Tensor) -> NDArray[np.float64]:
    """A value of each of the 210 draws, back to one value for each outcome. (20,)."""
    first_draw_K = np.cumsum(COUNT_K) - COUNT_K
    values: NDArray[np.float64] = value_draws[0].numpy()[first_draw_K]
    return values

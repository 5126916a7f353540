"""What further draws of a prompt may earn, from its own rewards and those of other prompts.

Owns: the law of a route's rewards learned from logged groups, the posterior that a prompt's own rewards make of it, and
the expected gain of further draws. Does not own: when that gain is worth its tokens (`stopping`). numpy alone.

Rewards of a prompt are place + spread · z. The shape of z is the route's own, a kernel density of its standardised
residuals; place and log-spread are normal over prompts and may go together, their moments taken from the logged groups
with the noise of estimating them taken off. Particles of (place, spread) are weighed by the likelihood of what a prompt
has shown. Where a reward has few levels (right or wrong, one to ten) the particles are the logged prompts themselves.

Dimension key:  k rewards of a prompt · P particles · Z grid points · G logged groups · V levels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

PARTICLES: Final = 1024
MOST_LEVELS: Final = 32
"""Rewards with no more different values are taken level by level."""
OWN_DRAWS: Final = 1.0
"""How many draws of the route's law are added to a logged group's, so that no level is impossible."""
CEILING_SHARE: Final = 0.01
"""Of all logged rewards at the highest: then the scorer has a ceiling, and nothing is to be gained beyond it."""
LEAST_VARIANCE: Final = 1e-4
"""Over prompts, of the place in units of the variance within and of the log-spread: none is taken for known."""
LIKELIEST: Final = 0.95
"""Correlation of place and log-spread at most."""
OUTLIERS: Final = 1e-5
"""Share of a wide normal in every shape: a reward that no prompt has had is unlikely, never impossible."""
_STEP: Final = 0.01
_Z: Final = np.arange(-12.0, 12.0 + _STEP / 2, _STEP)
"""(Z,); standard deviations."""


class RewardLaw(Protocol):
    """Particles, each a law of rewards, equally likely before a prompt has shown any."""

    def log_likelihood(self, reward_k: Array) -> Array:
        """(k,) -> (k, P)"""

    def gain(self, best: float, count: int) -> Array:
        """E[(max of `count` draws − best)⁺] under each particle. (P,)"""

    def draw(self, weight_P: Array, count: int, rng: Generator) -> Array:
        """Draws of a prompt whose particle is drawn by weight. (count,)"""


def posterior(law: RewardLaw, rewards: ArrayLike) -> Array:
    """Weights of the particles once a prompt has shown these rewards, in whatever order. (P,), sums to 1.

    ValueError for a reward that is not finite."""
    return weights_of(law.log_likelihood(_finite(rewards)).sum(axis=0))


def weights_of(log_weight_P: Array) -> Array:
    weight_P = np.exp(log_weight_P - log_weight_P.max())
    weights: Array = weight_P / weight_P.sum()
    return weights


def expected_gain(law: RewardLaw, rewards: ArrayLike, count: int) -> float:
    """By how much `count` further draws are expected to exceed the best so far; in units of the reward, at least 0.

    ValueError without a reward, for one that is not finite, and for a count below 1.
    """
    reward_k = _finite(rewards)
    if reward_k.size == 0 or count < 1:
        raise ValueError(f"need at least one reward and one further draw, got {reward_k.size} and {count}")
    return float(posterior(law, reward_k) @ law.gain(float(reward_k.max()), count))


def learned_law(groups: Sequence[ArrayLike]) -> RewardLaw:
    """The law of prompts' rewards from logged groups, one prompt each, of two rewards or more.

    ValueError with fewer than two groups that differ within, or rewards that are not finite.
    """
    rows = [_finite(group) for group in groups]
    if any(row.size < 2 for row in rows):
        raise ValueError("a law is learned from groups of at least two rewards")
    spread_out = [row for row in rows if row.std() > 0]
    if len(spread_out) < 2:
        raise ValueError("a law is learned from at least two groups whose rewards differ")
    if np.unique(np.concatenate(rows)).size <= MOST_LEVELS:
        return _levelled(rows)
    return _shaped(spread_out, _ceiling(np.concatenate(rows)))


# --- rewards on a scale ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapedLaw:
    place_P: Array
    spread_P: Array
    log_density_Z: Array
    """Of the standardised reward."""
    cdf_Z: Array
    ceiling: float = math.inf

    def log_likelihood(self, reward_k: Array) -> Array:
        z_kP = (reward_k[:, None] - self.place_P) / self.spread_P
        log_likelihood_kP: Array = _looked_up(self.log_density_Z, z_kP) - np.log(self.spread_P)
        return log_likelihood_kP

    def gain(self, best: float, count: int) -> Array:
        if best >= self.ceiling:
            return np.zeros_like(self.place_P)
        gain_P = self._excess(best, count)
        return gain_P if math.isinf(self.ceiling) else gain_P - self._excess(self.ceiling, count)

    def _excess(self, level: float, count: int) -> Array:
        """E(max − level)⁺ = spread · ∫ 1 − Fᵐ from the standardised level on."""
        beyond_Z = 1 - self.cdf_Z**count
        slices = (beyond_Z[1:] + beyond_Z[:-1]) * (_STEP / 2)
        excess_Z = np.concatenate((np.cumsum(slices[::-1])[::-1], [0.0]))
        z_P = (level - self.place_P) / self.spread_P
        below_grid_P = np.maximum(_Z[0] - z_P, 0.0)
        excess_P: Array = self.spread_P * (_looked_up(excess_Z, z_P) + below_grid_P)
        return excess_P

    def draw(self, weight_P: Array, count: int, rng: Generator) -> Array:
        particle = rng.choice(weight_P.size, p=weight_P)
        z_k = np.interp(rng.random(count), self.cdf_Z, _Z)
        reward_k: Array = np.minimum(self.place_P[particle] + self.spread_P[particle] * z_k, self.ceiling)
        return reward_k


def _shaped(rows: Sequence[Array], ceiling: float) -> ShapedLaw:
    size_G, mean_G = np.array([row.size for row in rows]), np.array([row.mean() for row in rows])
    spread_G = np.array([row.std(ddof=1) for row in rows])
    within_G = spread_G**2 / size_G
    between = max(float(mean_G.var(ddof=1) - within_G.mean()), LEAST_VARIANCE * float((spread_G**2).mean()))
    noise = _noise_of_log_spread(rows, mean_G, spread_G)
    log_spread_G = np.log(spread_G) + noise
    of_spreads = max(float(log_spread_G.var(ddof=1)) - noise, LEAST_VARIANCE)
    together = float(np.cov(mean_G, log_spread_G)[0, 1]) / math.sqrt(between * of_spreads)
    together = min(max(together, -LIKELIEST), LIKELIEST) if of_spreads > LEAST_VARIANCE else 0.0
    # Residuals by a prompt's own deviation have too short a tail: what its draws do not tell of it is all prompts'.
    place_G = _towards_all(mean_G, between / (between + within_G))
    own_G = np.exp(_towards_all(log_spread_G, of_spreads / (of_spreads + noise)))
    residuals = np.concatenate([(row - m) / s for row, m, s in zip(rows, place_G, own_G, strict=True)])
    log_density_Z, cdf_Z = _density((residuals - residuals.mean()) / residuals.std())
    first_P, second_P = _normal_pairs(PARTICLES)
    second_P = together * first_P + math.sqrt(1 - together**2) * second_P
    return ShapedLaw(
        place_P=mean_G.mean() + math.sqrt(between) * first_P,
        spread_P=np.exp(log_spread_G.mean() + math.sqrt(of_spreads) * second_P),
        log_density_Z=log_density_Z,
        cdf_Z=cdf_Z,
        ceiling=ceiling,
    )


def _noise_of_log_spread(rows: Sequence[Array], mean_G: Array, spread_G: Array) -> float:
    """The log of a deviation of m draws is off by about (κ − 1 + 2/(m − 1))/4(m − 1) in variance, and below by as much.

    κ, the kurtosis, is taken from residuals by their own deviation, which leave (m − 1)/(m + 1) of it."""
    size_G = np.array([row.size for row in rows])
    residuals = np.concatenate([(row - m) / s for row, m, s in zip(rows, mean_G, spread_G, strict=True)])
    kurtosis = float(((residuals / residuals.std()) ** 4).mean() * ((size_G + 1) / (size_G - 1)).mean())
    return float(((kurtosis - 1 + 2 / (size_G - 1)) / (4 * (size_G - 1))).mean())


def _towards_all(value_G: Array, own_share: Array | float) -> Array:
    """Each prompt's value as far as its draws tell it, for the rest the mean over prompts."""
    mean = value_G.mean()
    values: Array = mean + own_share * (value_G - mean)
    return values


def _density(residuals: Array) -> tuple[Array, Array]:
    """Log-density and cdf of standardised residuals on the grid, by a normal kernel."""
    width = 0.75 * residuals.size**-0.2
    edges = np.concatenate((_Z - _STEP / 2, [_Z[-1] + _STEP / 2]))
    share_Z = np.histogram(np.clip(residuals, _Z[0], _Z[-1]), edges)[0] / residuals.size
    reach = np.arange(-round(5 * width / _STEP), round(5 * width / _STEP) + 1) * _STEP
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    smooth_Z = np.convolve(share_Z, kernel / kernel.sum(), mode="same")
    wide_Z = np.exp(-0.5 * (_Z / 4) ** 2)
    mass_Z = (1 - OUTLIERS) * smooth_Z / smooth_Z.sum() + OUTLIERS * wide_Z / wide_Z.sum()
    return np.log(mass_Z / _STEP), np.minimum(np.cumsum(mass_Z) - mass_Z / 2, 1.0)


def _looked_up(value_Z: Array, z: Array) -> Array:
    """Values on the grid at z by the line between neighbours, the grid's ends beyond it."""
    place = np.clip((z - _Z[0]) / _STEP, 0.0, _Z.size - 1.0)
    left = np.minimum(place.astype(np.intp), _Z.size - 2)
    found: Array = value_Z[left] + (place - left) * (value_Z[left + 1] - value_Z[left])
    return found


def _normal_pairs(count: int) -> tuple[Array, Array]:
    """Two standard normals, evenly spread: the additive recurrence of the plastic number."""
    plastic = 1.32471795724474602596
    steps = np.arange(1, count + 1)
    uniforms = [(0.5 + steps / plastic**power) % 1.0 for power in (1, 2)]
    first, second = (np.array([NormalDist().inv_cdf(float(u)) for u in uniform]) for uniform in uniforms)
    return first, second


def _ceiling(reward: Array) -> float:
    at_highest = int((reward == reward.max()).sum())
    return float(reward.max()) if at_highest > 1 and at_highest >= CEILING_SHARE * reward.size else math.inf


# --- rewards with few levels -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelledLaw:
    level_V: Array
    """Ascending."""
    mass_PV: Array

    def log_likelihood(self, reward_k: Array) -> Array:
        """A reward between two levels counts as the nearer one."""
        nearest_k = np.abs(reward_k[:, None] - self.level_V).argmin(axis=1)
        log_likelihood_kP: Array = np.log(self.mass_PV.T[nearest_k])
        return log_likelihood_kP

    def gain(self, best: float, count: int) -> Array:
        """Σ over levels of (width above the best) · P(max is above)."""
        at_most_PV = np.minimum(np.cumsum(self.mass_PV, axis=1), 1.0)
        width_V = np.diff(np.maximum(self.level_V, best))
        gain_P: Array = (1 - at_most_PV[:, :-1] ** count) @ width_V
        # Where even the lowest level lies above the best, every draw gains up to it.
        return gain_P + max(float(self.level_V[0]) - best, 0.0)

    def draw(self, weight_P: Array, count: int, rng: Generator) -> Array:
        mass_V = self.mass_PV[rng.choice(weight_P.size, p=weight_P)]
        return self.level_V[rng.choice(mass_V.size, size=count, p=mass_V / mass_V.sum())]


def _levelled(rows: Sequence[Array]) -> LevelledLaw:
    level_V, of_all = np.unique(np.concatenate(rows), return_counts=True)
    share_V = of_all / of_all.sum()
    count_GV = np.stack([np.bincount(np.searchsorted(level_V, row), minlength=level_V.size) for row in rows])
    mass_GV = (count_GV + OWN_DRAWS * share_V) / (count_GV.sum(axis=1, keepdims=True) + OWN_DRAWS)
    return LevelledLaw(level_V, mass_GV)


def _finite(values: ArrayLike) -> Array:
    reward_k = np.asarray(values, dtype=np.float64)
    if reward_k.ndim != 1 or not np.isfinite(reward_k).all():
        raise ValueError("rewards are a list of finite numbers")
    return reward_k

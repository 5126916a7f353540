"""Learning from completions that another policy drew.

Owns truncated importance weights of completions, TOPR's taper of advantages, and what stands for the reference when the
draws are another policy's: shares, levels and best-of-n weights by self-normalised importance.
Does not own any loss, nor what draws of the reference itself are worth (`order`, `quantiles`: less biased there).

"Sampled" names the policy π_b that drew a completion. Weights are data: no gradient passes through them. Log-probs are
in nats; of whole completions they are token sums.

Dimension key:  B prompts · N candidates per prompt · M draws of another policy for one prompt
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bon_algos import order
from bon_algos.order import Array

# --- weights of a loss -----------------------------------------------------------------------------------


def truncated_importance(logprob_BN: Tensor, sampled_logprob_BN: Tensor, *, max_importance: float) -> Tensor:
    """min(c, π/π_b) of whole completions, held fixed.

    At c = ∞ a loss −w·A·log π over draws of π_b has the expected gradient of the one over draws of π; its variance
    grows exponentially with length. A finite c gives less to what π_b hardly ever draws, so never more than it is due.

    (B, N), (B, N) or any one shape -> that shape; in (0, c], c ≥ 1. ValueError when shapes differ.
    """
    log_ratio_BN = _log_ratio(logprob_BN, sampled_logprob_BN)
    return log_ratio_BN.clamp(max=_log_cap(max_importance)).exp()


def tapered_advantage(advantage_B: Tensor, logprob_B: Tensor, sampled_logprob_B: Tensor) -> Tensor:
    """Advantages of another policy's samples: good ones as they are, bad ones times min(1, π/π_b).

    A bad sample that the policy has turned from would be pushed down again and again, without end; one that it would
    give again is pushed as if it were fresh. Tapered off-policy REINFORCE (TOPR, arXiv:2503.14286, eq. 8); exact where
    the two policies are one.

    (B,) each or any one shape -> that shape. ValueError when shapes differ.
    """
    if advantage_B.shape != logprob_B.shape:
        raise ValueError(f"one advantage for each log-prob: {advantage_B.shape}, {logprob_B.shape}")
    ratio_B = _log_ratio(logprob_B, sampled_logprob_B).clamp(max=0.0).exp()
    return torch.where(advantage_B < 0, ratio_B * advantage_B, advantage_B)


def _log_ratio(logprob: Tensor, sampled_logprob: Tensor) -> Tensor:
    if logprob.shape != sampled_logprob.shape:
        raise ValueError(f"one sampled log-prob for each log-prob: {sampled_logprob.shape}, {logprob.shape}")
    log_ratio = (logprob - sampled_logprob).detach()
    if not log_ratio.isfinite().all():
        raise ValueError("log-probs are not all finite")
    return log_ratio


def _log_cap(max_importance: float) -> float:
    if not max_importance >= 1:
        raise ValueError(f"a cap on importance is at least 1, got {max_importance}")
    return math.log(max_importance)


# --- the reference, from draws of another policy ---------------------------------------------------------


def shares_of_reference(
    reference_logprob_M: ArrayLike, sampled_logprob_M: ArrayLike, *, max_importance: float = math.inf
) -> Array:
    """For how much of the reference's law each draw of π_b stands: min(c, π_ref/π_b) over their sum.

    Self-normalised importance sampling, consistent as M grows when c = ∞. A finite c leaves a bias towards what π_b
    draws that no M removes: cap only where `effective_sample_size` is hopeless.

    (M,), (M,) token sums -> (M,); non-negative, sums to 1. ValueError when shapes differ.
    """
    log_ratio_M = _vector(reference_logprob_M) - _same_shape(sampled_logprob_M, reference_logprob_M)
    log_weight_M = np.minimum(log_ratio_M, _log_cap(max_importance))
    weight_M = np.exp(log_weight_M - log_weight_M.max())
    shares_M: Array = weight_M / weight_M.sum()
    return shares_M


def mixture_logprob(logprob_KM: ArrayLike, count_K: ArrayLike) -> Array:
    """log Σ_k m_k/M · π_k(y): the law of M draws, m_k of them from policy k, whoever drew which.

    As `shares_of_reference`'s sampled log-probs they are the balance heuristic (Veach and Guibas, 1995): no draw of the
    reference stands for more than M/m_ref of an even share, where it is among the K.

    (K, M) token sums, (K,) draws of each -> (M,); nats. ValueError when shapes differ or a count is negative.
    """
    logprob, count = np.asarray(logprob_KM, dtype=np.float64), np.asarray(count_K, dtype=np.float64)
    if logprob.ndim != 2 or count.shape != logprob.shape[:1] or not np.isfinite(logprob).all():
        raise ValueError(f"need finite (K, M) and (K,), got {logprob.shape} and {count.shape}")
    if count.min() < 0 or count.sum() != logprob.shape[1]:
        raise ValueError(f"{count.sum():g} draws counted, {logprob.shape[1]} given")
    drew = count > 0
    mixture_M: Array = np.logaddexp.reduce(logprob[drew] + np.log(count[drew] / count.sum())[:, None], axis=0)
    return mixture_M


def effective_sample_size(weight_M: ArrayLike) -> float:
    """(Σ w)²/Σ w²: how many equally weighted draws are as good for a mean; from 1 to M. (M,), not all 0 -> draws."""
    weight = _vector(weight_M)
    if weight.min() < 0 or weight.max() == 0:
        raise ValueError("weights must not be negative, nor all 0")
    relative = weight / weight.max()
    return float(relative.sum() ** 2 / (relative**2).sum())


def _edges(reward_N: Array, reference_M: Array, share_M: Array) -> tuple[Array, Array]:
    """The shares of what is below each reward, and of what is at most it."""
    ascending = np.argsort(reference_M, kind="stable")
    inner = np.minimum(np.cumsum(share_M[ascending])[:-1], 1.0)
    edge = np.concatenate(([0.0], inner, [1.0]))  # whatever rounding made of the sum
    below, at_most = (np.searchsorted(reference_M[ascending], reward_N, side=side) for side in ("left", "right"))
    return edge[below], edge[at_most]


def levels_of_shares(reward_M: ArrayLike, share_M: ArrayLike) -> Array:
    """The reward level (L, U] of each draw in the reference's law, from the other draws: these count as their effective
    number E, and the draw itself as one more on its own level, so that no draw is below all there is.

        L = E·(share below)/(E + 1),   U = (E·(share at most) + 1)/(E + 1)

    For `order.log_tilt_of_level`. At equal shares E = M − 1 and that is `quantiles.log_tilt_levels`; of draws that all
    tie, each is on (0, 1]. (M,), (M,) -> (M, 2); L < U. ValueError with fewer than two draws.
    """
    reward, share = _vector(reward_M), _checked_shares(share_M, reward_M)
    if reward.size < 2:
        raise ValueError("a draw has no others to stand among")
    return np.array([_level_among_others(reward, share, j) for j in range(reward.size)])


def _level_among_others(reward_M: Array, share_M: Array, j: int) -> tuple[float, float]:
    others, weight = np.delete(reward_M, j), np.delete(share_M, j)
    if weight.sum() == 0:  # the draw stands for everything: nothing is known of its place
        return 0.0, 1.0
    effective = effective_sample_size(weight)
    below_1, at_most_1 = _edges(reward_M[j : j + 1], others, weight / weight.sum())
    return effective * float(below_1[0]) / (effective + 1), (effective * float(at_most_1[0]) + 1) / (effective + 1)


def best_of_n_weights_of_shares(reward_M: ArrayLike, share_M: ArrayLike, n: int) -> Array:
    """How much of the reference's best-of-n law each draw of π_b stands for.

    v_j = C_jⁿ − C_{j−1}ⁿ over the shares C accumulated by reward, ties in proportion to their shares: best-of-n of the
    draws as a finite policy. Biased low at small M, equal shares included: where π_b is the reference, use
    `order.best_of_n_weights`, which is not.

    (M,), (M,) -> (M,), in drawing order; non-negative, sums to 1. ValueError when n is not in 1..M or the shares are
    no law.
    """
    reward, share = _vector(reward_M), _checked_shares(share_M, reward_M)
    if not 1 <= n <= reward.size:
        raise ValueError(f"best-of-{n} needs 1 ≤ n ≤ {reward.size} draws")
    weight_M, is_held_M = np.zeros_like(share), share > 0
    weight_M[is_held_M] = order.best_of_n_law(share[is_held_M], reward[is_held_M], n)
    return weight_M


def _vector(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"need finite values of one prompt, got shape {array.shape}")
    return array


def _same_shape(values: ArrayLike, others: ArrayLike) -> Array:
    array = _vector(values)
    if array.shape != np.shape(others):
        raise ValueError(f"one value for each draw: {array.shape}, {np.shape(others)}")
    return array


def _checked_shares(share_M: ArrayLike, reward_M: ArrayLike) -> Array:
    share = _same_shape(share_M, reward_M)
    if share.min() < 0 or not math.isclose(share.sum(), 1.0, rel_tol=1e-6):
        raise ValueError(f"shares are not negative and sum to 1: least {share.min()}, sum {share.sum()}")
    return share

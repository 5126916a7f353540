"""Losses on pairs: of two completions of one prompt, one is preferred.

Owns DPO (arXiv:2305.18290) and IPO (arXiv:2310.12036), and which pair a group of candidates gives. Does not own
BoNBoN, whose pairs have a target of their own (`bonbon`). Both losses see a pair by one number, in nats,

    Δ = log[π(chosen)/π(rejected)] − log[π_ref(chosen)/π_ref(rejected)]

where log-probs are token sums of whole completions. IPO in trl (`loss_type="ipo"`) divides each log-ratio by its
completion's number of tokens, as the experiments of the IPO paper are said to have done: another loss than eq. 17, with
another optimum.

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from bon_algos.checks import check_finite, check_one_shape


class BestAndWorst(NamedTuple):
    """Places in a group; int64, 0..N − 1."""

    best: Tensor
    """(B,)"""
    worst: Tensor
    """(B,)"""


def best_and_worst(reward_BN: Tensor) -> BestAndWorst:
    """The candidate of the highest reward and that of the lowest, among the same draws; the earliest when they tie.

    In a group whose rewards are all equal both are the first candidate. Its Δ is 0 whatever the policy, and no loss
    on it has a gradient through Δ: such a pair teaches nothing and may be left out of the batch.

    (B, N) -> (B,), (B,). ValueError for another shape, an empty group, or rewards that are not all finite.
    """
    check_one_shape("BN", reward_BN)
    check_finite("rewards", reward_BN)
    return BestAndWorst(reward_BN.argmax(dim=-1), reward_BN.argmin(dim=-1))


def log_ratio_margin(
    chosen_logprob_B: Tensor, rejected_logprob_B: Tensor, chosen_reference_B: Tensor, rejected_reference_B: Tensor
) -> Tensor:
    """Δ: by how much the policy's log-ratio to the reference is higher on the chosen completion.

    (B,) each, token sums; only the policy's carry a gradient -> (B,), nats. ValueError for any other shape, none at
    all, or a log-prob of the reference that is not finite.
    """
    check_one_shape("B", chosen_logprob_B, rejected_logprob_B, chosen_reference_B, rejected_reference_B)
    check_finite("log-probs of the reference", chosen_reference_B, rejected_reference_B)
    return (chosen_logprob_B - rejected_logprob_B) - (chosen_reference_B - rejected_reference_B).detach()


def dpo_loss(
    chosen_logprob_B: Tensor,
    rejected_logprob_B: Tensor,
    chosen_reference_B: Tensor,
    rejected_reference_B: Tensor,
    *,
    beta: float,
) -> Tensor:
    """−log σ(β·Δ); DPO (arXiv:2305.18290) eq. 7.

    Where preferences are drawn from a Bradley–Terry law of rewards r, its minimiser is π ∝ π_ref · exp(r/β). Where the
    chosen one always wins, as the best of a group does, there is none: Δ is pushed up without end, ever more weakly.

    (B,) each, token sums; beta > 0, the inverse temperature of the preference -> (B,).
    """
    _check_beta(beta)
    margin_B = log_ratio_margin(chosen_logprob_B, rejected_logprob_B, chosen_reference_B, rejected_reference_B)
    return -functional.logsigmoid(beta * margin_B)


def ipo_loss(
    chosen_logprob_B: Tensor,
    rejected_logprob_B: Tensor,
    chosen_reference_B: Tensor,
    rejected_reference_B: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(Δ − 1/(2β))²; IPO (arXiv:2310.12036) eq. 17, where β is called τ. Not divided by length.

    Over independent pairs of the reference, the higher reward chosen and ties either way, its minimiser is
    π ∝ π_ref · exp(p_mid/β) with p_mid the mid-rank quantile: the highest win rate that its KL can buy.

    (B,) each, token sums; beta > 0 -> (B,), nats².
    """
    _check_beta(beta)
    margin_B = log_ratio_margin(chosen_logprob_B, rejected_logprob_B, chosen_reference_B, rejected_reference_B)
    return (margin_B - 1 / (2 * beta)).square()


def _check_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"need a positive, finite β, got {beta}")

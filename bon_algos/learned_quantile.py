"""A learned quantile: where a reward falls in the reference's law, for prompts that hardly ever repeat.

Owns two small heads on features of the caller (the mean hidden state of the base model, say), their labels and losses.
Does not own the features, the optimiser, nor quantiles that are counted (`quantiles`); counting needs many candidates
of one prompt, a head pools over prompts that look alike.

`QuantileHead` is BOND's (arXiv:2407.14622, B.1): features of prompt and completion to a quantile, by cross-entropy.
`RewardLawHead` uses that every candidate's reward is known: features of the prompt alone to a law of its rewards, whose
distribution function is the quantile, so it rises with the reward whatever the head has learned. Either head fits
candidates of its own prompts better than those of new ones: stop by the loss on prompts held out.

What depends on order alone: the labels, so `QuantileHead` is unchanged by a strictly increasing transform of each
prompt's rewards; `pooled_rank_score`, so `RewardLawHead` on scores is unchanged by one such transform of all rewards.
On raw rewards, or with a transform for each prompt, `RewardLawHead` is not: rewards then say more than their rank.

Dimension key:  B prompts · N candidates per prompt · M rewards · D features · C components of a law
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bon_algos.checks import check_finite, check_one_shape
from bon_algos.quantiles import Standing, standing_against

SMALLEST_SCALE = 0.01
"""Of a component; a law that shrank onto tied rewards would have a likelihood without end."""

# --- labels and losses -----------------------------------------------------------------------------------


def at_most_label(standing: Standing) -> Tensor:
    """The share of reference rewards at or below: 1{r(y') ≤ r(y)} for one y', as in the paper. (B, N), in [0, 1]."""
    return (standing.below + standing.tied).double() / standing.num_reference


def mid_rank_label(standing: Standing) -> Tensor:
    """The share of reference rewards below plus half the share of ties: for one y' 0, ½ or 1; for rewards that may tie.

    Cross-entropy is linear in its label, so the share of M rewards teaches what M labels would. With
    `quantiles.standing_among_others` each candidate is judged by the others of its prompt. (B, N), in [0, 1].
    """
    return (standing.below + standing.tied / 2).double() / standing.num_reference


def quantile_cross_entropy(log_odds_BN: Tensor, label_BN: Tensor) -> Tensor:
    """−label·log p − (1 − label)·log(1 − p), averaged over candidates; least where p is the label's expectation.

    With `at_most_label` that is P(r(y') ≤ r(y)), with `mid_rank_label` the mid-rank quantile, whatever law the
    candidates come from. (B, N), (B, N) -> (B,); nats. ValueError when shapes differ, nothing is given or a label is
    outside [0, 1].
    """
    check_one_shape("BN", log_odds_BN, label_BN)
    if not ((label_BN >= 0) & (label_BN <= 1)).all():
        raise ValueError("a label is a share, in [0, 1]")
    label_BN = label_BN.to(log_odds_BN.dtype)
    return functional.binary_cross_entropy_with_logits(log_odds_BN, label_BN, reduction="none").mean(dim=-1)


def log_quantile(log_odds_BN: Tensor, *, floor: float = -16.0) -> Tensor:
    """log p from the log-odds of p, at least `floor` nats: no head has seen what is rarer. (B, N) -> (B, N)."""
    if not -math.inf < floor < 0:
        raise ValueError(f"a floor of log-quantiles is finite and below 0, got {floor}")
    return functional.logsigmoid(log_odds_BN).clamp(min=floor)


def pooled_rank_score(reward_BN: Tensor, pool_M: Tensor) -> Tensor:
    """Log-odds of each reward's mid-rank among rewards of many prompts, half a reward added either side.

    log (s + T/2 + ½)/(M − s − T/2 + ½), s below and T tied: standard logistic over the pool whatever the reward's own
    scale, which is what `RewardLawHead` starts from. Rewards between the same two of the pool share a score.

    (B, N), (M,) -> (B, N); float64, in ±log(2M + 1).
    """
    if pool_M.ndim != 1 or len(pool_M) == 0:
        raise ValueError(f"a pool is one row of rewards, got {tuple(pool_M.shape)}")
    standing = standing_against(reward_BN, pool_M.expand(len(reward_BN), -1))
    mid_BN = (standing.below + standing.tied / 2).double()
    return ((mid_BN + 0.5) / (standing.num_reference - mid_BN + 0.5)).log()


# --- features of prompt and completion -------------------------------------------------------------------


class QuantileHead(nn.Module):
    """Features of prompt and completion to the log-odds of its quantile; BOND's learned quantile (B.1)."""

    def __init__(self, num_features: int, *, hidden: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(num_features, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, feature_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N); log-odds."""
        log_odds_BN: Tensor = self.body(feature_BND)[..., 0]
        return log_odds_BN


# --- features of the prompt ------------------------------------------------------------------------------


class LogisticMixture(NamedTuple):
    """A law of the reference's reward for each prompt: Σ_c w_c · logistic((r − m_c)/s_c)."""

    log_weight_BC: Tensor
    """log w, normalised."""
    location_BC: Tensor
    """m, in units of the reward."""
    scale_BC: Tensor
    """s > 0, in units of the reward."""

    def log_odds(self, reward_BN: Tensor) -> Tensor:
        """log p/(1 − p), p = P(r' ≤ r), exact in both tails; never falls as r rises. (B, N) -> (B, N)."""
        z_BNC = self._standardised(reward_BN)
        log_weight_B1C = self.log_weight_BC[:, None]
        below_BN = torch.logsumexp(log_weight_B1C + functional.logsigmoid(z_BNC), dim=-1)
        above_BN = torch.logsumexp(log_weight_B1C + functional.logsigmoid(-z_BNC), dim=-1)
        return below_BN - above_BN

    def log_density(self, reward_BN: Tensor) -> Tensor:
        """(B, N) -> (B, N); nats, by unit of the reward."""
        z_BNC = self._standardised(reward_BN)
        log_kernel_BNC = functional.logsigmoid(z_BNC) + functional.logsigmoid(-z_BNC) - self.scale_BC[:, None].log()
        return torch.logsumexp(self.log_weight_BC[:, None] + log_kernel_BNC, dim=-1)

    def _standardised(self, reward_BN: Tensor) -> Tensor:
        if reward_BN.ndim != 2 or reward_BN.numel() == 0 or len(reward_BN) != len(self.location_BC):
            raise ValueError(f"a row of rewards for each of {len(self.location_BC)} prompts, got {reward_BN.shape}")
        check_finite("rewards", reward_BN)
        reward_BN1 = reward_BN[..., None].to(self.location_BC.dtype)
        return (reward_BN1 - self.location_BC[:, None]) / self.scale_BC[:, None]


class RewardLawHead(nn.Module):
    """Features of a prompt to the law of the reference's reward; rewards of mean near 0 and spread near 1."""

    def __init__(self, num_features: int, *, num_components: int = 3, hidden: int = 64) -> None:
        super().__init__()
        last = nn.Linear(hidden, 3 * num_components)
        self.body = nn.Sequential(nn.Linear(num_features, hidden), nn.SiLU(), last)
        # Components apart from the start, or they would learn the same; together about a standard logistic law.
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.zero_()
            last.bias[num_components : 2 * num_components] = torch.linspace(-1, 1, num_components)

    def forward(self, feature_BD: Tensor) -> LogisticMixture:
        """(B, D) -> a law of C components for each prompt."""
        weight_BC, location_BC, scale_BC = self.body(feature_BD).chunk(3, dim=-1)
        return LogisticMixture(
            weight_BC.log_softmax(dim=-1), location_BC, SMALLEST_SCALE + functional.softplus(scale_BC)
        )


def negative_log_likelihood(law: LogisticMixture, reward_BN: Tensor) -> Tensor:
    """−log density of the reference's rewards, averaged over candidates; least for their law.

    One candidate of a prompt is enough, where `quantile_cross_entropy` needs another to compare it with. For rewards
    that tie take the cross-entropy with `mid_rank_label`: tied rewards have no density.

    (B, N) -> (B,); nats, negative where the law is narrow.
    """
    return -law.log_density(reward_BN).mean(dim=-1)

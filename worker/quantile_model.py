"""Quantiles where prompts hardly ever repeat: learned from other prompts, as a law of rewards given the prompt or by
BOND's head on prompt and completion.

Owns the fit: folds of prompts, features and scores on a common scale, when to stop. Each candidate teaches by its rank
among its prompt's others, which ties do not spoil. Does not own the law and the head
(`bon_algos.learned_quantile`) nor what quantiles are for. Deterministic given its seed, so that an attempt that takes
up another's state finds the same targets.

Dimension key:  B prompts · D features · T candidates of all prompts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bon_algos.contracts import LearnedQuantiles
from bon_algos.importance import levels_of_shares
from bon_algos.learned_quantile import (
    LogisticMixture,
    QuantileHead,
    RewardLawHead,
    log_quantile,
    mid_rank_label,
    pooled_rank_score,
    quantile_cross_entropy,
)
from bon_algos.quantiles import standing_among_others
from bon_algos.serving_order import serving_ranks_of
from worker.dataset import PromptPool
from worker.errors import JobFailed

FOLDS = 4
"""Of prompts: each one's law is learned from the other folds', since a head fits its own candidates better than new
ones."""
MIN_PROMPTS = 2 * FOLDS
WATCHED_EVERY = 5
"""One prompt of so many is not learned from, and says when to stop."""
FIT_STEPS = 300


Features = Callable[[Sequence[Sequence[int]]], Tensor]
"""What the reference makes of so many sequences of tokens; (number of them, D)."""


class OfPrompt(nn.Module):
    """The law of a prompt's rewards, asked about a reward."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.law = RewardLawHead(num_features)

    def forward(self, feature_TD: Tensor, score_T: Tensor) -> Tensor:
        law: LogisticMixture = self.law(feature_TD)
        return law.log_odds(score_T[:, None])[:, 0]


class OfCompletion(nn.Module):
    """BOND's head on prompt and completion (arXiv:2407.14622, B.1), which is told the reward, too."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.head = QuantileHead(num_features + 1)

    def forward(self, feature_TD: Tensor, score_T: Tensor) -> Tensor:
        log_odds_T1: Tensor = self.head(torch.cat((feature_TD, score_T[:, None]), dim=-1)[:, None])
        return log_odds_T1[:, 0]


def with_learned_quantiles(
    pools: Sequence[PromptPool], features: Features, kind: LearnedQuantiles, *, n: int, seed: int
) -> tuple[PromptPool, ...]:
    """The pools with learned quantiles for targets of best-of-n. Raises as `learned_log_quantiles`.

    What is learned tells the middle of a reward level and not its breadth, which counts for n ≥ 3: there a pool whose
    rewards tie keeps the levels that it has, or those that are counted among its own candidates.
    """
    # One model is learned of all prompts: their candidates are ranked together.
    rewards = [ranks.tolist() for ranks in serving_ranks_of(*(pool.candidates for pool in pools))]
    if kind == "learned_law":
        learned = learned_log_quantiles(features([pool.prompt_ids for pool in pools]), rewards, seed)
    else:
        whole = [(*pool.prompt_ids, *one.token_ids) for pool in pools for one in pool.candidates]
        learned = judged_log_quantiles(features(whole), rewards, seed)
    return tuple(
        _with_counted_levels(pool, own)
        if n > 2 and len(set(own)) < len(own)
        else pool.model_copy(update={"log_quantiles": tuple(law), "levels": None})
        for pool, own, law in zip(pools, rewards, learned, strict=True)
    )


def _with_counted_levels(pool: PromptPool, rewards: Sequence[float]) -> PromptPool:
    if pool.levels is not None:
        return pool
    level_M2 = levels_of_shares(rewards, [1 / len(rewards)] * len(rewards))
    return pool.model_copy(update={"levels": tuple(map(tuple, level_M2.tolist()))})


def learned_log_quantiles(feature_BD: Tensor, rewards: Sequence[Sequence[float]], seed: int) -> list[list[float]]:
    """log of the quantile of each candidate's reward in its prompt's law of rewards; nats, at most 0.

    feature_BD  of the prompts, any scale
    rewards     of each prompt's candidates; only their order counts

    Raises JobFailed with fewer than MIN_PROMPTS; ValueError for a prompt with a single candidate.
    """
    counts = torch.tensor([len(own) for own in rewards])
    return _across_folds(OfPrompt, _standardised(feature_BD).repeat_interleave(counts, dim=0), rewards, seed)


def judged_log_quantiles(feature_TD: Tensor, rewards: Sequence[Sequence[float]], seed: int) -> list[list[float]]:
    """As `learned_log_quantiles`, by a head on features of each candidate together with its prompt, in their order."""
    return _across_folds(OfCompletion, _standardised(feature_TD), rewards, seed)


def _standardised(feature_RD: Tensor) -> Tensor:
    """Each feature with mean 0 and spread 1; float64."""
    feature_RD = feature_RD.double()
    return (feature_RD - feature_RD.mean(dim=0)) / feature_RD.std(dim=0).clamp(min=1e-6)


def _across_folds(
    kind: Callable[[int], nn.Module], feature_TD: Tensor, rewards: Sequence[Sequence[float]], seed: int
) -> list[list[float]]:
    """Every fold's log-quantiles by what the other folds have taught."""
    if len(rewards) < MIN_PROMPTS:
        message = f"quantiles are learned from at least {MIN_PROMPTS} prompts, and the window has {len(rewards)}"
        raise JobFailed("too_few_prompts", message)
    counts = [len(own) for own in rewards]
    prompt_T = torch.repeat_interleave(torch.tensor(counts))
    reward_1T = torch.tensor([reward for own in rewards for reward in own], dtype=torch.float64)[None]
    score_T = pooled_rank_score(reward_1T, reward_1T[0])[0]
    label_T = torch.cat(
        [mid_rank_label(standing_among_others(one[None]))[0] for one in torch.split(reward_1T[0], counts)]
    )
    fold_B = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed)) % FOLDS
    log_quantile_T = torch.empty_like(score_T)
    for fold in range(FOLDS):
        is_own_T = (fold_B == fold)[prompt_T]
        torch.manual_seed(seed)
        head = kind(feature_TD.shape[1]).double()
        _fit(head, *(one[~is_own_T] for one in (feature_TD, prompt_T, score_T, label_T)))
        with torch.no_grad():
            log_odds_T = head(feature_TD[is_own_T], score_T[is_own_T])
        log_quantile_T[is_own_T] = log_quantile(log_odds_T[:, None])[:, 0]
    return [own.tolist() for own in torch.split(log_quantile_T, counts)]


def _fit(head: nn.Module, feature_TD: Tensor, prompt_T: Tensor, score_T: Tensor, label_T: Tensor) -> None:
    """Leaves the head as it was when it told best of prompts that it does not learn from."""
    descent = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.3)
    is_watched_T = prompt_T % WATCHED_EVERY == 0
    best, least = head.state_dict(), math.inf
    for _ in range(FIT_STEPS):
        loss_T = quantile_cross_entropy(head(feature_TD, score_T)[:, None], label_T[:, None])
        watched = float(loss_T[is_watched_T].detach().mean())
        if watched < least:
            best, least = {name: tensor.clone() for name, tensor in head.state_dict().items()}, watched
        descent.zero_grad()
        torch.autograd.backward(loss_T[~is_watched_T].mean())
        descent.step()
    head.load_state_dict(best)

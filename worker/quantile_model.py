"""Quantiles where prompts hardly ever repeat: a law of rewards given the prompt, learned from other prompts.

Owns the fit: folds of prompts, features and scores on a common scale, when to stop. Each candidate teaches by its rank
among its prompt's others, which ties do not spoil. Does not own the law
(`bon_algos.learned_quantile`) nor what quantiles are for. Deterministic given its seed, so that an attempt that takes
up another's state finds the same targets.

Dimension key:  B prompts · D features · T candidates of all prompts
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bon_algos.importance import levels_of_shares
from bon_algos.learned_quantile import (
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


def with_learned_quantiles(
    pools: Sequence[PromptPool], feature_BD: Tensor, *, n: int, seed: int
) -> tuple[PromptPool, ...]:
    """The pools with learned quantiles for targets of best-of-n. Raises as `learned_log_quantiles`.

    A learned law tells the middle of a reward level and not its breadth, which counts for n ≥ 3: there a pool whose
    rewards tie keeps the levels that it has, or those that are counted among its own candidates.
    """
    # One law is learned of all prompts: their candidates are ranked together.
    rewards = [ranks.tolist() for ranks in serving_ranks_of(*(pool.candidates for pool in pools))]
    learned = learned_log_quantiles(feature_BD, rewards, seed)
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
    if len(feature_BD) < MIN_PROMPTS:
        message = f"quantiles are learned from at least {MIN_PROMPTS} prompts, and the window has {len(feature_BD)}"
        raise JobFailed("too_few_prompts", message)
    feature_BD = feature_BD.double()
    feature_BD = (feature_BD - feature_BD.mean(dim=0)) / feature_BD.std(dim=0).clamp(min=1e-6)
    counts = [len(own) for own in rewards]
    prompt_T = torch.repeat_interleave(torch.tensor(counts))
    reward_1T = torch.tensor([reward for own in rewards for reward in own], dtype=torch.float64)[None]
    score_T = pooled_rank_score(reward_1T, reward_1T[0])[0]
    label_T = torch.cat(
        [mid_rank_label(standing_among_others(one[None]))[0] for one in torch.split(reward_1T[0], counts)]
    )
    fold_B = torch.randperm(len(feature_BD), generator=torch.Generator().manual_seed(seed)) % FOLDS
    log_quantile_T = torch.empty_like(score_T)
    for fold in range(FOLDS):
        is_own_T = (fold_B == fold)[prompt_T]
        head = _fitted(feature_BD, prompt_T[~is_own_T], score_T[~is_own_T], label_T[~is_own_T], seed)
        with torch.no_grad():
            log_odds_T1 = head(feature_BD[prompt_T[is_own_T]]).log_odds(score_T[is_own_T][:, None])
        log_quantile_T[is_own_T] = log_quantile(log_odds_T1)[:, 0]
    return [own.tolist() for own in torch.split(log_quantile_T, counts)]


def _fitted(feature_BD: Tensor, prompt_T: Tensor, score_T: Tensor, label_T: Tensor, seed: int) -> RewardLawHead:
    """The head as it was when it told best of prompts that it does not learn from."""
    torch.manual_seed(seed)
    head = RewardLawHead(feature_BD.shape[1]).double()
    descent = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.3)
    is_watched_T = prompt_T % WATCHED_EVERY == 0
    best, least = head.state_dict(), math.inf
    for _ in range(FIT_STEPS):
        log_odds_T1 = head(feature_BD[prompt_T]).log_odds(score_T[:, None])
        loss_T = quantile_cross_entropy(log_odds_T1, label_T[:, None])
        watched = float(loss_T[is_watched_T].detach().mean())
        if watched < least:
            best, least = {name: tensor.clone() for name, tensor in head.state_dict().items()}, watched
        descent.zero_grad()
        torch.autograd.backward(loss_T[~is_watched_T].mean())
        descent.step()
    head.load_state_dict(best)
    return head

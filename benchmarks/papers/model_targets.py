"""Targets of a regression that are not counted among the candidates learned from: counted among more, or learned.

Owns the law of rewards learned from other prompts, and a step that regresses on given targets. Does not own the
estimators (`bon_algos.quantiles`, `bon_algos.learned_quantile`) nor the loss (`bon_algos.regression`).

Dimension key:  B prompts · N candidates per prompt · D features
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.papers.model_lab import Array
from bon_algos import learned_quantile
from bon_algos.contracts import BonRegressionSpec
from bon_algos.logged_steps import regress
from bon_algos.logprobs import TokenGroup
from bon_algos.order import systematic_sample
from bon_algos.steps import ChosenGroup, LoggedGroup, LoggedStep

FOLDS: Final = 4
"""Of prompts: each one's law of rewards is learned from the other folds'."""
FIT_STEPS: Final = 300


def targeted_step(spec: BonRegressionSpec, prompt_ids: list[list[int]], log_tilt_BN: Tensor) -> LoggedStep:
    """The method's step, with these targets for each prompt's first N candidates."""
    target_of = {tuple(ids): row.numpy() for ids, row in zip(prompt_ids, log_tilt_BN, strict=True)}
    choose = partial(_choose_targeted, target_of=target_of, count=spec.candidates_per_prompt)
    return LoggedStep(choose, partial(regress, huber_delta=spec.huber_delta))


def _choose_targeted(
    group: LoggedGroup, uniform: float, *, target_of: Mapping[tuple[int, ...], Array], count: int
) -> ChosenGroup:
    num_candidates = len(group.rewards)
    drawn = np.flatnonzero(systematic_sample(np.full(num_candidates, 1 / num_candidates), count, uniform))
    return ChosenGroup(
        TokenGroup(group.tokens.prompt_ids, [group.tokens.completion_ids[j] for j in drawn]),
        target_of[tuple(group.tokens.prompt_ids)][drawn].tolist(),
        [group.reference_logprobs[j] for j in drawn],
    )


def learned_log_tilts(feature_BD: Tensor, reward_BN: Tensor, n: int, seed: int) -> Tensor:
    """log n + (n − 1)·log p̂, p̂ by a law of rewards that has seen neither the prompt nor its rewards. (B, N)"""
    score_BN = learned_quantile.pooled_rank_score(reward_BN, reward_BN.flatten())
    fold_B = torch.randperm(len(score_BN), generator=torch.Generator().manual_seed(seed)) % FOLDS
    log_quantile_BN = torch.empty_like(score_BN)
    for fold in range(FOLDS):
        is_own_B = fold_B == fold
        head = _fitted(feature_BD[~is_own_B], score_BN[~is_own_B], seed)
        with torch.no_grad():
            log_odds_bN = head(feature_BD[is_own_B]).log_odds(score_BN[is_own_B])
        log_quantile_BN[is_own_B] = learned_quantile.log_quantile(log_odds_bN)
    return math.log(n) + (n - 1) * log_quantile_BN


def _fitted(feature_BD: Tensor, score_BN: Tensor, seed: int) -> learned_quantile.RewardLawHead:
    """The head as it was when every fifth prompt, which it does not learn from, was most likely."""
    torch.manual_seed(seed)
    head = learned_quantile.RewardLawHead(feature_BD.shape[1]).double()
    descent = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.3)
    is_watched_B = torch.arange(len(score_BN)) % 5 == 0
    best, least = head.state_dict(), math.inf
    for _ in range(FIT_STEPS):
        loss_B = learned_quantile.negative_log_likelihood(head(feature_BD), score_BN)
        watched = float(loss_B[is_watched_B].detach().mean())
        if watched < least:
            best, least = {name: tensor.clone() for name, tensor in head.state_dict().items()}, watched
        descent.zero_grad()
        torch.autograd.backward(loss_B[~is_watched_B].mean())
        descent.step()
    head.load_state_dict(best)
    return head

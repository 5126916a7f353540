"""Steps on logged candidates: which of a prompt's candidates one step looks at, and the loss of them.

Owns the choice and its weights, and how groups of different sizes become one loss. Does not own the losses themselves,
nor which method takes which step (`algorithms`).

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bon_algos.bonbon import consistent_pair_loss
from bon_algos.contracts import CountedQuantiles, OfflineBondSpec
from bon_algos.imitation import best_of_n_imitation
from bon_algos.importance import best_of_n_weights_of_shares
from bon_algos.logprobs import TokenGroup
from bon_algos.offline_bond import offline_bond_loss
from bon_algos.order import best_of_n_weights, log_tilt_of_level, systematic_sample
from bon_algos.preference import best_and_worst
from bon_algos.prefix_values import negative_log_likelihood, normal_scores
from bon_algos.quantiles import log_tilt_by, standing_among_others
from bon_algos.regression import log_quantile_regression
from bon_algos.steps import (
    ChosenGroup,
    GuidedGroup,
    GuidedTermsOf,
    LoggedGroup,
    SaidLawsOf,
    ScoredGroup,
    SequenceLogprobs,
    StepLoss,
    TokenTermsOf,
    WeighedGroup,
)
from bon_algos.token_bond import token_bond_loss


def one_row(rewards: Sequence[float]) -> Tensor:
    """(1, N), as float64: ranks are exact."""
    return torch.tensor(rewards, dtype=torch.float64)[None]


def choose_imitated(group: LoggedGroup, uniform: float, *, n: int, count: int) -> ChosenGroup:
    """Candidates drawn by their best-of-n weights; one that is drawn twice costs one forward pass."""
    times_N = systematic_sample(_best_of_n_weights(group, n), count, uniform)
    drawn = np.flatnonzero(times_N)
    return _narrowed(group, drawn, times_N[drawn] / count)


def _best_of_n_weights(group: LoggedGroup, n: int) -> NDArray[np.float64]:
    if group.shares is None:
        return best_of_n_weights(group.rewards, n)
    return best_of_n_weights_of_shares(group.rewards, group.shares, n)


def choose_best(group: LoggedGroup, uniform: float, *, n: int, count: int) -> ChosenGroup:
    """As `choose_imitated`, by the best of all candidates where there are fewer than n."""
    return choose_imitated(group, uniform, n=min(n, len(group.rewards)), count=count)


def choose_regressed(
    group: LoggedGroup, uniform: float, *, n: int, count: int, quantiles: CountedQuantiles
) -> ChosenGroup:
    """Candidates evenly spread over drawing order, each with its target: from a quantile or a level that is given, or
    counted among the rewards of all the others. ValueError for fewer than n candidates where it is counted."""
    num_candidates = len(group.rewards)
    _check_targets(group, n)
    drawn = np.flatnonzero(
        systematic_sample(np.full(num_candidates, 1 / num_candidates), min(count, num_candidates), uniform)
    )
    return _narrowed(group, drawn, _log_tilts(group, n, quantiles)[drawn])


def _check_targets(group: LoggedGroup, n: int) -> None:
    if group.log_quantiles is None and group.levels is None:
        _check_draws(group, n)


def _check_draws(group: LoggedGroup, n: int) -> None:
    if len(group.rewards) < n:
        raise ValueError(f"best-of-{n} from a group of {len(group.rewards)} candidates")


def _log_tilts(group: LoggedGroup, n: int, counted: CountedQuantiles = "harmonic_mid") -> NDArray[np.float64]:
    """log π_BoN/π_ref of every candidate, counted where nothing is given; nats."""
    if group.levels is not None:
        lower_M, upper_M = np.asarray(group.levels).T
        return log_tilt_of_level(lower_M, upper_M, n)
    if group.log_quantiles is not None:
        return math.log(n) + (n - 1) * np.asarray(group.log_quantiles)
    tilts: NDArray[np.float64] = log_tilt_by(counted, standing_among_others(one_row(group.rewards)), n)[0].numpy()
    return tilts


def choose_weighed(group: LoggedGroup, uniform: float, *, n: int, backward_n: int, count: int) -> WeighedGroup:
    """Half of the candidates by their best-of-n weights, where the policy goes, and half by their shares of the
    reference's law. Each stands for that law by how often it was drawn against how often that is to be expected: a sum
    by these weights is unbiased for that over all. `offline_bond_loss` is not quite: its baseline is theirs too."""
    num_candidates, by_weight = len(group.rewards), count // 2
    weight_N = _best_of_n_weights(group, n)
    share_N = np.full(num_candidates, 1 / num_candidates) if group.shares is None else np.asarray(group.shares)
    best_N = systematic_sample(weight_N, by_weight, uniform)
    times_N = best_N + systematic_sample(share_N, count - by_weight, uniform)
    expected_N = by_weight * weight_N + (count - by_weight) * share_N
    log_tilt_N = _log_tilts(group, backward_n)
    drawn = np.flatnonzero(times_N)
    return WeighedGroup(
        _of_places(group, drawn),
        (best_N[drawn] / by_weight).tolist(),
        log_tilt_N[drawn].tolist(),
        (times_N[drawn] / expected_N[drawn] * share_N[drawn]).tolist(),
    )


def _narrowed(group: LoggedGroup, index: NDArray[np.intp], verdicts: NDArray[np.float64]) -> ChosenGroup:
    return ChosenGroup(
        _of_places(group, index),
        verdicts.tolist(),
        [group.reference_logprobs[j] for j in index],
    )


def imitate(groups: Sequence[ChosenGroup], policy: SequenceLogprobs) -> StepLoss:
    losses, log_ratios = [], []
    for group, logprob_N in zip(groups, policy([group.tokens for group in groups]), strict=True):
        weight_1N = logprob_N.new_tensor(group.verdicts)[None]
        reference_1N = logprob_N.new_tensor(group.reference_logprobs)[None]
        losses.append(best_of_n_imitation(logprob_N[None], weight_1N))
        log_ratios.append(-losses[-1].detach() - (weight_1N * reference_1N).sum(dim=-1))
    loss = torch.cat(losses).mean()
    return StepLoss(loss, {"imitation": loss.detach(), "log_ratio_best_of_n": torch.cat(log_ratios).mean()})


def regress(groups: Sequence[ChosenGroup], policy: SequenceLogprobs, *, huber_delta: float | None) -> StepLoss:
    losses, log_ratios, residuals = [], [], []
    for group, logprob_N in zip(groups, policy([group.tokens for group in groups]), strict=True):
        log_tilt_1N = logprob_N.new_tensor(group.verdicts)[None]
        reference_1N = logprob_N.new_tensor(group.reference_logprobs)[None]
        losses.append(log_quantile_regression(logprob_N[None], reference_1N, log_tilt_1N, huber_delta=huber_delta))
        log_ratios.append(logprob_N.detach()[None] - reference_1N)
        residuals.append(log_ratios[-1] - log_tilt_1N)
    loss = torch.cat(losses).mean()
    metrics = {
        "regression": loss.detach(),
        "log_ratio": torch.cat(log_ratios, dim=-1).mean(),
        "residual_rms": torch.cat(residuals, dim=-1).square().mean().sqrt(),
    }
    return StepLoss(loss, metrics)


def learn_offline(groups: Sequence[WeighedGroup], policy: TokenTermsOf, *, spec: OfflineBondSpec) -> StepLoss:
    outcomes = [
        offline_bond_loss(
            terms,
            torch.tensor(group.imitation_weights),
            torch.tensor(group.log_tilts),
            torch.tensor(group.shares),
            jeffreys_weight=spec.jeffreys_weight,
            token_kl_weight=spec.token_kl_weight,
            max_importance=spec.max_importance,
            return_floor=spec.return_floor,
        )
        for group, terms in zip(groups, policy([group.tokens for group in groups]), strict=True)
    ]
    names = outcomes[0].metrics._fields
    metrics = {name: torch.stack([getattr(one.metrics, name) for one in outcomes]).mean() for name in names}
    return StepLoss(torch.stack([one.loss for one in outcomes]).mean(), metrics)


# --- token by token --------------------------------------------------------------------------------------


def choose_scored(group: LoggedGroup, uniform: float, *, count: int) -> ScoredGroup:
    """Candidates evenly spread over drawing order: a critic learns the reference's law, so from its own draws.
    ValueError for a group of one."""
    num_candidates = len(group.rewards)
    scores = normal_scores(one_row(group.rewards))
    times_M = systematic_sample(np.full(num_candidates, 1 / num_candidates), min(count, num_candidates), uniform)
    drawn = np.flatnonzero(times_M)
    return ScoredGroup(_of_places(group, drawn), *(of_1M[0, torch.from_numpy(drawn)].tolist() for of_1M in scores))


def choose_guided(group: LoggedGroup, uniform: float, *, n: int, count: int) -> GuidedGroup:
    """Half of the draws by best-of-n's weights, of all candidates where there are fewer than n, and half even ones."""
    num_candidates, by_weight = len(group.rewards), count // 2
    best_M = systematic_sample(best_of_n_weights(group.rewards, min(n, num_candidates)), by_weight, uniform)
    even_M = systematic_sample(np.full(num_candidates, 1 / num_candidates), count - by_weight, uniform)
    drawn = np.flatnonzero(best_M + even_M)
    return GuidedGroup(_of_places(group, drawn), (best_M[drawn] / count).tolist(), (even_M[drawn] / count).tolist())


def _of_places(group: LoggedGroup, index: NDArray[np.intp]) -> TokenGroup:
    return TokenGroup(group.tokens.prompt_ids, [group.tokens.completion_ids[j] for j in index])


def learn_values(groups: Sequence[ScoredGroup], laws: SaidLawsOf) -> StepLoss:
    """The critic's: how likely it held the scores that the candidates ended with, at each of their tokens."""
    losses, errors = [], []
    for group, law in zip(groups, laws([group.tokens for group in groups]), strict=True):
        lengths = torch.tensor([len(completion) for completion in group.tokens.completion_ids])
        score_T, level_variance_T, error_variance_T = (
            torch.tensor(of_N).repeat_interleave(lengths).to(law.mean)
            for of_N in (group.scores, group.level_variances, group.error_variances)
        )
        losses.append(negative_log_likelihood(law, score_T, level_variance_T, error_variance_T).mean())
        last_N = lengths.cumsum(dim=0).to(score_T.device) - 1
        errors.append((law.mean.detach() - score_T)[last_N].square().mean())
    loss = torch.stack(losses).mean()
    return StepLoss(loss, {"critic": loss.detach(), "critic_error": torch.stack(errors).mean().sqrt()})


def learn_guided(
    groups: Sequence[GuidedGroup], policy: GuidedTermsOf, *, jeffreys_weight: float, value_weight: float
) -> StepLoss:
    outcomes = [
        token_bond_loss(
            terms,
            torch.tensor(group.best_shares),
            torch.tensor(group.even_shares),
            jeffreys_weight=jeffreys_weight,
            value_weight=value_weight,
        )
        for group, terms in zip(groups, policy([group.tokens for group in groups]), strict=True)
    ]
    names = outcomes[0].metrics._fields
    metrics = {name: torch.stack([getattr(one.metrics, name) for one in outcomes]).mean() for name in names}
    return StepLoss(torch.stack([one.loss for one in outcomes]).mean(), metrics)


# --- pairs -----------------------------------------------------------------------------------------------

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""log π of better and worse completions, then log π_ref, (B,) each -> (B,)."""


def choose_winner(group: LoggedGroup, uniform: float, *, n: int) -> ChosenGroup:
    """The best of n candidates drawn from the group."""
    _check_draws(group, n)
    drawn = _drawn(group, uniform, n)
    best = drawn[np.argmax(np.asarray(group.rewards)[drawn])]
    return _narrowed(group, np.array([best]), np.ones(1))


def choose_pair(group: LoggedGroup, uniform: float, *, n: int) -> ChosenGroup:
    """The best and the worst of n candidates drawn from the group; twice the same one where they all tie."""
    _check_draws(group, n)
    drawn = _drawn(group, uniform, n)
    best_1, worst_1 = best_and_worst(one_row(np.asarray(group.rewards)[drawn].tolist()))
    return _narrowed(group, drawn[[int(best_1), int(worst_1)]], np.array([1.0, 0.0]))


def _drawn(group: LoggedGroup, uniform: float, count: int) -> NDArray[np.intp]:
    """Places of so many candidates, each set of them as likely as any other, in drawing order."""
    return np.array(sorted(random.Random(uniform).sample(range(len(group.rewards)), count)))


def compare(groups: Sequence[ChosenGroup], policy: SequenceLogprobs, *, pair_loss: PairLoss) -> StepLoss:
    """A loss on pairs, from `choose_pair`."""
    logprob_B2 = torch.stack(list(policy([group.tokens for group in groups])))
    reference_B2 = logprob_B2.new_tensor([group.reference_logprobs for group in groups])
    better_B, worse_B = logprob_B2.unbind(dim=-1)
    better_reference_B, worse_reference_B = reference_B2.unbind(dim=-1)
    loss = pair_loss(better_B, worse_B, better_reference_B, worse_reference_B).mean()
    log_ratio_B2 = (logprob_B2 - reference_B2).detach()
    metrics = {
        "pair_loss": loss.detach(),
        "margin": (log_ratio_B2[:, 0] - log_ratio_B2[:, 1]).mean(),
        "log_ratio_better": log_ratio_B2[:, 0].mean(),
    }
    return StepLoss(loss, metrics)


def choose_compared(group: LoggedGroup, uniform: float, *, n: int, count: int) -> ChosenGroup:
    """Candidates drawn so that every pair meets as often as any other, with targets and refusals as `choose_regressed`.
    (Evenly spread ones would leave most pairs unmet, and what never meets is never compared.) Each one's target knows
    of its partner's rank, which makes targets too steep by M/(M − 1), of M candidates (`bonbon.consistent_pair_loss`).
    """
    _check_targets(group, n)
    num_candidates = len(group.rewards)
    drawn = _drawn(group, uniform, min(count, num_candidates))
    return _narrowed(group, drawn, (1 - 1 / num_candidates) * _log_tilts(group, n)[drawn])


def compare_all(groups: Sequence[ChosenGroup], policy: SequenceLogprobs) -> StepLoss:
    """All pairs of a prompt's chosen candidates, from `choose_compared`."""
    losses = [
        consistent_pair_loss(
            logprob_N[None],
            logprob_N.new_tensor(group.reference_logprobs)[None],
            logprob_N.new_tensor(group.verdicts)[None],
        )
        for group, logprob_N in zip(groups, policy([group.tokens for group in groups]), strict=True)
    ]
    loss = torch.cat(losses).mean()
    return StepLoss(loss, {"pair_loss": loss.detach()})

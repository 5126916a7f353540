"""Steps on fresh samples: of the policy in training, of its anchor, or ranked among the reference's logged candidates.

Owns which log-probs a loss needs and how groups become one batch. Does not own the losses themselves, nor which method
takes which step (`algorithms`), nor sampling.

Dimension key:  B prompts · N samples per prompt
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bon_algos.bond import best_of_two, bond_loss, compressed_below, j_bond_loss, quantile_reward_tie_aware
from bon_algos.contracts import CountedQuantiles
from bon_algos.imitation import best_of_n_imitation
from bon_algos.logged_steps import one_row
from bon_algos.logprobs import TokenGroup
from bon_algos.order import best_of_n_weights
from bon_algos.policy_gradient import kl_regularised_return, leave_one_out, ppo_clip_loss, reinforce_loss
from bon_algos.quantiles import (
    Standing,
    log_quantile_add_one,
    log_quantile_by,
    log_tilt_by,
    log_tilt_tie_aware,
    standing_against,
)
from bon_algos.steps import ChosenGroup, FreshGroup, RankedGroup, SequenceLogprobs, StepLoss
from bon_algos.vbon import log_tilt_exact, log_tilt_lower_bound, variational_return


def learn_ranked(
    groups: Sequence[RankedGroup],
    chosen: Sequence[ChosenGroup],
    policy: SequenceLogprobs,
    reference: SequenceLogprobs,
    *,
    n: int,
    jeffreys_weight: float,
    return_floor: float,
    quantiles: CountedQuantiles,
) -> StepLoss:
    fresh = [TokenGroup(group.logged.tokens.prompt_ids, group.completion_ids) for group in groups]
    both = [
        TokenGroup(own.prompt_ids, [*imitated.tokens.completion_ids, *own.completion_ids])
        for own, imitated in zip(fresh, chosen, strict=True)
    ]
    imitation, logprob, log_tilt = [], [], []
    for group, imitated, logprob_N in zip(groups, chosen, policy(both), strict=True):
        weight_1N = logprob_N.new_tensor(imitated.verdicts)[None]
        imitated_1N, own_N = logprob_N[None, : weight_1N.shape[1]], logprob_N[weight_1N.shape[1] :]
        # Every sample stands beside its prompt's imitation: the mean over samples is the mean over prompts.
        imitation.append(best_of_n_imitation(imitated_1N, weight_1N).expand(len(own_N)))
        logprob.append(own_N)
        log_tilt.append(log_tilt_by(quantiles, _standing(group), n)[0])
    with torch.no_grad():
        reference_logprob = torch.cat(list(reference(fresh)))
    log_ratio = torch.cat(logprob).detach() - reference_logprob
    loss, metrics = bond_loss(
        torch.cat(imitation),
        torch.cat(logprob),
        reference_logprob,
        compressed_below(torch.cat(log_tilt).to(log_ratio) - log_ratio, return_floor) + log_ratio,
        jeffreys_weight=jeffreys_weight,
        sampled_logprob_B=reference_logprob.new_tensor([one for group in groups for one in group.sampled_logprobs]),
    )
    return StepLoss(loss, metrics._asdict())


def learn_j_bond(
    groups: Sequence[FreshGroup],
    policy: SequenceLogprobs,
    anchor: SequenceLogprobs,
    *,
    jeffreys_weight: float,
    kl_strength: float,
) -> StepLoss:
    anchor_reward_B2 = torch.tensor([list(group.anchor_rewards) for group in groups], dtype=torch.float64)
    reward_B = torch.tensor([group.reward for group in groups], dtype=torch.float64)
    winners = [
        group.anchor_completion_ids[winner]
        for group, winner in zip(groups, best_of_two(anchor_reward_B2).tolist(), strict=True)
    ]
    pairs = [
        TokenGroup(group.prompt_ids, [group.completion_ids, winner])
        for group, winner in zip(groups, winners, strict=True)
    ]
    logprob_B, winner_logprob_B = torch.stack(list(policy(pairs))).unbind(dim=-1)
    loss, metrics = j_bond_loss(
        winner_logprob_B,
        logprob_B,
        _own_logprob(groups, anchor),
        quantile_reward_tie_aware(reward_B, anchor_reward_B2).to(logprob_B),
        jeffreys_weight=jeffreys_weight,
        kl_strength=kl_strength,
    )
    return StepLoss(loss, metrics._asdict())


def learn_iterative(
    groups: Sequence[FreshGroup],
    policy: SequenceLogprobs,
    anchor: SequenceLogprobs,
    *,
    n: int,
    jeffreys_weight: float,
    kl_strength: float,
) -> StepLoss:
    """BOND against fresh samples of the anchor: all are imitated by best-of-n's weights, and rank the policy's own."""
    both = [TokenGroup(group.prompt_ids, [group.completion_ids, *group.anchor_completion_ids]) for group in groups]
    logprob_B, imitation_B, log_tilt_B = [], [], []
    for group, logprob_N in zip(groups, policy(both), strict=True):
        weight_1N = logprob_N.new_tensor(best_of_n_weights(group.anchor_rewards, n))[None]
        logprob_B.append(logprob_N[:1])
        imitation_B.append(best_of_n_imitation(logprob_N[None, 1:], weight_1N))
        standing = standing_against(one_row([group.reward]), one_row(group.anchor_rewards))
        log_tilt_B.append(log_tilt_tie_aware(standing, n)[0])
    anchor_logprob_B = _own_logprob(groups, anchor)
    loss, metrics = bond_loss(
        torch.cat(imitation_B),
        torch.cat(logprob_B),
        anchor_logprob_B,
        torch.cat(log_tilt_B).to(anchor_logprob_B),
        jeffreys_weight=jeffreys_weight,
        kl_strength=kl_strength,
    )
    return StepLoss(loss, metrics._asdict())


def _own_logprob(groups: Sequence[FreshGroup], anchor: SequenceLogprobs) -> Tensor:
    """log π_anchor of the policy's own sample of each prompt, without a gradient. (B,); nats."""
    with torch.no_grad():
        return torch.cat(list(anchor([TokenGroup(group.prompt_ids, [group.completion_ids]) for group in groups])))


LogTilt = Callable[[Standing, Tensor, int], Tensor]
"""log π_BoN/π_ref of samples, from where their rewards stand, their log-probs under the reference, and n. (B, N)."""


def learn_vbon(
    groups: Sequence[RankedGroup],
    policy: SequenceLogprobs,
    reference: SequenceLogprobs,
    *,
    n: int,
    log_tilt: LogTilt,
    clip_range: float | None,
) -> StepLoss:
    """vBoN: what a sample earned when it was drawn, less its prompt's others, by PPO's clipped ratio; by plain
    REINFORCE where there is no clip range."""
    logprob_BN, reference_BN, sampled_BN = _of_samples(groups, policy, reference)
    rows = zip(groups, torch.split(reference_BN.double(), 1), strict=True)
    log_tilt_BN = torch.cat([log_tilt(_standing(group), row_1N, n) for group, row_1N in rows])
    return_BN = variational_return(log_tilt_BN, sampled_BN.double(), reference_BN.double())
    earned = _earned(return_BN, logprob_BN, reference_BN, log_tilt=log_tilt_BN)
    if clip_range is None:
        return StepLoss(reinforce_loss(logprob_BN, leave_one_out(return_BN)).mean(), earned)
    loss, metrics = ppo_clip_loss(logprob_BN, sampled_BN, leave_one_out(return_BN), clip_range=clip_range)
    return StepLoss(loss, metrics._asdict() | earned)


def _standing(group: RankedGroup) -> Standing:
    return standing_against(one_row(group.rewards), one_row(group.logged.rewards))


def tilt_of_lower_bound(
    standing: Standing, reference_logprob_BN: Tensor, n: int, *, quantiles: CountedQuantiles
) -> Tensor:
    """log n·F^{n−1} by an estimate that is never −∞. (B, N); nats, where the log-probs are."""
    return log_tilt_lower_bound(log_quantile_by(quantiles, standing), n).to(reference_logprob_BN)


def tilt_of_exact_likelihood(standing: Standing, reference_logprob_BN: Tensor, n: int) -> Tensor:
    """log π_BoN/π_ref of a total order at the add-one share, as released. (B, N); nats, where the log-probs are.

    ValueError for a log-prob that is not finite. What rounding leaves above 0 counts as 0.
    """
    log_quantile_BN = log_quantile_add_one(standing).to(reference_logprob_BN)
    return log_tilt_exact(log_quantile_BN, reference_logprob_BN.clamp(max=0.0), n)


def learn_rloo(
    groups: Sequence[RankedGroup], policy: SequenceLogprobs, reference: SequenceLogprobs, *, kl_strength: float
) -> StepLoss:
    """Reward on its own scale, less β·KL to the reference, less its prompt's others. The one method that measures
    rewards: what was cut off earns its own, as in a policy-gradient method that has no serving in mind."""
    reward_BN = torch.cat([_as_scored(group.raw_rewards) for group in groups])
    logprob_BN, reference_BN, sampled_BN = _of_samples(groups, policy, reference)
    own_BN, of_reference_BN = sampled_BN.double(), reference_BN.double()
    return_BN = kl_regularised_return(reward_BN.to(own_BN), own_BN, of_reference_BN, kl_strength=kl_strength)
    loss_B = reinforce_loss(logprob_BN, leave_one_out(return_BN))
    return StepLoss(loss_B.mean(), _earned(return_BN, logprob_BN, reference_BN, reward=reward_BN))


def _as_scored(raw_rewards: Sequence[float | None]) -> Tensor:
    """What the reward model could not read earns what the worst of its prompt's others earned. (1, N)."""
    worst = min((reward for reward in raw_rewards if reward is not None), default=0.0)
    return one_row([worst if reward is None else reward for reward in raw_rewards])


def _of_samples(
    groups: Sequence[RankedGroup], policy: SequenceLogprobs, reference: SequenceLogprobs
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the fresh samples under the policy, its reference, and the policy that drew them. (B, N) each."""
    tokens = [TokenGroup(group.logged.tokens.prompt_ids, group.completion_ids) for group in groups]
    logprob_BN = torch.stack(list(policy(tokens)))
    with torch.no_grad():
        reference_BN = torch.stack(list(reference(tokens)))
    return logprob_BN, reference_BN, logprob_BN.new_tensor([list(group.sampled_logprobs) for group in groups])


def _earned(return_BN: Tensor, logprob_BN: Tensor, reference_BN: Tensor, **means: Tensor) -> dict[str, Tensor]:
    metrics = {"return": return_BN, "kl_policy_reference_now": (logprob_BN - reference_BN).detach(), **means}
    return {name: value.mean() for name, value in metrics.items()}

"""From a spec to a step: the one `match` on `AlgorithmSpec`.

Owns which log-probs an algorithm needs and which loss it makes of them. Does not own the loop: batches,
gradients, the optimiser, sampling and the anchor's weights are the caller's, who learns from the type of the
step whether it is fed from the ledger or from fresh samples.

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bon_algos.bond import best_of_two, bond_loss, compressed_below, j_bond_loss, quantile_reward_tie_aware
from bon_algos.contracts import (
    AlgorithmSpec,
    BondSpec,
    BonForwardKlSpec,
    BonRegressionSpec,
    JBondSpec,
    OfflineBondSpec,
)
from bon_algos.imitation import best_of_n_imitation
from bon_algos.logprobs import TokenGroup
from bon_algos.offline_bond import offline_bond_loss
from bon_algos.order import best_of_n_weights, systematic_sample
from bon_algos.quantiles import log_tilt_tie_aware, standing_against, standing_among_others
from bon_algos.regression import log_quantile_regression
from bon_algos.token_kl import TokenTerms

SequenceLogprobs = Callable[[Sequence[TokenGroup]], Sequence[Tensor]]
"""`logprobs.sequence_logprobs` of one policy: for each group (N,), nats."""


TokenTermsOf = Callable[[Sequence[TokenGroup]], Sequence[TokenTerms]]
"""`token_kl.token_terms` of one policy and its reference."""


class LoggedGroup(NamedTuple):
    """One prompt with all candidates that the reference policy drew for it."""

    tokens: TokenGroup
    rewards: Sequence[float]
    reference_logprobs: Sequence[float]
    """log π_ref of each completion, token sum; nats. The ledger has them as sampled."""


class FreshGroup(NamedTuple):
    """One prompt with a sample of the policy in training and two of its anchor."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    reward: float
    anchor_completion_ids: tuple[Sequence[int], Sequence[int]]
    anchor_rewards: tuple[float, float]


class RankedGroup(NamedTuple):
    """One prompt with fresh samples of the policy in training and all candidates of the reference policy."""

    logged: LoggedGroup
    completion_ids: Sequence[Sequence[int]]
    rewards: Sequence[float]
    """Of the fresh samples, on the scale of the logged ones."""
    sampled_logprobs: Sequence[float]
    """log π of each fresh sample under the policy that drew it, which may be a few updates old; nats."""


class StepLoss(NamedTuple):
    loss: Tensor
    """Scalar, to be minimised: the mean over prompts."""
    metrics: Mapping[str, Tensor]
    """Scalars, detached; each method names its own."""


class ChosenGroup(NamedTuple):
    """The candidates of a logged group that one step looks at, and what the rewards of the whole group say of each."""

    tokens: TokenGroup
    verdicts: Sequence[float]
    """Imitation: weights that sum to 1. Regression: log π_BoN/π_ref, nats."""
    reference_logprobs: Sequence[float]


class WeighedGroup(NamedTuple):
    """The candidates of a logged group that one step of offline BOND looks at. One value for each."""

    tokens: TokenGroup
    imitation_weights: Sequence[float]
    """Sum to 1."""
    log_tilts: Sequence[float]
    """log π_BoN/π_ref, nats."""
    shares: Sequence[float]
    """For how much of the reference's law each stands; sum to 1 in expectation."""


@dataclass(frozen=True)
class LoggedStep:
    """Learns from the ledger. Prompts do not interact: a batch may be split, and the parts' losses weighted
    by their number of prompts."""

    choose: Callable[[LoggedGroup, float], ChosenGroup]
    """Which candidates this step looks at, from a number drawn uniformly from [0, 1); the loss over them is an unbiased
    estimate of the loss over all. ValueError for a group of fewer than n candidates."""
    loss: Callable[[Sequence[ChosenGroup], SequenceLogprobs], StepLoss]
    """Chosen groups and the log-probs of the policy in training."""


@dataclass(frozen=True)
class OfflineBondStep:
    """Learns from the ledger, and looks at every token of it. A batch may be split as in `LoggedStep`."""

    choose: Callable[[LoggedGroup, float], WeighedGroup]
    """As in `LoggedStep`."""
    loss: Callable[[Sequence[WeighedGroup], TokenTermsOf], StepLoss]
    """Weighed groups, and the terms of their tokens under the policy in training and its reference."""
    averaged_steps: int
    """Over how many last steps the weights are averaged in the end."""
    interpolation: float
    """How far from the reference's weights to those the policy is put."""


@dataclass(frozen=True)
class OnPolicyStep:
    """Learns from fresh samples against a moving anchor. A batch may not be split: each prompt's baseline is
    the mean of the others."""

    loss: Callable[[Sequence[FreshGroup], SequenceLogprobs, SequenceLogprobs], StepLoss]
    """Groups, the log-probs of the policy in training, those of its anchor (no gradient is taken there)."""
    anchor_rate: float
    """η: the `rate` of `EmaAnchor.update` after every optimiser step."""
    refresh_steps: int
    """Steps between two refreshes of the copies that are sampled."""


@dataclass(frozen=True)
class BondStep:
    """Imitates logged candidates for some steps, then learns from fresh samples too, ranked among them. Those later
    batches may not be split: each sample's baseline is the mean of all others."""

    imitation: LoggedStep
    imitation_steps: int
    choose: Callable[[LoggedGroup, float], ChosenGroup]
    """As in `LoggedStep`: which logged candidates are imitated beside fresh samples."""
    loss: Callable[[Sequence[RankedGroup], Sequence[ChosenGroup], SequenceLogprobs, SequenceLogprobs], StepLoss]
    """Groups, what was chosen of each, the log-probs of the policy in training, those of the reference (no gradient
    is taken there)."""
    samples_per_prompt: int
    averaged_steps: int
    """Over how many last steps the weights are averaged in the end."""


Step = LoggedStep | OfflineBondStep | OnPolicyStep | BondStep


def make_step(spec: AlgorithmSpec) -> Step:
    match spec:
        case BonForwardKlSpec():
            return LoggedStep(partial(_choose_imitated, n=spec.n, count=spec.candidates_per_prompt), _imitate)
        case BonRegressionSpec():
            choose = partial(_choose_regressed, n=spec.n, count=spec.candidates_per_prompt)
            return LoggedStep(choose, partial(_regress, huber_delta=spec.huber_delta))
        case BondSpec():
            rows = spec.candidates_per_prompt + spec.samples_per_prompt  # a prompt's share of every step alike
            return BondStep(
                LoggedStep(partial(_choose_best, n=spec.n, count=rows), _imitate),
                spec.imitation_steps,
                partial(_choose_best, n=spec.n, count=spec.candidates_per_prompt),
                partial(_bond, n=spec.n, jeffreys_weight=spec.jeffreys_weight, return_floor=spec.return_floor),
                spec.samples_per_prompt,
                spec.averaged_steps,
            )
        case OfflineBondSpec():
            return OfflineBondStep(
                partial(_choose_weighed, n=spec.n, backward_n=spec.backward_n, count=spec.candidates_per_prompt),
                partial(_offline_bond, spec=spec),
                spec.averaged_steps,
                spec.interpolation,
            )
        case JBondSpec():
            loss = partial(_j_bond, jeffreys_weight=spec.jeffreys_weight, kl_strength=spec.kl_strength)
            return OnPolicyStep(loss, anchor_rate=spec.anchor_rate, refresh_steps=spec.refresh_steps)
        case _:
            assert_never(spec)


def _choose_imitated(group: LoggedGroup, uniform: float, *, n: int, count: int) -> ChosenGroup:
    """Candidates drawn by their best-of-n weights; one that is drawn twice costs one forward pass."""
    times_N = systematic_sample(best_of_n_weights(group.rewards, n), count, uniform)
    drawn = np.flatnonzero(times_N)
    return _narrowed(group, drawn, times_N[drawn] / count)


def _choose_best(group: LoggedGroup, uniform: float, *, n: int, count: int) -> ChosenGroup:
    """As `_choose_imitated`, by the best of all candidates where there are fewer than n."""
    return _choose_imitated(group, uniform, n=min(n, len(group.rewards)), count=count)


def _choose_regressed(group: LoggedGroup, uniform: float, *, n: int, count: int) -> ChosenGroup:
    """Candidates evenly spread over drawing order, each with its target from the rewards of all the others."""
    num_candidates = len(group.rewards)
    if num_candidates < n:
        raise ValueError(f"best-of-{n} from a group of {num_candidates} candidates")
    count = min(count, num_candidates)
    drawn = np.flatnonzero(systematic_sample(np.full(num_candidates, 1 / num_candidates), count, uniform))
    log_tilt_1N = log_tilt_tie_aware(standing_among_others(_row(group.rewards)), n)
    return _narrowed(group, drawn, log_tilt_1N[0].numpy()[drawn])


def _choose_weighed(group: LoggedGroup, uniform: float, *, n: int, backward_n: int, count: int) -> WeighedGroup:
    """Half of the candidates by their best-of-n weights, where the policy goes, and half evenly. Each stands for the
    reference's law by how often it was drawn against how often that is to be expected."""
    num_candidates, by_weight = len(group.rewards), count // 2
    weight_N = best_of_n_weights(group.rewards, n)
    best_N = systematic_sample(weight_N, by_weight, uniform)
    times_N = best_N + systematic_sample(np.full(num_candidates, 1 / num_candidates), count - by_weight, uniform)
    expected_N = by_weight * weight_N + (count - by_weight) / num_candidates
    log_tilt_N = log_tilt_tie_aware(standing_among_others(_row(group.rewards)), backward_n)[0].numpy()
    drawn = np.flatnonzero(times_N)
    return WeighedGroup(
        TokenGroup(group.tokens.prompt_ids, [group.tokens.completion_ids[j] for j in drawn]),
        (best_N[drawn] / by_weight).tolist(),
        log_tilt_N[drawn].tolist(),
        (times_N[drawn] / expected_N[drawn] / num_candidates).tolist(),
    )


def _narrowed(group: LoggedGroup, index: NDArray[np.intp], verdicts: NDArray[np.float64]) -> ChosenGroup:
    return ChosenGroup(
        TokenGroup(group.tokens.prompt_ids, [group.tokens.completion_ids[j] for j in index]),
        verdicts.tolist(),
        [group.reference_logprobs[j] for j in index],
    )


def _imitate(groups: Sequence[ChosenGroup], policy: SequenceLogprobs) -> StepLoss:
    losses, log_ratios = [], []
    for group, logprob_N in zip(groups, policy([group.tokens for group in groups]), strict=True):
        weight_1N = logprob_N.new_tensor(group.verdicts)[None]
        reference_1N = logprob_N.new_tensor(group.reference_logprobs)[None]
        losses.append(best_of_n_imitation(logprob_N[None], weight_1N))
        log_ratios.append(-losses[-1].detach() - (weight_1N * reference_1N).sum(dim=-1))
    loss = torch.cat(losses).mean()
    return StepLoss(loss, {"imitation": loss.detach(), "log_ratio_best_of_n": torch.cat(log_ratios).mean()})


def _regress(groups: Sequence[ChosenGroup], policy: SequenceLogprobs, *, huber_delta: float | None) -> StepLoss:
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


def _offline_bond(groups: Sequence[WeighedGroup], policy: TokenTermsOf, *, spec: OfflineBondSpec) -> StepLoss:
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


def _bond(
    groups: Sequence[RankedGroup],
    chosen: Sequence[ChosenGroup],
    policy: SequenceLogprobs,
    reference: SequenceLogprobs,
    *,
    n: int,
    jeffreys_weight: float,
    return_floor: float,
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
        standing = standing_against(_row(group.rewards), _row(group.logged.rewards))
        log_tilt.append(log_tilt_tie_aware(standing, n)[0])
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


def _j_bond(
    groups: Sequence[FreshGroup],
    policy: SequenceLogprobs,
    anchor: SequenceLogprobs,
    *,
    jeffreys_weight: float,
    kl_strength: float,
) -> StepLoss:
    anchor_reward_B2 = torch.tensor([group.anchor_rewards for group in groups], dtype=torch.float64)
    reward_B = torch.tensor([group.reward for group in groups], dtype=torch.float64)
    winners = [
        group.anchor_completion_ids[winner]
        for group, winner in zip(groups, best_of_two(anchor_reward_B2).tolist(), strict=True)
    ]
    pairs = [
        TokenGroup(group.prompt_ids, [group.completion_ids, winner])
        for group, winner in zip(groups, winners, strict=True)
    ]
    own = [TokenGroup(group.prompt_ids, [group.completion_ids]) for group in groups]
    logprob_B, winner_logprob_B = torch.stack(list(policy(pairs))).unbind(dim=-1)
    with torch.no_grad():
        anchor_logprob_B = torch.cat(list(anchor(own)))
    loss, metrics = j_bond_loss(
        winner_logprob_B,
        logprob_B,
        anchor_logprob_B,
        quantile_reward_tie_aware(reward_B, anchor_reward_B2).to(logprob_B),
        jeffreys_weight=jeffreys_weight,
        kl_strength=kl_strength,
    )
    return StepLoss(loss, metrics._asdict())


def _row(rewards: Sequence[float]) -> Tensor:
    return torch.tensor(rewards, dtype=torch.float64)[None]

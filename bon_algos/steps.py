"""What a training step is fed with and what it gives: the types between algorithms and a loop.

Owns the records of a group, and a step's kinds by where its samples come from. Does not own any loss (`logged_steps`,
`fresh_steps`), nor which one a spec asks for (`algorithms`).

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from bon_algos.logprobs import TokenGroup
from bon_algos.prefix_values import RankLaw
from bon_algos.token_bond import GuidedTerms
from bon_algos.token_kl import TokenTerms

SequenceLogprobs = Callable[[Sequence[TokenGroup]], Sequence[Tensor]]
"""`logprobs.sequence_logprobs` of one policy: for each group (N,), nats."""


TokenTermsOf = Callable[[Sequence[TokenGroup]], Sequence[TokenTerms]]
"""`token_kl.token_terms` of one policy and its reference."""


SaidLawsOf = Callable[[Sequence[TokenGroup]], Sequence[RankLaw]]
"""`token_bond.said_laws` of one reference and a critic."""


GuidedTermsOf = Callable[[Sequence[TokenGroup]], Sequence[GuidedTerms]]
"""`token_bond.guided_terms` of one policy, its reference and a critic."""


class LoggedGroup(NamedTuple):
    """One prompt with all its candidates, which the reference policy drew unless they have shares."""

    tokens: TokenGroup
    rewards: Sequence[float]
    """Any numbers that order the candidates as they are served; the worker has `serving_order`'s ranks."""
    reference_logprobs: Sequence[float]
    """log π_ref of each completion, token sum; nats. The ledger has them as sampled."""
    log_quantiles: Sequence[float] | None = None
    """Of each reward under a learned law of the prompt's rewards, in which none tie; None where there is none."""
    levels: Sequence[tuple[float, float]] | None = None
    """Where each reward's level begins and ends in the reference's law, in [0, 1]; None where rewards are to be counted
    or a law is learned."""
    shares: Sequence[float] | None = None
    """For how much of the reference's law each candidate stands, where other policies drew some; sum to 1. None: all
    alike."""


class FreshGroup(NamedTuple):
    """One prompt with a sample of the policy in training and some of its anchor."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    reward: float
    """As `LoggedGroup.rewards`, on one scale with the anchor's."""
    anchor_completion_ids: Sequence[Sequence[int]]
    anchor_rewards: Sequence[float]


class RankedGroup(NamedTuple):
    """One prompt with fresh samples of the policy in training and all candidates of the reference policy."""

    logged: LoggedGroup
    completion_ids: Sequence[Sequence[int]]
    rewards: Sequence[float]
    """Of the fresh samples, on one scale with the logged ones."""
    sampled_logprobs: Sequence[float]
    """log π of each fresh sample under the policy that drew it, which may be a few updates old; nats."""
    raw_rewards: Sequence[float | None]
    """Of the fresh samples, as the reward model gave them, complete or not; None where it could not."""


class StepLoss(NamedTuple):
    loss: Tensor
    """Scalar, to be minimised: the mean over prompts."""
    metrics: Mapping[str, Tensor]
    """Scalars, detached; each method names its own."""


class ChosenGroup(NamedTuple):
    """The candidates of a logged group that one step looks at, and what the rewards of the whole group say of each."""

    tokens: TokenGroup
    verdicts: Sequence[float]
    """Imitation: weights that sum to 1. Regression: log π_BoN/π_ref, nats. Pairs: 1 for the better, then 0."""
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


class ScoredGroup(NamedTuple):
    """Candidates of a logged group from which a critic learns. One value for each."""

    tokens: TokenGroup
    scores: Sequence[float]
    """Normal scores of their ranks among all of the group."""
    level_variances: Sequence[float]
    """Over their levels of ties."""
    error_variances: Sequence[float]
    """Of the scores, as estimates."""


class GuidedGroup(NamedTuple):
    """The candidates of a logged group along which one step of token BOND looks. One value for each."""

    tokens: TokenGroup
    best_shares: Sequence[float]
    """By how many of the draws by best-of-n's weights each was drawn, and below by how many even ones; of all draws."""
    even_shares: Sequence[float]


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
class TokenBondStep:
    """Learns from the ledger: first a critic of prefixes, then the policy, by what the critic says. A batch may be
    split as in `LoggedStep`."""

    critic_steps: int
    """First steps, in which the critic learns and the policy stands still."""
    critic_learning_rate: float
    n: int
    """Of the best-of-n that the critic's law is asked for."""
    judge: Callable[[LoggedGroup, float], ScoredGroup]
    """As `LoggedStep.choose`: from which candidates the critic learns."""
    critic_loss: Callable[[Sequence[ScoredGroup], SaidLawsOf], StepLoss]
    choose: Callable[[LoggedGroup, float], GuidedGroup]
    """As `LoggedStep.choose`: along which candidates the policy learns."""
    loss: Callable[[Sequence[GuidedGroup], GuidedTermsOf], StepLoss]
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
    anchor_samples: int
    """Of each prompt."""
    anchor_rate: float
    """η: the `rate` of `EmaAnchor.update`."""
    anchor_steps: int
    """Optimiser steps from one update of the anchor to the next."""
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


@dataclass(frozen=True)
class SampledStep:
    """Learns from fresh samples of the policy, beside the reference's candidates. A batch may be split: each sample's
    baseline is the mean of its prompt's others."""

    loss: Callable[[Sequence[RankedGroup], SequenceLogprobs, SequenceLogprobs], StepLoss]
    """Groups, the log-probs of the policy in training, those of the reference (no gradient is taken there)."""
    samples_per_prompt: int


Step = LoggedStep | OfflineBondStep | TokenBondStep | OnPolicyStep | BondStep | SampledStep

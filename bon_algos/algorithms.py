"""From a spec to a step: the one `match` on `AlgorithmSpec`.

Owns which choice and which loss a method takes, with which of its parameters. Does not own the loop: batches,
gradients, the optimiser, sampling and the anchor's weights are the caller's, who learns from the type of the step
whether it is fed from the ledger or from fresh samples.
"""

from __future__ import annotations

from functools import partial
from typing import assert_never

from torch import Tensor

from bon_algos.bonbon import bonbon_loss
from bon_algos.contracts import (
    AlgorithmSpec,
    BonbonConsistentSpec,
    BonbonSpec,
    BondSpec,
    BonForwardKlSpec,
    BonRegressionSpec,
    BonSftSpec,
    DpoSpec,
    IpoSpec,
    IterativeBondSpec,
    JBondSpec,
    OfflineBondSpec,
    RlooSpec,
    TokenBondSpec,
    VbonSpec,
)
from bon_algos.fresh_steps import (
    learn_iterative,
    learn_j_bond,
    learn_ranked,
    learn_rloo,
    learn_vbon,
    tilt_of_exact_likelihood,
    tilt_of_lower_bound,
)
from bon_algos.logged_steps import (
    PairLoss,
    choose_best,
    choose_compared,
    choose_guided,
    choose_imitated,
    choose_pair,
    choose_regressed,
    choose_scored,
    choose_weighed,
    choose_winner,
    compare,
    compare_all,
    imitate,
    learn_guided,
    learn_offline,
    learn_values,
    regress,
)
from bon_algos.preference import dpo_loss, ipo_loss
from bon_algos.steps import BondStep, LoggedStep, OfflineBondStep, OnPolicyStep, SampledStep, Step, TokenBondStep


def make_step(spec: AlgorithmSpec) -> Step:
    """The step of a method."""
    match spec:
        case JBondSpec() | IterativeBondSpec():
            return _anchored(spec)
        case VbonSpec():
            return _vbon(spec)
        case RlooSpec():
            return SampledStep(partial(learn_rloo, kl_strength=spec.kl_strength), spec.samples_per_prompt)
        case BondSpec():
            return _bond(spec)
        case OfflineBondSpec():
            return OfflineBondStep(
                partial(choose_weighed, n=spec.n, backward_n=spec.backward_n, count=spec.candidates_per_prompt),
                partial(learn_offline, spec=spec),
                spec.averaged_steps,
                spec.interpolation,
            )
        case TokenBondSpec():
            return _token_bond(spec)
        case _:
            return _logged(spec)


def _token_bond(spec: TokenBondSpec) -> TokenBondStep:
    return TokenBondStep(
        critic_steps=spec.critic_steps,
        critic_learning_rate=spec.critic_learning_rate,
        n=spec.n,
        judge=partial(choose_scored, count=spec.critic_candidates),
        critic_loss=learn_values,
        choose=partial(choose_guided, n=spec.n, count=spec.candidates_per_prompt),
        loss=partial(learn_guided, jeffreys_weight=spec.jeffreys_weight, value_weight=spec.value_weight),
        averaged_steps=spec.averaged_steps,
        interpolation=spec.interpolation,
    )


def _logged(
    spec: BonForwardKlSpec | BonRegressionSpec | BonSftSpec | BonbonSpec | BonbonConsistentSpec | DpoSpec | IpoSpec,
) -> LoggedStep:
    match spec:
        case BonForwardKlSpec():
            return LoggedStep(partial(choose_imitated, n=spec.n, count=spec.candidates_per_prompt), imitate)
        case BonRegressionSpec():
            counted = spec.counted or "harmonic_mid"  # where quantiles are learned, groups bring them
            choose = partial(choose_regressed, n=spec.n, count=spec.candidates_per_prompt, quantiles=counted)
            return LoggedStep(choose, partial(regress, huber_delta=spec.huber_delta))
        case BonSftSpec():
            return LoggedStep(partial(choose_winner, n=spec.n), imitate)
        case BonbonConsistentSpec():
            return LoggedStep(partial(choose_compared, n=spec.n, count=spec.candidates_per_prompt), compare_all)
        case BonbonSpec():
            return LoggedStep(partial(choose_pair, n=spec.n), partial(compare, pair_loss=_bonbon(spec)))
        case DpoSpec():
            return LoggedStep(
                partial(choose_pair, n=spec.n), partial(compare, pair_loss=partial(dpo_loss, beta=spec.beta))
            )
        case IpoSpec():
            return LoggedStep(
                partial(choose_pair, n=spec.n), partial(compare, pair_loss=partial(ipo_loss, beta=spec.beta))
            )
        case _:
            assert_never(spec)


def _bonbon(spec: BonbonSpec) -> PairLoss:
    def pair_loss(better_B: Tensor, worse_B: Tensor, better_reference_B: Tensor, worse_reference_B: Tensor) -> Tensor:
        given = (better_B, worse_B, better_reference_B, worse_reference_B)
        return bonbon_loss(*given, n=spec.n, imitation_weight=spec.imitation_weight).loss_B

    return pair_loss


def _vbon(spec: VbonSpec) -> SampledStep:
    bound = partial(tilt_of_lower_bound, quantiles=spec.quantiles or "harmonic_mid")
    log_tilt = tilt_of_exact_likelihood if spec.likelihood == "exact" else bound
    clip_range = spec.clip_range if spec.gradient == "ppo_clip" else None
    return SampledStep(partial(learn_vbon, n=spec.n, log_tilt=log_tilt, clip_range=clip_range), spec.samples_per_prompt)


def _anchored(spec: JBondSpec | IterativeBondSpec) -> OnPolicyStep:
    weight, strength = spec.jeffreys_weight, spec.kl_strength
    match spec:
        case JBondSpec():
            return OnPolicyStep(
                partial(learn_j_bond, jeffreys_weight=weight, kl_strength=strength),
                anchor_samples=2,
                anchor_rate=spec.anchor_rate,
                anchor_steps=1,
                refresh_steps=spec.refresh_steps,
            )
        case IterativeBondSpec():
            return OnPolicyStep(
                partial(learn_iterative, n=spec.n, jeffreys_weight=weight, kl_strength=strength),
                anchor_samples=spec.anchor_samples,
                anchor_rate=1.0,
                anchor_steps=spec.anchor_steps,
                refresh_steps=spec.refresh_steps,
            )
        case _:
            assert_never(spec)


def _bond(spec: BondSpec) -> BondStep:
    rows = spec.candidates_per_prompt + spec.samples_per_prompt  # a prompt's share of every step alike
    return BondStep(
        LoggedStep(partial(choose_best, n=spec.n, count=rows), imitate),
        spec.imitation_steps,
        partial(choose_best, n=spec.n, count=spec.candidates_per_prompt),
        partial(
            learn_ranked,
            n=spec.n,
            jeffreys_weight=spec.jeffreys_weight,
            return_floor=spec.return_floor,
            quantiles=spec.quantiles,
        ),
        spec.samples_per_prompt,
        spec.averaged_steps,
    )

"""From a spec to a step: which candidates it looks at, and what it makes of them, by hand and by enumeration."""

from __future__ import annotations

from itertools import product
from math import exp

import numpy as np
import pytest
import torch
from torch import Tensor

from bon_algos import bond, order
from bon_algos.algorithms import make_step
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
    JBondSpec,
    OfflineBondSpec,
    RlooSpec,
)
from bon_algos.logprobs import TokenGroup
from bon_algos.quantiles import log_tilt_tie_aware, standing_against
from bon_algos.steps import (
    BondStep,
    FreshGroup,
    LoggedGroup,
    LoggedStep,
    OfflineBondStep,
    OnPolicyStep,
    RankedGroup,
    SampledStep,
)
from tests.bon_algos.tables import logged, table


def test_a_spec_becomes_the_step_that_its_samples_come_from():
    assert isinstance(make_step(BonForwardKlSpec()), LoggedStep)
    assert isinstance(make_step(BonRegressionSpec()), LoggedStep)
    step = make_step(JBondSpec(anchor_rate=0.07, refresh_steps=3))
    assert isinstance(step, OnPolicyStep)
    assert (step.anchor_rate, step.refresh_steps) == (0.07, 3)
    offline = make_step(OfflineBondSpec(averaged_steps=7))
    assert isinstance(offline, OfflineBondStep)
    assert offline.averaged_steps == 7
    bond_step = make_step(BondSpec(samples_per_prompt=5, imitation_steps=2, averaged_steps=9))
    assert isinstance(bond_step, BondStep)
    assert (bond_step.samples_per_prompt, bond_step.imitation_steps, bond_step.averaged_steps) == (5, 2, 9)


def test_an_imitation_step_by_hand():
    """n = 2 of rewards 1, 3, 2: weights 0, 2/3, 1/3.  log π = −1, −2, −4: loss 4/3 + 4/3.

    log π_ref = −1, −3, −3: weighted log-ratio 2/3·1 − 1/3·1 = 1/3.
    """
    asked = []

    def policy(groups):
        asked.extend(groups)
        return [torch.tensor([{0: -1.0, 1: -2.0, 2: -4.0}[c[0]] for c in g.completion_ids]) for g in groups]

    group = LoggedGroup(TokenGroup([9], [[0], [1], [2]]), [1.0, 3.0, 2.0], [-1.0, -3.0, -3.0])
    step = make_step(BonForwardKlSpec(n=2, candidates_per_prompt=3))
    assert isinstance(step, LoggedStep)
    loss, metrics = step.loss([step.choose(group, 0.5)], policy)
    assert loss.item() == pytest.approx(8 / 3)
    assert metrics["log_ratio_best_of_n"].item() == pytest.approx(1 / 3)
    assert asked == [TokenGroup([9], [[1], [2]])]  # a candidate without weight costs no forward pass


def test_a_regression_step_by_hand():
    """n = 2 of two candidates: among one other, log p̂ is −1 and 0, so t = log 2 − 1 and log 2."""
    group = LoggedGroup(TokenGroup([0], [[0], [1]]), [1.0, 3.0], [-1.0, -1.0])
    step = make_step(BonRegressionSpec(n=2))
    assert isinstance(step, LoggedStep)
    chosen = [step.choose(group, 0.9)]
    loss, metrics = step.loss(chosen, lambda groups: [torch.tensor([-2.0, 0.0])])
    residuals = np.array([-1 - (np.log(2) - 1), 1 - np.log(2)])
    assert loss.item() == pytest.approx((residuals**2).mean())
    assert metrics["residual_rms"].item() == pytest.approx(loss.item() ** 0.5)
    assert metrics["log_ratio"].item() == pytest.approx(0)
    capped = make_step(BonRegressionSpec(n=2, huber_delta=0.1))
    assert isinstance(capped, LoggedStep)
    huber = ((2 * np.abs(residuals) - 0.1) * 0.1).mean()
    assert capped.loss(chosen, lambda groups: [torch.tensor([-2.0, 0.0])]).loss.item() == pytest.approx(huber)


@pytest.mark.parametrize(
    ("quantiles", "lowest", "tied"),
    [
        ("harmonic_mid", -3 / 2, (1 + 3 / 2) / 2 - 3 / 2),
        ("harmonic", -3 / 2, 0),
        ("monte_carlo", np.log(1 / 4), 0),
        ("mid_rank", np.log(1 / 4), np.log(3 / 4)),
        ("add_one", np.log(1 / 3), np.log(2 / 3)),
    ],
)
def test_a_regressions_targets_are_counted_as_asked(quantiles, lowest, tied):
    """n = 2 of rewards 0, 1 and 1: the lowest has 0 of 2 others at or below, each of the others one below, one tied."""
    group = LoggedGroup(TokenGroup([0], [[0], [1], [2]]), [0.0, 1.0, 1.0], [-1.0] * 3)
    step = make_step(BonRegressionSpec(n=2, quantiles=quantiles))
    assert isinstance(step, LoggedStep)
    assert step.choose(group, 0.9).verdicts == pytest.approx(np.log(2) + np.array([lowest, tied, tied]))


@pytest.mark.parametrize(
    ("quantiles", "lowest", "tied"),
    [
        ("harmonic_mid", -11 / 6, (1 + 3 + 11 / 6) / 4 - 11 / 6),
        ("harmonic", -11 / 6, 0),
        ("monte_carlo", np.log(1 / 6), 0),
        ("mid_rank", np.log(1 / 6), np.log(2 / 3)),
        ("add_one", np.log(1 / 4), np.log(2 / 4)),
    ],
)
def test_bond_ranks_fresh_samples_as_asked(quantiles, lowest, tied):
    """n = 2 among logged rewards 0, 1 and 1: a sample under all of them, and one with one below and two tied."""
    logprob_PK = torch.full((2, 3), 1 / 3).log()
    logs = [logged(p, [0, 1, 2], [0.0, 1.0, 1.0], logprob_PK[p]) for p in range(2)]
    step = make_step(BondSpec(n=2, quantiles=quantiles))
    assert isinstance(step, BondStep)
    fresh = [RankedGroup(log, [[0]], [reward], [-1.0], [reward]) for log, reward in zip(logs, (-1.0, 1.0), strict=True)]
    chosen = [step.choose(log, 0.5) for log in logs]
    metrics = step.loss(fresh, chosen, table(logprob_PK), table(logprob_PK)).metrics
    assert metrics["log_tilt"].item() == pytest.approx(np.log(2) + (lowest + tied) / 2)


def test_a_pair_is_the_best_and_the_worst_of_the_candidates_drawn():
    """All four drawn: rewards 1, 3, 3, 0, so the second and the last. log-ratios 1 and −1: a margin of 2."""
    group = LoggedGroup(TokenGroup([0], [[0], [1], [2], [3]]), [1.0, 3.0, 3.0, 0.0], [-2.0, -3.0, -3.0, -4.0])
    cases: list[tuple[AlgorithmSpec, float]] = [
        (DpoSpec(n=4, beta=0.5), np.log1p(np.exp(-0.5 * 2))),
        (IpoSpec(n=4, beta=0.5), (2 - 1 / (2 * 0.5)) ** 2),
        (BonbonSpec(n=4, imitation_weight=0.25), 0.25 * 2.0 + 0.75 * (2 - 5.5) ** 2),  # (n − 1)·H_3 = 5.5
    ]
    for spec, expected in cases:
        step = make_step(spec)
        assert isinstance(step, LoggedStep)
        chosen = step.choose(group, 0.3)
        assert chosen.tokens == TokenGroup([0], [[1], [3]])
        loss, metrics = step.loss([chosen], lambda groups: [torch.tensor([-2.0, -5.0])])
        assert loss.item() == pytest.approx(expected)
        assert metrics["margin"].item() == pytest.approx(2)
        assert metrics["log_ratio_better"].item() == pytest.approx(1)


@pytest.mark.slow
def test_winners_of_n_drawn_candidates_follow_best_of_ns_weights():
    """Over 5,040 numbers; a share's deviation is below .0071."""
    rewards = [0.3, 1.0, -0.5, 2.0, 1.5, 0.1]
    group = logged(0, range(6), rewards, torch.zeros(6))
    step = make_step(BonSftSpec(n=3))
    assert isinstance(step, LoggedStep)
    winners = [step.choose(group, (k + 0.5) / 5040).tokens.completion_ids[0][0] for k in range(5040)]
    assert np.bincount(winners, minlength=6) / 5040 == pytest.approx(order.best_of_n_weights(rewards, 3), abs=0.028)


def test_the_consistent_pairs_targets_make_up_for_the_partners_rank():
    """n = 2 of three: t = log 2 + H_s − H_2 among two others, s of them below; times 2/3: no loss at these."""
    group = LoggedGroup(TokenGroup([0], [[0], [1], [2]]), [1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    step = make_step(BonbonConsistentSpec(n=2, candidates_per_prompt=3))
    assert isinstance(step, LoggedStep)
    chosen = step.choose(group, 0.5)
    tilts = [np.log(2) + below for below in (-1.5, -0.5, 0.0)]  # H_s − H_2 for s = 0, 1, 2
    assert chosen.verdicts == pytest.approx([2 / 3 * tilt for tilt in tilts])
    exact = torch.tensor(chosen.verdicts) + 0.7  # a constant of the prompt is nobody's business
    assert step.loss([chosen], lambda groups: [exact]).loss.item() == pytest.approx(0, abs=1e-12)
    assert step.loss([chosen], lambda groups: [2 * exact]).loss.item() > 0.1


def test_an_rloo_step_by_hand():
    """β = ½, rewards 2, none and 0 (none counts as the worst, 0); sampled log-ratios 1, 0, 1: returns 1.5, 0, −.5.

    Less the mean of the others: 1.75, −.5, −1.25.  log π = −1, −2, −3: loss −(−1.75 + 1 + 3.75)/3.
    """
    log = LoggedGroup(TokenGroup([0], [[7], [8]]), [0.0, 1.0], [-1.0, -1.0])
    group = RankedGroup(log, [[0], [1], [2]], [2.0, -1e9, 0.0], [-1.0, -2.0, -3.0], [2.0, None, 0.0])
    step = make_step(RlooSpec(kl_strength=0.5, samples_per_prompt=3))
    assert isinstance(step, SampledStep)
    policy, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -4.0])
    loss, metrics = step.loss([group], lambda groups: [policy], lambda groups: [reference])
    assert loss.item() == pytest.approx(-(-1.75 + 1 + 3.75) / 3)
    assert metrics["reward"].item() == pytest.approx(2 / 3)
    assert metrics["kl_policy_reference_now"].item() == pytest.approx(2 / 3)


def test_a_j_bond_step_imitates_the_better_anchor_sample():
    logprob_PK = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6]]).log().requires_grad_()
    anchor_PK = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.3, 0.6]]).log()
    groups = [
        FreshGroup([0], [2], 0.0, ([0], [1]), (1.0, 2.0)),
        FreshGroup([1], [0], 5.0, ([2], [1]), (5.0, 5.0)),
    ]
    step = make_step(JBondSpec(jeffreys_weight=0.3, kl_strength=0.6))
    assert isinstance(step, OnPolicyStep)
    actual = step.loss(groups, table(logprob_PK), table(anchor_PK))
    expected = bond.j_bond_loss(
        logprob_PK[[0, 1], [1, 2]],  # winners: the second anchor sample; the first of two that tie
        logprob_PK[[0, 1], [2, 0]],
        anchor_PK[[0, 1], [2, 0]],
        torch.tensor([bond.PENALTY, bond.PENALTY / 3]),  # below both; tied with both
        jeffreys_weight=0.3,
        kl_strength=0.6,
    )
    assert actual.loss.item() == pytest.approx(expected.loss.item())
    torch.testing.assert_close(
        torch.autograd.grad(actual.loss, logprob_PK), torch.autograd.grad(expected.loss, logprob_PK)
    )
    assert actual.metrics["kl_policy_anchor"].item() == pytest.approx(expected.metrics.kl_policy_anchor.item())


@pytest.mark.parametrize(("n", "floor"), [(3, -1000.0), (3, -1.0), (9, -10.0)])
def test_a_bond_steps_expected_gradient_is_that_of_the_divergence(n, floor):
    """Over all nine pairs of fresh samples of two prompts: (1 − β)·cross-entropy to the logged best, by the weights of
    best-of-n or of all four where n is more, + β·E_π[log π/π_ref − t], t from the logged rewards; what lies below the
    floor counts by its logarithm."""
    beta, reward_K, drawn = 0.6, [0.0, 1.0, 2.0], [0, 1, 1, 2]
    logit_PK = torch.tensor([[0.1, -0.4, 0.3], [0.5, 0.2, -0.6]], dtype=torch.float64).requires_grad_()
    reference_PK = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6]], dtype=torch.float64).log()
    logs = [logged(p, drawn, [reward_K[k] for k in drawn], reference_PK[p]) for p in range(2)]
    step = make_step(BondSpec(n=n, jeffreys_weight=beta, return_floor=floor, candidates_per_prompt=4000))
    assert isinstance(step, BondStep)
    chosen = [step.choose(log, 0.5) for log in logs]

    logprob_PK = logit_PK.log_softmax(-1)
    expected_loss = torch.zeros((), dtype=torch.float64)
    for first, second in product(range(3), repeat=2):
        groups = [
            RankedGroup(log, [[k]], [reward_K[k]], [logprob_PK[p, k].item()], [reward_K[k]])
            for p, (log, k) in enumerate(zip(logs, (first, second), strict=True))
        ]
        probability = (logprob_PK[0, first] + logprob_PK[1, second]).exp().detach()
        expected_loss = (
            expected_loss + probability * step.loss(groups, chosen, table(logprob_PK), table(reference_PK)).loss
        )

    logged_rewards = [reward_K[k] for k in drawn]
    standing = standing_against(*(torch.tensor([row], dtype=torch.float64) for row in (reward_K, logged_rewards)))
    return_PK = log_tilt_tie_aware(standing, n)[0] - (logprob_PK - reference_PK).detach()
    return_PK = torch.where(return_PK < floor, floor - (1 + floor - return_PK).log(), return_PK)
    weight_N = torch.tensor(order.best_of_n_weights(logged_rewards, min(n, 4)))
    imitation_P = -(weight_N * logprob_PK[:, drawn]).sum(dim=-1)
    backward_P = -(logprob_PK.exp() * return_PK).sum(dim=-1)  # whose gradient ∇π·(log π − …) is, as Σ∇π = 0
    divergence = ((1 - beta) * imitation_P + beta * backward_P).mean()
    actual, expected = (
        torch.autograd.grad(loss, logit_PK, retain_graph=True)[0] for loss in (expected_loss, divergence)
    )
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
    assert expected.abs().max() > 0.05


def test_a_bad_sample_of_an_older_policy_counts_as_often_as_the_policy_would_still_give_it():
    """Two prompts, one good sample and one bad: the older policy's log-probs change the bad one's part alone."""
    reward_K = [0.0, 1.0]
    logprob_PK = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    logs = [logged(p, [0, 1], reward_K, logprob_PK[p]) for p in range(2)]
    step = make_step(BondSpec(n=2, jeffreys_weight=1.0))
    assert isinstance(step, BondStep)
    chosen = [step.choose(log, 0.5) for log in logs]

    def gradient(surplus_bad: float, surplus_good: float) -> Tensor:
        drawn = logprob_PK.clone().requires_grad_()
        groups = [
            RankedGroup(logs[0], [[0]], [0.0], [logprob_PK[0, 0].item() + surplus_bad], [0.0]),
            RankedGroup(logs[1], [[1]], [1.0], [logprob_PK[1, 1].item() + surplus_good], [1.0]),
        ]
        loss = step.loss(groups, chosen, table(drawn), table(logprob_PK)).loss
        gradient_PK = torch.autograd.grad(loss, drawn)[0]
        return torch.stack([gradient_PK[0, 0], gradient_PK[1, 1]])

    bad, good = fresh = gradient(0.0, 0.0)
    assert bad > 0 > good
    torch.testing.assert_close(gradient(2.0, 2.0), torch.stack([bad * exp(-2.0), good]))
    torch.testing.assert_close(gradient(-2.0, -2.0), fresh)


def test_a_bond_step_weighs_prompts_alike_however_many_samples_they_have():
    """Without its imitation the mean of two equal samples is that of one."""
    logprob_PK = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
    logs = [logged(p, [0, 1], [0.0, 1.0], logprob_PK[p]) for p in range(2)]
    step = make_step(BondSpec(jeffreys_weight=0.0))
    assert isinstance(step, BondStep)
    chosen = [step.choose(log, 0.5) for log in logs]
    one, three = (
        step.loss(
            [
                RankedGroup(log, [[1]] * count, [1.0] * count, [logprob_PK[p, 1].item()] * count, [1.0] * count)
                for p, log in enumerate(logs)
            ],
            chosen,
            *[table(logprob_PK)] * 2,
        ).loss
        for count in (1, 3)
    )
    torch.testing.assert_close(one, three)


@pytest.mark.parametrize("spec", [BonForwardKlSpec(n=2), BonRegressionSpec(n=2)])
def test_a_logged_batch_may_be_split(spec):
    logprob_PK = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    logs = [logged(p, [0, 3, 1, 1][: p + 2], [2.0, 1.0, 2.0, 0.0][: p + 2], logprob_PK[2 - p]) for p in range(3)]
    step = make_step(spec)
    assert isinstance(step, LoggedStep)
    groups = [step.choose(log, 0.3) for log in logs]
    whole = step.loss(groups, table(logprob_PK)).loss
    first, last = step.loss(groups[:2], table(logprob_PK)).loss, step.loss(groups[2:], table(logprob_PK)).loss
    torch.testing.assert_close(whole, (2 * first + last) / 3)


@pytest.mark.parametrize("spec", [BonForwardKlSpec(n=3), BonRegressionSpec(n=3), OfflineBondSpec(n=3)])
def test_a_group_of_fewer_than_n_is_refused(spec):
    logprob_PK = torch.zeros(1, 2)
    step = make_step(spec)
    assert isinstance(step, LoggedStep | OfflineBondStep)
    with pytest.raises(ValueError, match="best-of-3"):
        step.choose(logged(0, [0, 1], [1.0, 2.0], logprob_PK[0]), 0.5)

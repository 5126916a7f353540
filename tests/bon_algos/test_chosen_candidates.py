"""The candidates that a step looks at stand for all of a prompt's, in the mean over the numbers that choose them."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest
import torch

from bon_algos import order
from bon_algos.algorithms import make_step
from bon_algos.contracts import BonbonConsistentSpec, BonForwardKlSpec, BonRegressionSpec, OfflineBondSpec
from bon_algos.logprobs import TokenGroup
from bon_algos.quantiles import log_tilt_tie_aware, standing_among_others
from bon_algos.steps import LoggedGroup, LoggedStep, OfflineBondStep
from tests.bon_algos.tables import logged, table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "counts", "tolerance"),
    [
        (BonForwardKlSpec(n=4), (1, 3, 8, 20), 2e-3),
        (BonRegressionSpec(n=4), (1, 3, 8, 20), 2e-3),
        (BonbonConsistentSpec(n=4), (2, 3, 8, 20), 0.1),  # drawn, not evenly spread: five deviations for two of eight
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("place", range(4))
def test_the_chosen_candidates_stand_for_all_of_them(spec, counts, tolerance, place):
    """Averaged over the uniform number the loss of `count` chosen candidates is the loss of all eight, weighted by best
    of 4 or all alike, or of all their pairs. The mean is over 2,520 numbers, evenly spaced."""
    count = counts[place]
    drawn, rewards = [0, 1, 2, 3, 4, 5, 0, 2], [0.3, 1.0, -0.5, 2.0, 2.0, 0.1, 0.3, -0.5]
    logprob_PK = torch.randn(1, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(-1)
    reference_K = torch.full((6,), -1.5, dtype=torch.float64)
    group = logged(0, drawn, rewards, reference_K)
    step = make_step(spec.model_copy(update={"candidates_per_prompt": count}))
    assert isinstance(step, LoggedStep)
    choices = [step.choose(group, (k + 0.5) / 2520) for k in range(2520)]
    mean = step.loss(choices, table(logprob_PK)).loss.item()

    logprob_N = logprob_PK[0, drawn]
    if isinstance(spec, BonForwardKlSpec):
        expected = -(torch.tensor(order.best_of_n_weights(rewards, 4)) * logprob_N).sum().item()
    else:
        tilt_N = log_tilt_tie_aware(standing_among_others(torch.tensor([rewards], dtype=torch.float64)), 4)[0]
        is_pairs = isinstance(spec, BonbonConsistentSpec)
        residual_N = logprob_N + 1.5 - tilt_N * (7 / 8 if is_pairs else 1)
        expected = (2 * residual_N.var() if is_pairs else residual_N.square().mean()).item()
    assert mean == pytest.approx(expected, rel=tolerance)
    assert max(len(choice.verdicts) for choice in choices) <= min(count, 8)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 7, 20])
def test_the_weighed_candidates_stand_for_the_references_law(count):
    """Averaged over 2,520 numbers, evenly spaced: any mean over the weighed candidates is the mean over all eight, and
    the imitated ones are best-of-4. Tilts are those of best-of-9, from the rewards of the seven others."""
    drawn, rewards = [0, 1, 2, 3, 4, 5, 0, 2], [0.3, 1.0, -0.5, 2.0, 2.0, 0.1, 0.3, -0.5]
    group = logged(0, drawn, rewards, torch.zeros(6))
    step = make_step(OfflineBondSpec(n=4, backward_n=9, candidates_per_prompt=count))
    assert isinstance(step, OfflineBondStep)
    tilt_N = log_tilt_tie_aware(standing_among_others(torch.tensor([rewards], dtype=torch.float64)), 9)[0].tolist()
    tilt_of = {(k, reward): tilt for k, reward, tilt in zip(drawn, rewards, tilt_N, strict=True)}
    reward_of = dict(zip(drawn, rewards, strict=True))
    share_K, weight_K = np.zeros(6), np.zeros(6)
    for place in range(2520):
        weighed = step.choose(group, (place + 0.5) / 2520)
        assert sum(weighed.imitation_weights) == pytest.approx(1)
        assert len(weighed.shares) <= min(count, 8)
        rows = zip(
            weighed.tokens.completion_ids, weighed.shares, weighed.imitation_weights, weighed.log_tilts, strict=True
        )
        for (outcome,), share, weight, tilt in rows:
            share_K[outcome] += share / 2520
            weight_K[outcome] += weight / 2520
            assert tilt == tilt_of[outcome, reward_of[outcome]]
    best_N = order.best_of_n_weights(rewards, 4)
    assert share_K == pytest.approx(np.bincount(drawn) / 8, rel=2e-3)
    assert weight_K == pytest.approx(np.bincount(drawn, best_N), rel=2e-3)


@pytest.mark.slow
def test_candidates_with_shares_are_chosen_as_the_references():
    """Averaged over 2,520 numbers: the imitated are best-of-2 of the shares, C² less C² below; the weighed stand for
    their shares; every target is the given level's, of no breadth."""
    rewards, shares = [3.0, 1.0, 2.0, 0.0], [1 / 8, 1 / 2, 3 / 8, 0.0]
    best_N, quantiles = np.array([15 / 64, 16 / 64, 33 / 64, 0.0]), [-0.1, -1.0, -0.5, -3.0]
    tokens = TokenGroup([0], [[k] for k in range(4)])
    group = LoggedGroup(tokens, rewards, [-1.0] * 4, levels=[(exp(q), exp(q)) for q in quantiles], shares=shares)
    imitating = make_step(BonForwardKlSpec(n=2, candidates_per_prompt=3))
    weighing = make_step(OfflineBondSpec(n=2, backward_n=5, candidates_per_prompt=5))
    assert isinstance(imitating, LoggedStep)
    assert isinstance(weighing, OfflineBondStep)
    imitated_N, weighed_N, best_again_N = np.zeros((3, 4))
    for place in range(2520):
        chosen = imitating.choose(group, (place + 0.5) / 2520)
        weighed = weighing.choose(group, (place + 0.5) / 2520)
        imitated_N[[ids[0] for ids in chosen.tokens.completion_ids]] += chosen.verdicts
        drawn = [ids[0] for ids in weighed.tokens.completion_ids]
        weighed_N[drawn] += weighed.shares
        best_again_N[drawn] += weighed.imitation_weights
        assert list(weighed.log_tilts) == pytest.approx([np.log(5) + 4 * quantiles[k] for k in drawn])
    np.testing.assert_allclose(imitated_N / 2520, best_N, atol=2e-3)
    np.testing.assert_allclose(best_again_N / 2520, best_N, atol=2e-3)
    np.testing.assert_allclose(weighed_N / 2520, shares, atol=2e-3)

"""A learned quantile: what its losses aim at, by enumeration, and what it gains where prompts do not repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from bon_algos import learned_quantile as learned
from bon_algos import quantiles
from bon_algos.quantiles import Standing, standing_against, standing_among_others
from tests.bon_algos.vectors import REFERENCE_K, REWARDS

relaxed = settings(deadline=None, max_examples=60)
LARGEST = float(np.finfo(np.float32).max)


def law_of(weights, locations, scales) -> learned.LogisticMixture:
    weight_1C, location_1C, scale_1C = torch.tensor([[weights], [locations], [scales]], dtype=torch.float64)
    return learned.LogisticMixture(weight_1C.log(), location_1C, scale_1C)


# --- what the losses aim at ------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", REWARDS)
@pytest.mark.parametrize(("label_of", "of_ties"), [(learned.at_most_label, 1.0), (learned.mid_rank_label, 0.5)])
def test_cross_entropy_with_one_reference_draw_is_least_at_the_true_quantile(vector, label_of, of_ties):
    """All pairs of 20 outcomes, with probability: y from any law, y' from the reference."""
    reward_K = torch.tensor(REWARDS[vector])
    first, second = torch.cartesian_prod(torch.arange(20), torch.arange(20)).T
    standing = standing_against(reward_K[first, None], reward_K[second, None])
    drawn_K = torch.cos(torch.arange(20).double()).softmax(-1)
    law_P = drawn_K[first] * torch.tensor(REFERENCE_K)[second]
    log_odds_K = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS(
        [log_odds_K], max_iter=300, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def expected_loss() -> Tensor:
        descent.zero_grad()
        loss: Tensor = law_P @ learned.quantile_cross_entropy(log_odds_K[first, None], label_of(standing))
        loss.backward()
        return loss

    descent.step(expected_loss)
    below_KK = (reward_K[:, None] > reward_K) + (reward_K[:, None] == reward_K) * of_ties
    expected_K = below_KK.double() @ torch.tensor(REFERENCE_K)
    torch.testing.assert_close(log_odds_K.detach().sigmoid(), expected_K, atol=1e-5, rtol=0)


def test_the_share_of_many_labels_teaches_what_the_labels_would():
    # reward 2 against 1, 2, 2, 3, 0: below, tied, tied, above, below
    reference_BM = torch.tensor([[1.0, 2.0, 2.0, 3.0, 0.0]])
    reward_BN, log_odds_BN = torch.tensor([[2.0]]), torch.tensor([[0.3]], dtype=torch.float64)
    alone = [
        learned.quantile_cross_entropy(log_odds_BN, learned.mid_rank_label(standing_against(reward_BN, one_BM)))
        for one_BM in reference_BM.T[:, None]
    ]
    label_BN = learned.mid_rank_label(standing_against(reward_BN, reference_BM))
    assert label_BN.item() == pytest.approx(3 / 5)
    torch.testing.assert_close(learned.quantile_cross_entropy(log_odds_BN, label_BN), torch.stack(alone).mean(0))


def test_labels_by_hand():
    # below, tied, above the one reference reward
    standing = standing_against(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0]]))
    assert learned.at_most_label(standing).tolist() == [[0, 1, 1]]
    assert learned.mid_rank_label(standing).tolist() == [[0, 0.5, 1]]


def test_the_likelihood_is_greatest_at_the_law_the_rewards_come_from():
    """E[−log density] over a fine grid of one logistic's quantiles: its gradient vanishes there and not beside it."""
    reward_BN = torch.tensor(stats.logistic.ppf((np.arange(20_000) + 0.5) / 20_000, loc=1.5, scale=0.7))[None]
    for location, scale, is_least in [(1.5, 0.7, True), (1.4, 0.7, False), (1.5, 0.8, False)]:
        law = law_of([1.0], [location], [scale])
        parameters = [law.location_BC.requires_grad_(), law.scale_BC.requires_grad_()]
        slopes = torch.autograd.grad(learned.negative_log_likelihood(law, reward_BN).sum(), parameters)
        assert (sum(slope.square().item() for slope in slopes) < 1e-6) == is_least


# --- the law ---------------------------------------------------------------------------------------------


def test_the_law_is_scipys():
    law, reward_N = law_of([0.2, 0.5, 0.3], [-1.0, 0.5, 3.0], [0.3, 1.0, 2.5]), np.linspace(-9, 12, 50)
    parts = [(0.2, stats.logistic(-1, 0.3)), (0.5, stats.logistic(0.5, 1)), (0.3, stats.logistic(3, 2.5))]
    log_odds_BN = law.log_odds(torch.tensor(reward_N)[None])
    cdf_N, survival_N = (
        sum(w * part.cdf(reward_N) for w, part in parts),
        sum(w * part.sf(reward_N) for w, part in parts),
    )
    np.testing.assert_allclose(log_odds_BN[0], np.log(cdf_N / survival_N), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(learned.log_quantile(log_odds_BN)[0], np.log(cdf_N), rtol=1e-10, atol=1e-12)
    density_N = sum(w * part.pdf(reward_N) for w, part in parts)
    np.testing.assert_allclose(law.log_density(torch.tensor(reward_N)[None])[0], np.log(density_N), rtol=1e-10)


def test_one_component_by_hand():
    # z = (5 − 1)/2: the log-odds of a logistic law are z itself; density e^{−2}/(2·(1 + e^{−2})²)
    law = law_of([1.0], [1.0], [2.0])
    assert law.log_odds(torch.tensor([[5.0]])).item() == pytest.approx(2)
    density = np.exp(-2) / (2 * (1 + np.exp(-2)) ** 2)
    assert learned.negative_log_likelihood(law, torch.tensor([[5.0]])).item() == pytest.approx(-np.log(density))


@given(st.integers(0, 50), st.lists(st.floats(-40, 40), min_size=2, max_size=20), st.sampled_from([1.0, 30.0]))
@relaxed
def test_it_rises_with_the_reward_whatever_the_head(seed, rewards, magnitude):
    torch.manual_seed(seed)
    head = learned.RewardLawHead(3, num_components=4, hidden=8).double()
    law = head(magnitude * torch.randn(2, 3, dtype=torch.float64))
    reward_BN = torch.tensor(sorted(rewards), dtype=torch.float64).expand(2, -1)
    log_odds_BN = law.log_odds(reward_BN)
    assert (log_odds_BN.diff() >= -1e-12 * (1 + log_odds_BN[:, 1:].abs())).all()
    assert (learned.log_quantile(log_odds_BN).diff() >= -1e-12).all()
    torch.testing.assert_close(law.log_weight_BC.exp().sum(dim=-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite(dtype):
    torch.manual_seed(0)
    head = learned.RewardLawHead(3).to(dtype)
    law = head(torch.tensor([[0.0, 1.0, -1.0], [1e3, -1e3, 1e3]], dtype=dtype))
    reward_BN = torch.tensor([[-LARGEST, -1e6, -50, 0, 50, 1e6, LARGEST]], dtype=torch.float32).expand(2, -1)
    log_quantile_BN = learned.log_quantile(law.log_odds(reward_BN), floor=-9.0)
    assert log_quantile_BN.dtype == dtype
    assert log_quantile_BN.isfinite().all()
    assert log_quantile_BN[:, 0].tolist() == [-9, -9]
    assert log_quantile_BN[:, -1].tolist() == [0, 0]
    label_BN = torch.full((2, 5), 0.5, dtype=torch.float64)
    loss = learned.quantile_cross_entropy(law.log_odds(reward_BN[:, 1:-1]), label_BN).sum()
    loss = loss + learned.negative_log_likelihood(law, reward_BN[:, 1:-1]).sum()
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(loss, list(head.parameters())))


def test_a_law_cannot_shrink_onto_one_reward():
    head = learned.RewardLawHead(2, num_components=2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(0).sub_(1e4)
    assert (head(torch.ones(1, 2)).scale_BC >= learned.SMALLEST_SCALE).all()


def test_heads_begin_near_the_standard_law_with_components_apart():
    torch.manual_seed(1)
    law = learned.RewardLawHead(4)(torch.randn(5, 4))
    assert (law.location_BC.diff() > 0.5).all()
    quantile_BN = law.log_odds(torch.tensor([[-2.0, 0.0, 2.0]]).expand(5, -1)).sigmoid()
    torch.testing.assert_close(quantile_BN, torch.tensor([[0.12, 0.5, 0.88]]).expand(5, -1), atol=0.1, rtol=0)


# --- order alone -----------------------------------------------------------------------------------------


def test_scores_by_hand():
    # among 1, 2, 2, 4: below all s + ½ = ½ of 5; with the 2s 1 + 1 + ½; above all 4 + ½
    score_BN = learned.pooled_rank_score(torch.tensor([[0.0, 2.0], [3.0, 9.0]]), torch.tensor([2.0, 4.0, 1.0, 2.0]))
    expected_BN = torch.tensor([[0.5 / 4.5, 1], [3.5 / 1.5, 4.5 / 0.5]], dtype=torch.float64).log()
    torch.testing.assert_close(score_BN, expected_BN)


@given(st.lists(st.lists(st.integers(-9, 9).map(float), min_size=3, max_size=3), min_size=2, max_size=5))
@relaxed
def test_one_increasing_transform_leaves_scores_and_one_for_each_prompt_leaves_labels(rows):
    reward_BN = torch.tensor(rows, dtype=torch.float64)
    score_BN = learned.pooled_rank_score(reward_BN, reward_BN.flatten())
    assert torch.equal(learned.pooled_rank_score(reward_BN.exp(), reward_BN.exp().flatten()), score_BN)
    scaled_BN = (reward_BN * torch.arange(1, len(rows) + 1)[:, None]).exp()
    for label_of in (learned.at_most_label, learned.mid_rank_label):
        labels = [label_of(standing_among_others(reward)) for reward in (reward_BN, scaled_BN)]
        assert torch.equal(*labels)


# --- where prompts do not repeat -------------------------------------------------------------------------


class Prompts(NamedTuple):
    """200 prompts, one group of 8 candidates each; the law of the reward depends on the prompt's features."""

    feature: Tensor
    """(200, 4)"""
    reward: Tensor
    """(200, 8)"""
    location: Tensor
    """(200, 1)"""
    scale: Tensor
    """(200, 1)"""


def prompts(seed: int) -> Prompts:
    """Normal rewards: no logistic mixture is quite right."""
    rng = torch.Generator().manual_seed(seed)
    feature_BD = torch.randn(200, 4, generator=rng, dtype=torch.float64)
    location_B1 = torch.sin(2 * feature_BD[:, :1]) + feature_BD[:, 1:2] / 2
    scale_B1 = torch.exp(0.4 * feature_BD[:, 2:3])
    noise_BN = torch.randn(200, 8, generator=rng, dtype=torch.float64)
    return Prompts(feature_BD, location_B1 + scale_B1 * noise_BN, location_B1, scale_B1)


def normal_log_quantile(of: Prompts) -> Tensor:
    log_p_BN: Tensor = torch.special.log_ndtr((of.reward - of.location) / of.scale)
    return log_p_BN


def trained(head: nn.Module, loss: Callable[[], Tensor], steps: int = 100) -> None:
    descent = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.3)
    for _ in range(steps):
        descent.zero_grad()
        loss().mean().backward()
        descent.step()


def law_head_by_likelihood(seen: Prompts) -> Callable[[Prompts], Tensor]:
    head = learned.RewardLawHead(4, hidden=32).double()
    trained(head, lambda: learned.negative_log_likelihood(head(seen.feature), seen.reward))
    return lambda of: head(of.feature).log_odds(of.reward)


def law_head_by_cross_entropy(seen: Prompts) -> Callable[[Prompts], Tensor]:
    head, label_BN = learned.RewardLawHead(4, hidden=32).double(), one_group(learned.mid_rank_label, seen)
    trained(head, lambda: learned.quantile_cross_entropy(head(seen.feature).log_odds(seen.reward), label_BN))
    return lambda of: head(of.feature).log_odds(of.reward)


def law_head_on_scores(seen: Prompts) -> Callable[[Prompts], Tensor]:
    head, pool_M = learned.RewardLawHead(4, hidden=32).double(), seen.reward.flatten()
    score_BN = learned.pooled_rank_score(seen.reward, pool_M)
    trained(head, lambda: learned.negative_log_likelihood(head(seen.feature), score_BN))
    return lambda of: head(of.feature).log_odds(learned.pooled_rank_score(of.reward, pool_M))


def quantile_head(seen: Prompts) -> Callable[[Prompts], Tensor]:
    head, label_BN = learned.QuantileHead(5, hidden=32).double(), one_group(learned.mid_rank_label, seen)
    trained(head, lambda: learned.quantile_cross_entropy(head(prompt_and_reward(seen)), label_BN), steps=300)
    return lambda of: head(prompt_and_reward(of))


def prompt_and_reward(of: Prompts) -> Tensor:
    feature_BND = of.feature[:, None].expand(-1, of.reward.shape[1], -1)
    return torch.cat((feature_BND, of.reward[..., None]), dim=-1)


def one_group(estimate: Callable[[Standing], Tensor], of: Prompts) -> Tensor:
    return estimate(standing_among_others(of.reward))


def squared_error(estimate_BN: Tensor, truth_BN: Tensor) -> float:
    return (estimate_BN - truth_BN).square().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "learn", [law_head_by_likelihood, law_head_by_cross_entropy, law_head_on_scores, quantile_head]
)
@pytest.mark.parametrize("seed", range(3))
def test_learned_quantiles_err_less_than_those_counted_in_one_group(learn, seed):
    """On the candidates of its own prompts, and on those of prompts that it never saw."""
    torch.manual_seed(seed)
    seen, unseen = prompts(seed), prompts(100 + seed)
    log_odds = learn(seen)
    for of in (seen, unseen):
        truth_BN = normal_log_quantile(of)
        counted = squared_error(one_group(quantiles.log_quantile_harmonic, of), truth_BN)
        assert squared_error(learned.log_quantile(log_odds(of)).detach(), truth_BN) < counted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_mid_rank_quantiles_of_tied_rewards_are_learned_too(seed):
    """Rewards rounded to whole numbers: the truth is the normal law up to ½ below, plus half of what rounds to it."""
    torch.manual_seed(seed)
    seen, unseen = (of._replace(reward=of.reward.round()) for of in (prompts(seed), prompts(100 + seed)))
    log_odds = law_head_by_cross_entropy(seen)
    for of in (seen, unseen):
        edges = [(of.reward + step - of.location) / of.scale for step in (-0.5, 0.5)]
        truth_BN = ((torch.special.ndtr(edges[0]) + torch.special.ndtr(edges[1])) / 2).log()
        counted = squared_error(one_group(quantiles.log_quantile_harmonic_mid, of), truth_BN)
        assert squared_error(learned.log_quantile(log_odds(of)).detach(), truth_BN) < counted


@pytest.mark.slow
def test_on_scores_an_increasing_transform_changes_nothing():
    """Trained on r and on e^r from the same start: the same log-odds, bit for bit. On raw rewards they differ."""
    seen = prompts(7)
    transformed = seen._replace(reward=seen.reward.exp())
    for learn, is_same in [(law_head_on_scores, True), (law_head_by_likelihood, False)]:
        log_odds = []
        for of in (seen, transformed):
            torch.manual_seed(0)
            log_odds.append(learn(of)(of).detach())
        assert torch.equal(*log_odds) == is_same


# --- refusals --------------------------------------------------------------------------------------------


def test_shapes_that_would_broadcast_are_refused():
    law = law_of([1.0], [0.0], [1.0])
    with pytest.raises(ValueError, match="a row of rewards"):
        law.log_odds(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a row of rewards"):
        law.log_density(torch.zeros(1))
    with pytest.raises(ValueError, match="one shape"):
        learned.quantile_cross_entropy(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="one row"):
        learned.pooled_rank_score(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one row"):
        learned.pooled_rank_score(torch.zeros(2, 3), torch.zeros(0))


def test_what_is_no_share_or_no_number_is_refused():
    with pytest.raises(ValueError, match="share"):
        learned.quantile_cross_entropy(torch.zeros(1, 1), torch.tensor([[1.5]]))
    with pytest.raises(ValueError, match="finite"):
        law_of([1.0], [0.0], [1.0]).log_odds(torch.tensor([[float("nan")]]))


@pytest.mark.parametrize("floor", [0.0, 1.0, -float("inf"), float("nan")])
def test_a_floor_that_is_none_is_refused(floor):
    with pytest.raises(ValueError, match="floor"):
        learned.log_quantile(torch.zeros(1, 1), floor=floor)

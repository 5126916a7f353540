"""What best-of-n says next, against enumeration; the law that a critic learns, against integrals and against a language
model whose completions can be listed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import log_ndtr
from scipy.stats import norm, truncnorm
from torch import Tensor

from bon_algos import order
from bon_algos.prefix_values import (
    LEAST_LOG_SCALE,
    PrefixCritic,
    RankLaw,
    guided_logprobs,
    log_mean_tilt,
    negative_log_likelihood,
    normal_scores,
)
from tests.bon_algos.test_offline_bond import PAIRS, REWARD_9, logits


def exact_values(reference_43: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """log V after each first token, (3,), and after each second one, (3, 3): E[π_BoN/π_ref] of what they begin."""
    first_3, second_33 = reference_43[0], reference_43[1:]
    law_33 = (first_3[:, None] + second_33).exp()
    best_33 = torch.tensor(order.best_of_n_law(law_33.flatten().numpy(), REWARD_9, n)).reshape(3, 3)
    tilt_33 = best_33 / law_33
    return (second_33.exp() * tilt_33).sum(-1).log(), tilt_33.log()


@pytest.mark.parametrize("n", [2, 3, 16])
def test_conditionals_of_exact_values_are_best_of_n(n):
    """Over all nine completions, whatever ties; the values of all tokens known."""
    reference_43 = logits(2).log_softmax(-1)
    after_first_3, after_second_33 = exact_values(reference_43, n)
    every_token = torch.arange(3)
    first_13, value_1 = guided_logprobs(reference_43[:1], after_first_3[None], every_token[None])
    second_33, value_3 = guided_logprobs(reference_43[1:], after_second_33, every_token.expand(3, 3))
    best_9 = order.best_of_n_law((reference_43[0][:, None] + reference_43[1:]).exp().flatten().numpy(), REWARD_9, n)
    np.testing.assert_allclose((first_13[0][:, None] + second_33).exp().flatten(), best_9, rtol=1e-12)
    assert float(value_1) == pytest.approx(0, abs=1e-12)  # of nothing said yet
    torch.testing.assert_close(value_3, after_first_3)


def test_what_is_not_valued_keeps_its_odds_to_the_rest():
    """Two of four tokens valued: the other two together keep the odds that the reference gave them."""
    reference_14 = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    guided_14, value_1 = guided_logprobs(reference_14, torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[1, 0]]))
    value = (0.3 * 3 + 0.4) / 0.7
    assert float(value_1.exp()) == pytest.approx(value)
    expected = np.array([0.4 / value, 0.9 / value, 0.2, 0.1])
    np.testing.assert_allclose(guided_14[0].exp(), expected / expected.sum(), rtol=1e-6)


@pytest.mark.parametrize(("n", "most"), [(2, 1e-6), (16, 1e-4), (256, 2e-3), (4096, 2e-2)])
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 1.6])
@pytest.mark.parametrize("mean", [-1.0, 0.0, 1.0, 2.0])
def test_the_mean_tilt_is_the_integral(n, most, scale, mean):
    def density(z):
        return n * math.exp((n - 1) * log_ndtr(z)) * norm.pdf(z, mean, scale)

    places = [mean - 3 * scale, mean, mean + 3 * scale]
    expected = quad(density, mean - 12 * scale, mean + 12 * scale, limit=400, points=places)[0]
    law = RankLaw(torch.tensor(mean).double(), torch.tensor(scale).double().log())
    if expected > 1e-5:
        assert float(log_mean_tilt(law, n)) == pytest.approx(math.log(expected), abs=most)


def test_scores_are_normal_by_rank_and_ties_share_one():
    scores = normal_scores(torch.tensor([[3.0, 1.0, 2.0, 2.0]]))
    np.testing.assert_allclose(scores.score_BN[0], norm.ppf([7 / 8, 1 / 8, 1 / 2, 1 / 2]), atol=1e-12)
    reward_1M = torch.randn(1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(normal_scores(reward_1M).score_BN, normal_scores(reward_1M.exp()).score_BN)
    assert not normal_scores(torch.zeros(1, 5)).score_BN.any()


def test_a_level_of_ties_stands_for_all_its_ranks():
    """30 of 100 pass, counted without the candidate itself: a standard normal number among the 29 % at the top but for
    half of a hundredth."""
    scores = normal_scores(torch.tensor([[0.0] * 70 + [1.0] * 30]))
    below, above = norm.ppf([0.705, 0.995])
    density = truncnorm(below, above)
    assert float(scores.score_BN[0, -1]) == pytest.approx(density.mean())
    assert float(scores.level_variance_BN[0, -1]) == pytest.approx(density.var())
    assert not normal_scores(torch.arange(4.0)[None]).level_variance_BN.any()


@pytest.mark.parametrize("num_candidates", [2, 64, 20000])
def test_scores_and_what_is_within_them_are_standard_normal_together(num_candidates):
    """Half of all tie in pairs, and the last tenth altogether."""
    places = torch.arange(num_candidates)
    rewards = torch.where(places % 4 < 2, places // 2 * 2, places).clamp(max=num_candidates * 9 // 10)
    scores = normal_scores(rewards[None].double())
    assert float(scores.score_BN.mean()) == pytest.approx(0, abs=0.03)
    if num_candidates > 2:
        assert float((scores.score_BN.square() + scores.level_variance_BN).mean()) == pytest.approx(1, abs=0.05)
    assert scores.level_variance_BN.min() >= 0
    assert scores.error_variance_BN.isfinite().all()


def test_a_score_varies_as_said_when_its_prompt_is_drawn_again():
    """A candidate at the reference's quantile .7 among 255 others, of whom so many are below that it beats 179; and one
    of three in ten that pass."""
    generator = np.random.default_rng(0)
    said = normal_scores(torch.arange(256.0)[None]).error_variance_BN[0, 179]
    scores = norm.ppf((generator.binomial(255, 0.7, 4000) + 0.5) / 256)
    assert float(said) == pytest.approx(scores.var(), rel=0.1)
    passing = normal_scores(torch.tensor([[0.0] * 180 + [1.0] * 76])).error_variance_BN[0, -1]
    failed = generator.binomial(255, 0.7, 400)
    drawn = [normal_scores((torch.arange(256)[None] >= some).double()).score_BN[0, -1] for some in failed]
    assert float(passing) == pytest.approx(np.var(drawn), rel=0.2)


def test_the_likelihood_is_the_normal_one_of_law_and_estimate_together():
    law, score_T, error_T = RankLaw(*torch.tensor([[0.3, -1.0], [0.2, -0.7]])), [1.0, -2.0], [0.0, 0.4]
    spread_T = np.sqrt(law.log_scale.exp().numpy() ** 2 + error_T)
    expected = -norm.logpdf(score_T, law.mean, spread_T) - math.log(2 * math.pi) / 2
    actual = negative_log_likelihood(law, torch.tensor(score_T), torch.zeros(2), torch.tensor(error_T))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_likelihood_over_a_level_is_the_mean_over_its_ranks():
    """Of so many scores that have the mean and the variance within."""
    law, ranks = RankLaw(*torch.tensor([[0.3], [-0.4]])), torch.tensor([0.2, 0.9, 1.3])
    nothing = torch.zeros(3)
    single = negative_log_likelihood(RankLaw(*(one.expand(3) for one in law)), ranks, nothing, nothing).mean()
    level = negative_log_likelihood(law, ranks.mean()[None], ranks.var(correction=0)[None], nothing[:1])
    assert float(level) == pytest.approx(float(single), rel=1e-6)


@pytest.mark.parametrize("variances", [([-0.1], [0.0]), ([0.0], [-0.1])])
def test_a_variance_below_zero_is_refused(variances):
    with pytest.raises(ValueError, match="negative"):
        negative_log_likelihood(RankLaw(*torch.zeros(2, 1)), torch.zeros(1), *map(torch.tensor, variances))


# --- how far from best-of-n a critic that knows everything leads -----------------------------------------


def led_by_a_critic(reference_43: Tensor, rewards: list[float], n: int) -> np.ndarray:
    """The policy that a critic with the best normal law of every prefix stands for, (9,): the loss is least where
    means and variances are those of the scores, of as many candidates as tell them exactly."""
    law_33 = (reference_43[0][:, None] + reference_43[1:]).exp()
    count_9 = (40_000 * law_33.flatten()).round().long()
    scores = normal_scores(torch.tensor(rewards).repeat_interleave(count_9)[None])
    of_each = count_9.cumsum(0) - 1
    score_33, within_33 = (of_1N[0, of_each].reshape(3, 3) for of_1N in scores[:2])
    second_33 = reference_43[1:].exp()
    mean_3 = (second_33 * score_33).sum(-1)
    variance_3 = (second_33 * (score_33.square() + within_33)).sum(-1) - mean_3.square()
    after_first_3, after_second_33 = (
        log_mean_tilt(RankLaw(mean, (variance.log() / 2).clamp(min=LEAST_LOG_SCALE)), n)
        for mean, variance in ((mean_3, variance_3), (score_33, within_33))
    )
    every_token = torch.arange(3)
    first_13, _ = guided_logprobs(reference_43[:1], after_first_3[None], every_token[None])
    then_33, _ = guided_logprobs(reference_43[1:], after_second_33, every_token.expand(3, 3))
    return (first_13[0][:, None] + then_33).exp().flatten().numpy()


@pytest.mark.parametrize(("n", "most", "most_where_binary"), [(2, 0.01, 0.001), (4, 0.01, 0.003), (16, 0.35, 0.08)])
def test_a_critic_that_knows_everything_leads_so_near_to_best_of_n(n, most, most_where_binary):
    """Forward KL in nats; what a normal law of the rank leaves where a prefix has three ends. Of rewards that pass
    or not, 2, 6 or 7 of the nine completions pass, between 2 % and 94 % of the reference's draws."""
    for seed in range(6):
        reference_43 = logits(seed).log_softmax(-1)
        law_9 = (reference_43[0][:, None] + reference_43[1:]).exp().flatten().numpy()
        binary = [(least, most_where_binary) for least in (2.0, 3.0, 6.0)]
        for least, allowed in ((None, most), *binary):
            rewards = REWARD_9 if least is None else [float(reward >= least) for reward in REWARD_9]
            best_9 = order.best_of_n_law(law_9, rewards, n)
            assert (best_9 * np.log(best_9 / led_by_a_critic(reference_43, rewards, n))).sum() < allowed


def test_a_critic_sees_what_was_said_and_nothing_that_follows():
    torch.manual_seed(0)
    critic = PrefixCritic(16)
    hidden_NLD, said_NLD = torch.randn(2, 1, 6, 16)
    state_NLS = critic.states(hidden_NLD, said_NLD)
    for changed in ((hidden_NLD, said_NLD.clone()), (hidden_NLD.clone(), said_NLD)):
        changed[0][:, 3] += torch.randn(16)
        changed[1][:, 3] += torch.randn(16)
        other_NLS = critic.states(*changed)
        assert torch.equal(other_NLS[:, :3], state_NLS[:, :3])
        assert all((other_NLS[:, place] != state_NLS[:, place]).any() for place in (3, 4, 5))


def test_the_pairs_are_all_completions():
    """What `exact_values` takes for granted."""
    assert [(a, b) for a in range(3) for b in range(3)] == PAIRS

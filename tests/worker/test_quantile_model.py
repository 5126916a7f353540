"""Quantiles learned across prompts: nearer to the truth than what one small group can count, ties or none."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from bon_algos.quantiles import log_quantile_harmonic_mid, standing_among_others
from tests.worker.drawn import pool
from worker.errors import JobFailed
from worker.quantile_model import judged_log_quantiles, learned_log_quantiles, with_learned_quantiles

NUM_PROMPTS, NUM_CANDIDATES = 160, 6


def world(seed):
    """Prompts whose rewards are normal about a mean and with a spread that their features tell; and the truth.

    (features, rewards, true log-quantiles)
    """
    draw = np.random.default_rng(seed)
    feature = draw.normal(size=(NUM_PROMPTS, 5))
    mean, spread = 2 * feature[:, :1], np.exp(0.4 * feature[:, 1:2])
    standard = draw.normal(size=(NUM_PROMPTS, NUM_CANDIDATES))
    truth = np.array([[math.log(0.5 * math.erfc(-z / math.sqrt(2))) for z in row] for row in standard])
    return torch.from_numpy(feature), mean + spread * standard, truth


def error_of(estimate, truth):
    """Of exp(log-quantile): what matters is where a reward stands, not how deep below the floor it is."""
    return float(np.square(np.exp(np.array(estimate)) - np.exp(truth)).mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_other_prompts_tell_more_than_five_other_candidates_do(seed):
    feature, reward, truth = world(seed)
    learned = learned_log_quantiles(feature, reward.tolist(), seed)
    counted = log_quantile_harmonic_mid(standing_among_others(torch.from_numpy(reward)))
    assert error_of(learned, truth) < 0.7 * error_of(counted.numpy(), truth)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_head_on_prompt_and_completion_tells_more_than_five_other_candidates_do(seed):
    """A completion is told by how far it is above its prompt's mean, which says nothing of its reward without the
    spread that the prompt tells."""
    feature, reward, truth = world(seed)
    above = reward - 2 * feature[:, :1].numpy()
    prompt_TD = feature.repeat_interleave(NUM_CANDIDATES, dim=0)
    feature_TD = torch.cat((prompt_TD, torch.from_numpy(above.reshape(-1, 1))), dim=-1)
    judged = judged_log_quantiles(feature_TD, reward.tolist(), seed)
    counted = log_quantile_harmonic_mid(standing_among_others(torch.from_numpy(reward)))
    assert error_of(judged, truth) < 0.7 * error_of(counted.numpy(), truth)


def test_a_law_is_asked_of_prompts_and_a_head_of_prompts_with_their_completions():
    pools = [pool(number, [0.0, 1.0, 2.0]) for number in range(8)]
    asked: dict[str, list[tuple[int, ...]]] = {}

    def features(kind, sequences):
        asked[kind] = [tuple(ids) for ids in sequences]
        return torch.zeros(len(sequences), 2)

    for kind in ("learned_law", "learned_head"):
        told = with_learned_quantiles(pools, partial(features, kind), kind, n=16, seed=0)
        assert all(len(one.log_quantiles or ()) == 3 for one in told)
    assert asked["learned_law"] == [one.prompt_ids for one in pools]
    assert asked["learned_head"] == [(*one.prompt_ids, *own.token_ids) for one in pools for own in one.candidates]


@pytest.mark.slow
def test_only_the_order_of_rewards_counts_and_the_seed_settles_the_rest():
    feature, reward, _ = world(0)
    learned = learned_log_quantiles(feature, reward.tolist(), 3)
    assert learned_log_quantiles(feature, (reward**3).tolist(), 3) == learned
    assert learned_log_quantiles(feature, reward.tolist(), 4) != learned


@pytest.mark.slow
def test_groups_may_differ_in_size_and_rewards_may_tie():
    """Binary rewards that the features tell: a wrong answer's mid-rank is half of P(wrong), a right one's 1 less half
    of P(right). The one, log-quantiles rise with P; the other, they are those of the other prompts alike."""
    draw = np.random.default_rng(1)
    is_easy = draw.integers(0, 2, 200)
    probability = np.where(is_easy, 0.9, 0.2)
    rewards = [(draw.random(4 + i % 3) < probability[i]).astype(float).tolist() for i in range(200)]
    learned = learned_log_quantiles(torch.from_numpy(is_easy[:, None].astype(float)), rewards, 0)
    for easy, p in ((1, 0.9), (0, 0.2)):
        of_prompts = [i for i in range(200) if is_easy[i] == easy]
        found = {}
        for right in (0.0, 1.0):
            told = [math.exp(q) for i in of_prompts for q, r in zip(learned[i], rewards[i], strict=True) if r == right]
            found[right] = np.mean(told)
        assert found[0.0] == pytest.approx((1 - p) / 2, abs=0.08)
        assert found[1.0] == pytest.approx(1 - p / 2, abs=0.08)


@pytest.mark.slow
def test_where_rewards_tie_levels_are_counted_for_more_than_best_of_two():
    """Four of eight rewards of a prompt tie: their level is (½, 1] of what is counted, whatever the law says."""
    feature = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3)))
    tied, untied = [0.0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.0, 9.0], [float(k) for k in range(8)]
    pools = [pool(number, tied if number % 2 else untied) for number in range(8)]
    of_best_of_16 = with_learned_quantiles(pools, lambda _: feature, "learned_law", n=16, seed=0)
    for number, one in enumerate(of_best_of_16):
        assert (one.levels is None) == (number % 2 == 0)
        assert (one.log_quantiles is None) == (number % 2 == 1)
    assert of_best_of_16[1].levels == ((0, 1 / 8), (1 / 8, 1 / 4), (1 / 4, 3 / 8), (3 / 8, 1 / 2), *[(1 / 2, 1)] * 4)
    # for n = 2 a level's middle is all that counts, and the law knows it better
    of_best_of_2 = with_learned_quantiles(pools, lambda _: feature, "learned_law", n=2, seed=0)
    assert all(one.log_quantiles is not None for one in of_best_of_2)


def test_too_few_prompts_are_refused():
    with pytest.raises(JobFailed, match="at least 8 prompts"):
        learned_log_quantiles(torch.zeros(7, 2), [[0.0, 1.0]] * 7, 0)

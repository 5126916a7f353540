"""The demo's estimates against arithmetic by hand, exact enumeration and known laws."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonsai.demo import measure
from bonsai.generation_replies import Choice


def choice(text: str, reward: float | None, *, finish_reason: str = "stop", tokens: int = 3) -> Choice:
    return Choice(text=text, reward=reward, finish_reason=finish_reason, tokens=tokens)


def pool(reward: list[list[float]], gold: list[list[float]] | None = None) -> measure.Pool:
    """A pool of complete completions of three tokens."""
    reward_BM = np.array(reward)
    gold_BM = reward_BM if gold is None else np.array(gold)
    prompts = tuple(f"prompt {row}" for row in range(len(reward)))
    return measure.Pool(
        prompts, reward_BM, gold_BM, np.ones(reward_BM.shape, dtype=bool), np.full(reward_BM.shape, 3.0)
    )


def test_best_of_two_by_hand():
    # the pairs of 1, 2, 4: {1,2} -> 2, {1,4} -> 4, {2,4} -> 4; mean 10/3. Of 5, 5, 5: always 5.
    value_BM = np.array([[4.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    assert measure.best_of_k(value_BM, value_BM, 2) == pytest.approx([10 / 3, 5])


def test_the_value_follows_the_order_and_not_itself():
    """Selecting by one number and paying another is how best-of-n loses gold reward."""
    order_BM = np.array([[1.0, 2.0, 3.0]])
    gold_BM = np.array([[9.0, 5.0, 0.0]])
    assert measure.best_of_k(gold_BM, order_BM, 3) == pytest.approx([0.0])
    assert measure.best_of_k(gold_BM, order_BM, 2) == pytest.approx([(5 + 0 + 0) / 3])


@given(st.lists(st.integers(0, 4), min_size=2, max_size=7), st.integers(1, 7))
def test_best_of_k_is_the_mean_over_all_subsets(levels, k):
    k = min(k, len(levels))
    reward_BM = np.array([levels], dtype=float)
    subsets = list(combinations(levels, k))
    assert measure.best_of_k(reward_BM, reward_BM, k) == pytest.approx([sum(map(max, subsets)) / len(subsets)])


@pytest.mark.parametrize("much", [9.0, 1e300])
def test_a_truncated_completion_is_served_only_where_nothing_is_complete(much):
    candidates = [
        [choice("fine.", 1.0), choice("cut off", much, finish_reason="length")],
        [choice("cut", 2.0, finish_reason="length"), choice("also cut", 3.0, finish_reason="length")],
    ]
    drawn = measure.pool_of(["a", "b"], candidates, lambda prompt, text: 0.0)
    assert measure.best_of_k(drawn.reward, drawn.order, 2) == pytest.approx([1.0, 3.0])


def test_gold_reward_is_asked_for_the_prompt_of_each_completion():
    candidates = [[choice("x", 1.0)], [choice("y", 2.0)]]
    drawn = measure.pool_of(["a", "b"], candidates, lambda prompt, text: {"ax": 10.0, "by": 20.0}[prompt + text])
    assert drawn.gold.tolist() == [[10.0], [20.0]]


def test_a_pool_is_cut_to_the_prompt_with_the_fewest_scores():
    one_lost = [[choice("x", 1.0)] * 50, [choice("y", None), *[choice("y", 2.0)] * 49]]
    drawn = measure.pool_of(["a", "b"], one_lost, lambda prompt, text: 0.0)
    assert drawn.draws == 49


def test_a_pool_that_lost_many_rewards_is_refused():
    with pytest.raises(ValueError, match="5 of 20 candidates have no reward"):
        measure.pool_of(["a"], [[choice("x", None)] * 5 + [choice("x", 1.0)] * 15], lambda prompt, text: 0.0)


def test_win_rate_of_a_better_policy_by_hand():
    # 2 and 4 against 1, 2, 3: 2 wins once and ties once, (1 + 1/2)/3; 4 wins all three. One draw: mean of both.
    both = measure.win_rate_of_best(pool([[2.0, 4.0]] * 2), pool([[1.0, 2.0, 3.0]] * 2), 1)
    assert both.mean == pytest.approx((1.5 / 3 + 1) / 2)
    best = measure.win_rate_of_best(pool([[2.0, 4.0]] * 2), pool([[1.0, 2.0, 3.0]] * 2), 2)
    assert best.mean == pytest.approx(1.0)


def test_best_of_16_meets_its_law_on_draws_without_ties():
    """Win rate 16/17, and the KL of the pool's law just under log 16 − 15/16 = 1.8351 nats."""
    drawn = pool(np.random.default_rng(0).normal(size=(400, 64)).tolist())
    quality = measure.quality_of_best(drawn, 16)
    assert quality.win_rate is not None
    assert quality.kl_policy_reference is not None
    assert quality.win_rate.low < 16 / 17 < quality.win_rate.high
    assert 1.80 < quality.kl_policy_reference.mean < math.log(16) - 15 / 16


def test_a_ratio_by_hand():
    # gains 1, 2, 3 of 2, 4, 6: every prompt keeps exactly half, so nothing is uncertain
    exact = measure.ratio_interval(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    assert (exact.mean, exact.low, exact.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_of_a_ratio_covers_it():
    """200 experiments of 50 prompts; true ratio 0.9. 95 % cover it: 190 ± 3.1 at one standard deviation."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        target_B = rng.normal(2.0, 0.5, size=50)
        interval = measure.ratio_interval(0.9 * target_B + rng.normal(0, 0.4, size=50), target_B)
        covered += interval.low <= 0.9 <= interval.high
    assert covered >= 180


def test_no_share_of_a_gain_that_does_not_exist():
    with pytest.raises(ValueError, match="gains nothing"):
        measure.ratio_interval(np.array([1.0, 1.0]), np.array([0.0, -1.0]))


def test_the_comparison_is_paired_by_prompt():
    """Prompts that differ by thousands do not widen the interval of a difference that is 1 for every prompt."""
    reference = pool([[0.0, 2.0], [1000.0, 1002.0], [5000.0, 5002.0]])
    policy = pool([[2.0, 2.0], [1002.0, 1002.0], [5002.0, 5002.0]])
    result = measure.compare(policy, reference, 2)
    # one sample: 1 above the lower draw; best-of-2: 2 above it; the policy: 2 above it
    assert (result.reward_gain.mean, result.reward_gain.low) == pytest.approx((1.0, 1.0))
    assert result.best_of_n_gain.mean == pytest.approx(1.0)
    assert result.gain_share.mean == pytest.approx(1.0)


def test_pools_of_different_prompts_are_not_compared():
    one, other = pool([[1.0], [2.0]]), pool([[1.0], [2.0]])._replace(prompts=("x", "y"))
    with pytest.raises(ValueError, match="different prompts"):
        measure.compare(one, other, 1)


def peaked(reward_BM: np.ndarray) -> measure.Pool:
    """Gold = reward up to 1, falling beyond it: more selection helps first and hurts later."""
    return pool(reward_BM.tolist(), np.where(reward_BM < 1, reward_BM, 2 - reward_BM).tolist())


def test_the_curve_finds_where_gold_peaks():
    drawn = peaked(np.random.default_rng(2).normal(size=(100, 64)))
    curve = measure.curve_of(drawn, drawn)
    gold = [interval.mean for interval in curve.gold]
    assert curve.k[0] == 1
    assert curve.k[-1] == 64
    assert 1 < curve.peak < 64
    assert gold[curve.k.index(curve.peak)] == max(gold)
    assert curve.fall is not None
    assert curve.fall.mean == pytest.approx(max(gold) - gold[-1])
    assert all(a.mean < b.mean for a, b in pairwise(curve.reward))


def test_a_curve_that_still_rises_has_no_fall():
    drawn = pool(np.random.default_rng(3).normal(size=(20, 8)).tolist())
    curve = measure.curve_of(drawn, drawn)
    assert curve.peak == 8
    assert curve.fall is None


def test_a_few_prompts_carry_the_curve_on_from_the_level_of_all():
    """The few are a thousand points better than the others; the curve joins without a step all the same."""
    reward_BM = np.random.default_rng(4).normal(size=(40, 64)) + np.where(np.arange(40) < 10, 1000.0, 0.0)[:, None]
    curve = measure.curve_of(pool(reward_BM[:, :16].tolist()), pool(reward_BM[:10].tolist()))
    at = dict(zip(curve.k, (interval.mean for interval in curve.reward), strict=True))
    # best of 1 is worth 0 over the prompts' level of 250, best of 16 1.77, best of 64 2.37 (normal order statistics)
    assert at[1] == pytest.approx(250, abs=0.2)
    assert at[16] == pytest.approx(251.77, abs=0.2)
    assert at[64] == pytest.approx(252.37, abs=0.3)


def test_fewer_prompts_are_less_sure():
    """What best-of-k adds beyond the draws of most prompts widens its interval, never narrows it."""
    reward_BM = np.random.default_rng(5).normal(size=(40, 64))
    curve = measure.curve_of(pool(reward_BM[:, :16].tolist()), pool(reward_BM[:10].tolist()))
    width = {k: interval.high - interval.low for k, interval in zip(curve.k, curve.reward, strict=True)}
    assert width[64] > width[16]

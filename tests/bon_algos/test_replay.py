"""Logged candidates under another reward model: by hand, against brute force and against scipy."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from bon_algos.contracts import Candidate
from bon_algos.replay import Reranked, compare, kendall_tau, reranked
from tests.service.records import group

REWARDS = st.lists(st.integers(-3, 3), min_size=2, max_size=7)


def rescored(old, new, prompt="p", complete=None):
    """A group of these old rewards, scored again."""
    filled = group([(reward, 2) for reward in old])
    if complete is not None:
        cut = [
            one if whole else one.model_copy(update={"finish_reason": "length"})
            for one, whole in zip(filled.candidates, complete, strict=True)
        ]
        filled = filled.model_copy(update={"candidates": tuple(cut)})
    return reranked(filled, prompt, dict(enumerate(new)))


def test_a_flip_costs_the_new_reward_now_and_the_old_one_then():
    """Old: 1 3 2 chooses the second, new: 5 2 4 the first. The new model loses 5 − 2, the old one 3 − 1."""
    one = rescored([1.0, 3.0, 2.0], [5.0, 2.0, 4.0])
    assert (one.old_winner, one.new_winner, one.is_flipped) == (1, 0, True)
    assert (one.regret_new, one.regret_old) == (3.0, 2.0)
    # Pairs: (1,3)/(5,2) against, (1,2)/(5,4) against, (3,2)/(2,4) against.
    assert one.rank_correlation == -1.0


def test_the_same_reward_model_flips_nothing():
    one = rescored([1.0, 3.0, 3.0], [1.0, 3.0, 3.0])
    assert (one.is_flipped, one.regret_new, one.regret_old) == (False, 0.0, 0.0)
    assert one.rank_correlation == pytest.approx(1.0)


def test_an_incomplete_candidate_does_not_win_under_either():
    one = rescored([9.0, 1.0, 2.0], [0.0, 9.0, 1.0], complete=[False, True, True])
    assert (one.old_winner, one.new_winner) == (2, 1)


def test_candidates_without_an_old_reward_are_left_out_and_a_missing_new_one_is_found_out():
    lost = Candidate(text="", token_ids=(), logprobs=(), failure="deadline")
    filled = group([(1.0, 1), (2.0, 1)])
    filled = filled.model_copy(update={"candidates": (filled.candidates[0], lost, filled.candidates[1])})
    one = reranked(filled, "p", {0: 7.0, 2: 6.0})
    assert (one.old_M.tolist(), one.new_M.tolist()) == ([1.0, 2.0], [7.0, 6.0])
    with pytest.raises(KeyError):
        reranked(filled, "p", {0: 7.0})
    with pytest.raises(ValueError, match="no rewards"):
        reranked(filled.model_copy(update={"candidates": (lost,)}), "p", {})


@given(st.data())
def test_kendalls_tau_is_scipys(data):
    first = data.draw(REWARDS)
    second = data.draw(st.lists(st.integers(-3, 3), min_size=len(first), max_size=len(first)))
    theirs = kendalltau(first, second).statistic
    ours = kendall_tau(first, second)
    assert (ours is None) == bool(np.isnan(theirs))
    assert ours is None or ours == pytest.approx(theirs)


def random_groups(rng, count=12, n=5):
    def rewards():
        return rng.integers(0, 4, n).astype(float)

    return [rescored(rewards(), rewards(), f"p{i % 4}", rng.random(n) < 0.8) for i in range(count)]


def test_the_curves_are_the_mean_over_all_ways_to_draw_k():
    """Every subset of k candidates is served by the rule of best-of-n; ties of the same group are averaged."""
    groups = random_groups(np.random.default_rng(3))
    found = compare(groups, [True] * len(groups))
    assert (found.n, found.curve_groups) == (5, len(groups))
    for point in found.curve:
        for name, by, value in (("old", "old_M", "old_M"), ("new", "new_M", "new_M"), ("new_by_old", "old_M", "new_M")):
            per_group = [brute_force(one, point.k, getattr(one, by), getattr(one, value)) for one in groups]
            assert getattr(point, name).mean == pytest.approx(mean_of_prompts(groups, per_group))


def test_a_groups_order_does_not_drown_in_another_groups_rewards():
    """Of q nothing is complete, and its old rewards are a digit apart beside p's 10^18: the second is served."""
    p, q = rescored([0.0, 1e18], [1.0, 1.0], "p"), rescored([1.0, 1.0 + 1e-9], [0.0, 4.0], "q", [False, False])
    assert [point.new_by_old.mean for point in compare([p, q], [True, True]).curve] == [(1 + 2) / 2, (1 + 4) / 2]


def brute_force(one: Reranked, k, chosen_by, value):
    served = []
    for subset in combinations(range(len(chosen_by)), k):
        eligible = [i for i in subset if one.is_complete_M[i]] or list(subset)
        highest = max(chosen_by[i] for i in eligible)
        served.append(fmean(value[i] for i in eligible if chosen_by[i] == highest))
    return fmean(served)


def mean_of_prompts(groups, values):
    by_prompt: dict[str, list[float]] = {}
    for one, value in zip(groups, values, strict=True):
        by_prompt.setdefault(one.prompt, []).append(value)
    return fmean(fmean(own) for own in by_prompt.values())


def test_a_prompt_counts_once_however_often_it_was_asked():
    """p: three groups that flip; q: one that does not. By prompts the share is (1 + 0)/2, by groups it would be 3/4."""
    flipping, standing = rescored([1.0, 2.0], [2.0, 1.0], "p"), rescored([1.0, 2.0], [1.0, 2.0], "q")
    found = compare([flipping] * 3 + [standing], [True] * 4)
    assert (found.groups, found.prompts, found.flips.mean) == (4, 2, 0.5)
    assert (found.regret_new.mean, found.regret_old.mean) == (0.5, 0.5)
    assert found.rank_correlation is not None
    assert found.rank_correlation.mean == 0.0


def test_a_curve_is_of_the_most_frequent_n_among_whole_groups():
    threes = [rescored([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], f"p{i}") for i in range(2)]
    twos = [rescored([1.0, 2.0], [1.0, 2.0], f"p{i}") for i in range(3)]
    assert compare(threes + twos, [True] * 5).n == 2
    found = compare(threes + twos, [True, True, True, False, False])
    assert (found.n, found.curve_groups, found.groups) == (3, 2, 5)
    without = compare(threes + twos, [False] * 5)
    assert (without.n, without.curve) == (None, ())


def test_without_any_order_there_is_no_rank_correlation():
    found = compare([rescored([1.0, 1.0], [1.0, 2.0], prompt) for prompt in "pq"], [True, True])
    assert found.rank_correlation is None


def test_one_prompt_has_no_interval():
    with pytest.raises(ValueError, match="at least two"):
        compare([rescored([1.0, 2.0], [1.0, 2.0])] * 3, [True] * 3)

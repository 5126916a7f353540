"""Ranks as candidates are served: what `CandidateGroup.best` says, whatever the rewards' scale."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon_algos.order import best_of_n_weights
from bon_algos.serving_order import serving_ranks, serving_ranks_of
from tests.worker import world

LARGE = st.sampled_from([0.0, -0.0, 1.0, 1.0 + 1e-9, -1e9, 1e12, -1e12, 1e300, -1e300, 5e-324, 1.7e308, -1.7e308])
DRAWS = st.lists(st.tuples(LARGE | st.none(), st.booleans()), min_size=1, max_size=9)
SMALL = st.lists(st.tuples(st.integers(-20, 20), st.booleans()), min_size=1, max_size=9)


def candidates(drawn):
    return [
        world.candidate(reward=reward, finish_reason="stop" if is_complete else "length")
        for reward, is_complete in drawn
    ]


def ranks(drawn):
    return serving_ranks(*map(list, zip(*drawn, strict=True))).tolist()


def test_ranks_by_hand():
    """Without a reward, then what is cut by its reward, then what is complete by its own; who ties, ties."""
    drawn = [(None, True), (7.0, True), (7.0, False), (9.0, False), (-2.0, True), (7.0, True), (None, False)]
    (found,) = serving_ranks_of(candidates(drawn))
    assert found.dtype == np.float64
    assert found.tolist() == [0, 4, 1, 2, 3, 4, 0]
    assert ranks(drawn[1:-1]) == [3, 0, 1, 2, 3]


@pytest.mark.parametrize("much", [1e9, 1e10, 1e300])
def test_no_reward_lifts_what_is_cut_above_what_is_complete(much):
    drawn = [(much, False), (-much, True), (0.0, True)]
    assert ranks(drawn) == [0, 1, 2]
    assert best_of_n_weights(ranks(drawn), 3).tolist() == [0, 0, 1]


def test_what_is_cut_keeps_its_order_to_the_last_digit():
    assert ranks([(1.0 + 1e-9, False), (1.0, False), (1.0, False), (math.nextafter(1.0, 0.0), False)]) == [2, 1, 1, 0]


@given(DRAWS)
def test_best_of_n_serves_the_first_of_the_highest_rank(drawn):
    group = world.group("g", [0], candidates=candidates(drawn))
    (found,) = serving_ranks_of(group.candidates)
    places = [i for i, one in enumerate(group.candidates) if one.reward is not None]
    assert group.best == max(places, key=lambda i: (found[i], -i), default=None)
    assert all(found[i] > 0 for i in places) or len(places) == len(drawn)


@given(SMALL)
def test_a_strictly_increasing_transform_changes_no_rank(drawn):
    plain = ranks(drawn)
    for transform in (math.exp, lambda reward: reward * 1e12, lambda reward: reward * 1e-12 - 1.0):
        assert ranks([(transform(reward), is_complete) for reward, is_complete in drawn]) == plain


@given(DRAWS, DRAWS)
def test_sides_are_ranked_as_one_pool(first, second):
    one, other = serving_ranks_of(candidates(first), candidates(second))
    (both,) = serving_ranks_of(candidates(first + second))
    assert [*one, *other] == both.tolist()
    assert sorted({*both}) == list(range(len({*both})))


def test_an_array_of_any_shape_is_one_pool():
    found = serving_ranks([[1.0, 2.0], [2.0, 9.0]], [[True, True], [True, False]])
    assert found.tolist() == [[1, 2], [2, 0]]
    assert [side.tolist() for side in serving_ranks_of([], candidates([(1.0, True)]))] == [[], [0.0]]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_reward_is_refused(wrong):
    with pytest.raises(ValueError, match="finite"):
        serving_ranks([wrong, 1.0], [True, False])
    with pytest.raises(ValueError, match="each candidate"):
        serving_ranks([1.0], [True, False])

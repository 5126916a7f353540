"""Who draws, of several policy engines: prompts that begin alike go to one, unless it has too much already."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.pool import MOST_OF_MEAN, PREFIX_TOKENS, choose

NAMES = ["policy-0", "policy-1", "policy-2"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 1000)), min_size=1, max_size=200), st.integers(1, 3))
def test_nobody_carries_more_than_the_stated_bound(requests: list[tuple[int, int]], num_replicas: int):
    """Whatever comes, and nothing ever ends: at most 1.25 times the mean, and two of the largest requests: the one
    that the bound allows, and the one that is added."""
    loads = [0] * num_replicas
    for prompt, cost in requests:
        loads[choose(NAMES[:num_replicas], loads, [prompt], cost)] += cost
    largest = max(cost for _, cost in requests)
    assert max(loads) <= MOST_OF_MEAN * sum(loads) / num_replicas + 2 * largest


@given(st.lists(st.integers(0, 10**6), min_size=PREFIX_TOKENS, max_size=PREFIX_TOKENS), st.integers(1, 1000))
def test_prompts_that_begin_alike_go_to_one_replica_while_it_may_take_them(begins: list[int], cost: int):
    first = choose(NAMES, [0, 0, 0], begins, cost)
    loads = [0, 0, 0]
    loads[first] = cost
    assert choose(NAMES, loads, [*begins, 7, 8, 9], cost) == first


def test_beyond_the_bound_the_least_loaded_draws():
    preferred = choose(NAMES, [0, 0, 0], [1], 100)
    least = (preferred + 1) % 3
    # The mean is 400: 1.25 · 400 and one request of 100 make 600, which may be carried; 601 may not.
    for carried, chosen in ((600, preferred), (601, least)):
        loads = [350, 350, 350]
        loads[preferred], loads[least] = carried, 1200 - carried - 350
        assert choose(NAMES, loads, [1], 100) == chosen


def test_the_beginnings_spread_and_a_replica_that_comes_takes_only_its_own():
    two = [choose(NAMES[:2], [0, 0], [i], 1) for i in range(3000)]
    three = [choose(NAMES, [0, 0, 0], [i], 1) for i in range(3000)]
    # Binomial: the standard deviation of a share is below 0.01.
    assert [three.count(i) / 3000 for i in range(3)] == pytest.approx([1 / 3] * 3, abs=0.05)
    assert all(after == before for before, after in zip(two, three, strict=True) if after != 2)

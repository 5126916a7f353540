"""When drawing stops: against the optimal rule by dynamic programming, and what the learned price earns."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bon_algos.reward_laws import LevelledLaw, learned_law
from bon_algos.stopping import LoggedDraws, Simulation, StoppingRule, learned_rules, stops_of

N, CAP = 8, 32
STOPS = stops_of(N, CAP)


def drawn(reward_BM, tokens=10.0) -> list[LoggedDraws]:
    return [LoggedDraws(row, np.full(row.size, tokens)) for row in np.asarray(reward_BM)]


def test_waves_are_quarters_of_n_and_then_halves():
    assert stops_of(16, 64) == (4, 8, 12, 16, 24, 32, 40, 48, 56, 64)
    assert stops_of(6, 10) == (1, 2, 3, 4, 5, 6, 9, 10)
    assert stops_of(1, 3) == (1, 2, 3)
    assert stops_of(8, 8) == (2, 4, 6, 8)


@given(st.integers(1, 128), st.integers(0, 128))
@settings(deadline=None)
def test_stops_ascend_from_a_quarter_to_the_cap(n, more):
    stops = stops_of(n, n + more)
    assert list(stops) == sorted(set(stops))
    assert (stops[0], stops[-1]) == (max(1, n // 4), n + more)
    assert n in stops


@pytest.mark.parametrize("price", [0.02, 0.1, 0.3, 0.8])
def test_with_one_known_law_and_single_draws_it_is_the_optimal_rule(price):
    """Dynamic programming over (drawn, best): going on is worth more than stopping exactly where the rule goes on."""
    level, mass, most, tokens = np.array([0.0, 0.5, 1.0, 2.5]), np.array([0.4, 0.3, 0.2, 0.1]), 9, 2.0
    law = LevelledLaw(level, mass[None, :])
    rule = StoppingRule(law, tuple(range(1, most + 1)), price, 1.0)

    @cache
    def going_on(count: int, best: float) -> float:
        """What is expected in the end, less the price of what is still drawn."""
        if count == most:
            return -math.inf
        outcomes = [max(best, float(one)) for one in level]
        expected = [float(p) * max(one, going_on(count + 1, one)) for p, one in zip(mass, outcomes, strict=True)]
        return sum(expected, -price * tokens)

    for count in range(1, most + 1):
        for best in map(float, level):
            is_enough = rule.is_enough([best] * count, tokens, count)
            assert is_enough == (going_on(count, best) < best)


def test_the_simulation_stops_where_a_request_would():
    """Played through wave by wave with what a request knows: the same number of draws."""
    rng = np.random.default_rng(0)
    law = learned_law(list(rng.normal(size=(100, N))))
    paths = [LoggedDraws(rng.normal(size=CAP), rng.integers(1, 40, CAP).astype(float)) for _ in range(50)]
    for path in paths[:10]:
        path.reward[rng.integers(0, CAP, 12)] = np.nan
    paths[0].reward[: STOPS[1]] = np.nan
    price = 0.004
    found = Simulation.of_paths(law, paths, STOPS).outcome(price)
    rule = StoppingRule(law, STOPS, price, 1.0)
    for path, count, served in zip(paths, found.drawn, found.reward, strict=True):
        by_hand = next(
            stop
            for stop in STOPS
            if rule.is_enough(
                path.reward[:stop][np.isfinite(path.reward[:stop])].tolist(), path.tokens[:stop].mean(), stop
            )
        )
        assert count == by_hand
        assert served == np.nanmax(path.reward[:count])
    assert found.drawn[0] > STOPS[1]  # nothing could be served before
    assert len(set(found.drawn)) > 3


@pytest.mark.parametrize("name", ["normal", "exponential", "right or wrong"])
def test_the_learned_price_earns_what_fixed_n_earns_for_fewer_tokens(name):
    laws = {
        "normal": lambda rng, shape: rng.normal(size=shape),
        "exponential": lambda rng, shape: rng.exponential(size=shape),
        "right or wrong": lambda rng, shape: (rng.random(shape) < rng.beta(0.5, 1, shape[0])[:, None]).astype(float),
    }
    rng = np.random.default_rng(2)
    rule = learned_rules(drawn(laws[name](rng, (300, N))), STOPS, [N])[N]
    fresh = laws[name](rng, (1500, CAP))
    played = Simulation.of_paths(rule.law, drawn(fresh), STOPS)
    own, fixed = played.outcome(rule.price), played.fixed(N)
    difference = own.reward - fixed.reward
    error = difference.std() / math.sqrt(difference.size)
    gain = fixed.reward.mean() - fresh[:, 0].mean()
    # The price comes from 300 prompts: a twelfth of the gain, and the noise of these 1,500.
    assert abs(difference.mean()) < gain / 12 + 3 * error
    assert own.tokens.mean() < 0.9 * fixed.tokens.mean()
    assert own.tokens.mean() / fixed.tokens.mean() == pytest.approx(rule.token_share, abs=0.12)


def test_a_larger_n_has_a_lower_price_and_one_within_the_first_wave_none():
    history = drawn(np.random.default_rng(3).normal(size=(120, N)))
    rules = learned_rules(history, STOPS, range(1, CAP + 1))
    prices = [rules[n].price for n in sorted(rules)]
    assert prices == sorted(prices, reverse=True)
    assert N in rules
    assert not {1, STOPS[0]} & rules.keys()
    assert all(rule.token_share < 1 for rule in rules.values())


def test_what_is_learned_is_the_same_every_time():
    history = drawn(np.random.default_rng(4).normal(size=(120, N)))
    first, second = (learned_rules(history, STOPS, [N])[N] for _ in range(2))
    assert (first.price, first.token_share) == (second.price, second.token_share)


def test_a_price_is_per_token():
    """Twice the tokens: half the price, the same draws."""
    rewards = np.random.default_rng(5).normal(size=(120, N))
    short, long = (learned_rules(drawn(rewards, tokens), STOPS, [N])[N] for tokens in (10.0, 20.0))
    assert long.price == pytest.approx(short.price / 2, rel=1e-6)
    assert long.token_share == pytest.approx(short.token_share)


def test_nothing_is_learned_from_groups_with_nothing_to_serve():
    with pytest.raises(ValueError, match="two groups"):
        learned_rules(drawn(np.full((10, N), np.nan)), STOPS, [N])

"""The highest win rate that any law has at its KL to the reference, and how near best-of-n comes to it."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import truncexpon

from bon_algos import order
from bon_algos.bonbon import optimal_tilt_kl, optimal_tilt_win_rate
from tests.bon_algos.vectors import kl

TILTS = [  # n, the c whose KL is that of best-of-n, its win rate, that of best-of-n, the gap
    (2, 2.288641, 0.675907, 0.666667, 0.009240),
    (4, 4.916908, 0.803996, 0.800000, 0.003996),
    (8, 9.054541, 0.889675, 0.888889, 0.000786),
    (16, 17.031899, 0.941287, 0.941176, 0.000110),
    (64, 65.007853, 0.984617, 0.984615, 0.000002),
]


@pytest.mark.parametrize(("n", "c", "win", "best_of_n", "gap"), TILTS)
def test_best_of_n_is_all_but_optimal(n, c, win, best_of_n, gap):
    matched = brentq(lambda c: optimal_tilt_kl(c) - order.kl_bound(n), 0, 100, xtol=1e-12)
    assert matched == pytest.approx(c, abs=6e-7)
    assert optimal_tilt_win_rate(matched) == pytest.approx(win, abs=6e-7)
    assert order.win_rate_bound(n) == pytest.approx(best_of_n, abs=6e-7)
    assert optimal_tilt_win_rate(matched) - order.win_rate_bound(n) == pytest.approx(gap, abs=6e-7)


@pytest.mark.parametrize("c", [0.02, 0.0999, 0.1, 0.1001, 0.5, 2.0, 9.0, 65.0])
def test_the_tilt_against_scipy(c):
    """1 − u under e^{cu} is the exponential of rate c cut at 1; KL to the uniform law = minus its entropy."""
    law = truncexpon(b=c, scale=1 / c)
    assert optimal_tilt_win_rate(c) == pytest.approx(1 - law.mean(), abs=1e-12)
    assert optimal_tilt_kl(c) == pytest.approx(-law.entropy(), abs=1e-12)


@pytest.mark.parametrize("c", [1e-100, 1e-9, 1e-3, 0.099, 0.101, 0.3, 3.0, 65.0, 700.0, 10_000.0])
def test_the_tilt_to_the_last_digits(c):
    """Against its own formulas with 400 digits, which no cancellation can eat."""
    with localcontext() as context:
        context.prec = 400
        exact = Decimal(c)
        power = exact.exp()
        win = ((exact - 1) * power + 1) / (exact * (power - 1))
        nats = exact * win - ((power - 1) / exact).ln()
    assert optimal_tilt_win_rate(c) == pytest.approx(float(win), rel=1e-14)
    assert optimal_tilt_kl(c) == pytest.approx(float(nats), rel=1e-12, abs=0)


def test_no_tilt_is_the_reference():
    assert optimal_tilt_win_rate(0.0) == 0.5
    assert optimal_tilt_kl(0.0) == 0.0


@given(st.integers(2, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_nothing_wins_more_at_the_same_kl(num_cells, seed):
    """Any density over equal cells of quantiles, against the tilt of its own KL."""
    density_K = np.random.default_rng(seed).dirichlet(np.full(num_cells, 0.7)) + 1e-12
    density_K /= density_K.sum()
    uniform_K = np.full(num_cells, 1 / num_cells)
    win = float(density_K @ (np.arange(num_cells) + 0.5) / num_cells)
    c = brentq(lambda c: optimal_tilt_kl(c) - kl(density_K, uniform_K), 0, 200)
    assert win <= optimal_tilt_win_rate(c) + 1e-9


@pytest.mark.parametrize("c", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("of_tilt", [optimal_tilt_win_rate, optimal_tilt_kl])
def test_a_tilt_out_of_range_is_refused(of_tilt, c):
    with pytest.raises(ValueError, match="c ≥ 0"):
        of_tilt(c)

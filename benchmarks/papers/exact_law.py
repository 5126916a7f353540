"""How near best-of-n is to the law that wins most at its KL, and what ties take off both.

Owns the experiment. Everything is enumerated but the estimate of KL, which has draws.

Dimension key:  K outcomes · P pools · M draws of one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np
from scipy.optimize import brentq

from benchmarks.claims import Claim, at_least, at_most
from benchmarks.papers.findings import Curve, Effort, Finding, fields_of
from bon_algos.bonbon import beta_star, optimal_tilt_kl, optimal_tilt_win_rate
from bon_algos.order import (
    kl_best_of_n_estimate,
    kl_best_of_n_reference,
    kl_bound,
    win_rate_best_of_n,
    win_rate_bound,
)

Tell = Callable[[float], None]
SIZES: Final = (2, 4, 8, 16)
NUM_OUTCOMES: Final = 4000
NUM_LEVELS: Final = 5
M: Final = 64
NUM_POOLS: Final[Mapping[Effort, int]] = {"quick": 50, "default": 200, "full": 1000}
LARGEST_GAP: Final = 0.0093
"""Of win rate, at n = 2 (BoNBoN, Theorem 1; algorithms.md 1.5)."""


class Law(NamedTuple):
    n: int
    win: float
    kl: float
    matched_tilt: float
    """c of the density e^(cu) that has best-of-n's KL."""
    tied_win: float
    tied_kl: float
    estimated_kl: float
    """Of the tied law from M draws, mean of pools; above the KL by design, and below the bound."""

    @property
    def gap(self) -> float:
        return optimal_tilt_win_rate(self.matched_tilt) - self.win


def law(effort: Effort, tell: Tell) -> Finding:
    laws = []
    for done, n in enumerate(SIZES, start=1):
        laws.append(_law_of(n, NUM_POOLS[effort]))
        tell(done / len(SIZES))
    return Finding(
        title="The law of best-of-n: its KL, its win rate, and the most that any law wins at that KL",
        source="BoNBoN (arXiv:2406.00832), Theorem 1; the bound on KL: arXiv:2401.01879",
        method=f"{NUM_OUTCOMES} equally likely outcomes that never tie, and the same with rewards on {NUM_LEVELS} "
        f"levels; by enumeration. Estimate: `kl_best_of_n_estimate` of {M} draws, mean of {NUM_POOLS[effort]} pools.",
        columns=(
            "n",
            "KL",
            "log n − (n−1)/n",
            "win rate",
            "n/(n+1)",
            "most at that KL",
            "its c",
            "β* of BoNBoN",
            "tied: KL",
            "tied: estimate of KL",
            "tied: win rate",
        ),
        rows=tuple(map(_row, laws)),
        claims=fields_of([claim for one in laws for claim in _claims(one)]),
        remarks=_remarks(laws),
        x_label="KL to the reference, nats",
        y_label="win rate",
        curves=_curves(laws),
    )


def _law_of(n: int, num_pools: int) -> Law:
    mass_K, reward_K = np.full(NUM_OUTCOMES, 1 / NUM_OUTCOMES), np.arange(NUM_OUTCOMES)
    tied_K = reward_K * NUM_LEVELS // NUM_OUTCOMES
    pools_PM = np.random.default_rng(19).choice(tied_K, (num_pools, M))
    kl = kl_best_of_n_reference(mass_K, reward_K, n)
    return Law(
        n,
        win_rate_best_of_n(mass_K, reward_K, n),
        kl,
        brentq(lambda c: optimal_tilt_kl(c) - kl, 0.0, 10.0 * n),
        win_rate_best_of_n(mass_K, tied_K, n),
        kl_best_of_n_reference(mass_K, tied_K, n),
        float(np.mean([kl_best_of_n_estimate(pool_M, n) for pool_M in pools_PM])),
    )


def _row(one: Law) -> tuple[str, ...]:
    most, tied = optimal_tilt_win_rate(one.matched_tilt), (one.tied_kl, one.estimated_kl, one.tied_win)
    values = (one.kl, kl_bound(one.n), one.win, win_rate_bound(one.n), most, one.matched_tilt, beta_star(one.n), *tied)
    return (str(one.n), *(f"{value:.4f}" for value in values))


def _claims(one: Law) -> list[Claim]:
    n = one.n
    return [
        at_most(f"n = {n}: win rate short of the most at its KL", one.gap, LARGEST_GAP),
        at_least(f"n = {n}: win rate short of the most at its KL, which is a bound", one.gap, 0.0),
        at_most(f"n = {n}, tied: KL less its bound", one.tied_kl - kl_bound(n), 0.0),
        at_most(f"n = {n}, tied: win rate less its bound", one.tied_win - win_rate_bound(n), 0.0),
        at_least(f"n = {n}, tied: estimate of KL less KL", one.estimated_kl - one.tied_kl, 0.0),
        at_most(f"n = {n}, tied: estimate of KL less the bound", one.estimated_kl - kl_bound(n), 0.0),
    ]


def _curves(laws: list[Law]) -> tuple[Curve, ...]:
    tilts = np.linspace(0.0, 24.0, 97)
    most = tuple(map(optimal_tilt_kl, tilts)), tuple(map(optimal_tilt_win_rate, tilts))
    drawn = {
        "best-of-n": [(one.kl, one.win) for one in laws],
        f"best-of-n, {NUM_LEVELS} levels": [(one.tied_kl, one.tied_win) for one in laws],
    }
    points = [
        Curve(label=label, x=tuple(x for x, _ in own), y=tuple(y for _, y in own), is_line=False)
        for label, own in drawn.items()
    ]
    return (Curve(label="most that any law wins", x=most[0], y=most[1]), *points)


def _remarks(laws: list[Law]) -> str:
    gaps = ", ".join(f"{100 * one.gap:.2f} (n = {one.n})" for one in laws)
    last = laws[-1]
    return (
        f"Points of win rate that best-of-n leaves to the best law at its KL: {gaps}; the best law is the density "
        f"e^(cu) over quantiles, with c near n + 1. With {NUM_LEVELS} levels of reward log n − (n − 1)/n is far from "
        f"the KL (n = {last.n}: {kl_bound(last.n):.2f} for {last.tied_kl:.2f}); the estimate, {last.estimated_kl:.2f}, "
        "knows of ties and errs to the safe side."
    )

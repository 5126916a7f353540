"""Whether a paper's claim reproduces on the demo's model: said from the numbers, either way, and why where it does not.

Owns the verdicts and what they are drawn from: differences between arms with intervals over seeds. Does not own the
arms, tables or pictures (`model`, `model_findings`). A difference whose interval holds 0 shows nothing, and what shows
nothing does not reproduce.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from benchmarks.papers.model_findings import over_seeds
from benchmarks.papers.model_lab import Judged
from bon_algos.contracts import Interval

NEAR: Final = 0.05
"""Win rates that differ by no more are comparable: as much as BoNBoN's Fig. 1 leaves between it and best-of-n."""


def mean_of(values: Sequence[float]) -> Interval:
    """Mean over seeds with its 95 % interval, which for one seed has no ends."""
    if len(values) > 1:
        return over_seeds(values)
    return Interval.model_construct(mean=values[0], low=-np.inf, high=np.inf)


def difference(values: Sequence[float], less: Sequence[float]) -> Interval:
    """Seed by seed."""
    return mean_of([one - other for one, other in zip(values, less, strict=True)])


def told(one: Interval, unit: str = "", *, digits: int = 2, scale: float = 1.0) -> str:
    reach = f"±{scale * (one.high - one.mean):.{digits}f}" if np.isfinite(one.high) else ""
    return f"{scale * one.mean:+.{digits}f}{reach}{unit}"


def is_above(one: Interval) -> bool:
    """Surely."""
    return one.low > 0


def is_below(one: Interval) -> bool:
    return one.high < 0


# --- J-BOND above RLOO at equal KL -----------------------------------------------------------------------


ShareOfBest = Callable[[float], float]
"""Share of the gain that best-of-n of the reference has at a KL; above 0 for one above 0."""


def j_bond_verdict(
    j_bond: Sequence[Sequence[Judged]], rloo: Mapping[str, Sequence[Sequence[Judged]]], best: ShareOfBest
) -> str:
    """BOND Fig. 7: J-BOND's reward above that of every RLOO at the same KL. Paths of seeds, over their steps."""
    leads = {
        label: mean_of([_lead(own, other, best) for own, other in zip(j_bond, seeds, strict=True)])
        for label, seeds in rloo.items()
    }
    listed = ", ".join(f"{label} {told(one, digits=1, scale=100)}" for label, one in leads.items())
    numbers = f"at equal KL its share of the gain less that of {listed} points"
    if all(map(is_above, leads.values())):
        return f"Reproduced: J-BOND is above all {len(leads)} RLOO runs; {numbers}."
    behind = [label for label, one in leads.items() if is_below(one)]
    open_ = [label for label, one in leads.items() if not is_below(one) and not is_above(one)]
    why = [f"it is surely below {', '.join(behind)}"] if behind else []
    why += [f"{_seeds(j_bond)} cannot tell it from {', '.join(open_)}"] if open_ else []
    return f"Does not reproduce: J-BOND is not above all RLOO runs, because {' and '.join(why)}; {numbers}."


def _lead(j_bond: Sequence[Judged], rloo: Sequence[Judged], best: ShareOfBest) -> float:
    """Share of the gain at J-BOND's KL in the end, or at the largest that RLOO came to where that is less."""
    kl = min(j_bond[-1].kl, max(one.kl for one in rloo))
    return share_at(j_bond, kl, best) - share_at(rloo, kl, best)


def share_at(path: Sequence[Judged], kl: float, best: ShareOfBest) -> float:
    """Share of the gain at a KL up to the largest of a path. Between two points the path has of best-of-n's share what
    is straight in the root of the KL: a straight line of rewards would lie far below any policy where points are far
    apart. Below the first point it has what it has there; of a path that comes back points count by their KL."""
    points = sorted((one.kl**0.5, one.gain_share / best(one.kl)) for one in path if one.kl > 0)
    if not points:
        return 0.0
    roots, parts = zip(*points, strict=True)
    return best(kl) * float(np.interp(max(kl, 0.0) ** 0.5, roots, parts))


# --- BoNBoN: win rate against drift ----------------------------------------------------------------------


class OffTarget(NamedTuple):
    """Of one sample of the reference, and of best-of-n of it."""

    best_win_rate: float
    length: float
    distinct_2: float


def bonbon_verdict(bonbon: Sequence[Judged], others: Mapping[str, Sequence[Judged]], reference: OffTarget) -> str:
    """BoNBoN Fig. 1 and Table 1: near best-of-n's win rate, with less off-target change than SFT, DPO and IPO on the
    same draws have at a comparable win rate. The last judgements of seeds."""
    win = mean_of([one.win_rate - reference.best_win_rate for one in bonbon])
    alike = {label: own for label, own in others.items() if abs(_mean_gap(bonbon, own)) <= NEAR}
    drifts = {label: _more_drift(own, bonbon, reference) for label, own in alike.items()}
    is_near = win.low >= -NEAR
    is_least = bool(drifts) and all(is_above(one) for own in drifts.values() for one in own)
    listed = "; ".join(
        f"{label} changes length by {told(length)} tokens and distinct-2 by {told(distinct, digits=3)} more"
        for label, (length, distinct) in drifts.items()
    )
    at_its_win_rate = f"of those at its win rate, {listed}" if drifts else "none of the others is at its win rate"
    best = f"{100 * reference.best_win_rate:.1f} %"
    numbers = f"its win rate less best-of-n's {best} is {told(win, digits=1, scale=100)} points"
    if is_near and is_least:
        return f"Reproduced: BoNBoN is near best-of-n's win rate and drifts least; {numbers}; {at_its_win_rate}."
    why = [] if is_near else [f"its win rate is not within {100 * NEAR:.0f} points of best-of-n's{_as_ipo(alike)}"]
    why += [] if is_least else [_why_not_least(drifts, bonbon)]
    return f"Does not reproduce, because {' and '.join(why)}: {numbers}; {at_its_win_rate}."


def _mean_gap(one: Sequence[Judged], other: Sequence[Judged]) -> float:
    return float(np.mean([a.win_rate for a in one]) - np.mean([b.win_rate for b in other]))


def _more_drift(other: Sequence[Judged], bonbon: Sequence[Judged], reference: OffTarget) -> tuple[Interval, Interval]:
    """By how much more another method changes length, in tokens, and distinct-2."""
    return (
        difference(*([abs(one.length - reference.length) for one in own] for own in (other, bonbon))),
        difference(*([abs(one.distinct_2 - reference.distinct_2) for one in own] for own in (other, bonbon))),
    )


def _as_ipo(alike: Mapping[str, object]) -> str:
    """Its target for a pair is IPO's: a constant, by which best-of-n is no optimum (algorithms.md 1.5)."""
    return ", as IPO's is not (one target for all pairs is not best-of-n's)" if "IPO" in alike else ""


def _why_not_least(drifts: Mapping[str, tuple[Interval, Interval]], bonbon: Sequence[Judged]) -> str:
    if not drifts:
        return "there is no other method to compare drifts with at its win rate"
    less = [label for label, own in drifts.items() if any(map(is_below, own))]
    return f"it changes more than {', '.join(less)}" if less else f"{_seeds(bonbon)} cannot tell their drifts apart"


# --- pooling by a learned law ----------------------------------------------------------------------------


class Gain(NamedTuple):
    """Of one arm over another, seed by seed."""

    win_rate: Interval
    kl: Interval
    """nats"""
    ratio: Interval
    """KL ÷ frontier's at the win rate reached; what a win rate costs."""

    @property
    def is_sure(self) -> bool:
        """It wins more often at no surely higher cost, or costs less and surely wins no less."""
        wins_more, costs_less = is_above(self.win_rate), is_below(self.ratio)
        return (wins_more and not is_above(self.ratio)) or (costs_less and not is_below(self.win_rate))

    @property
    def is_sure_loss(self) -> bool:
        return (is_below(self.win_rate) and not is_below(self.ratio)) or (
            is_above(self.ratio) and not is_above(self.win_rate)
        )

    def __str__(self) -> str:
        ratio = f", KL ÷ frontier's {told(self.ratio)}" if np.isfinite(self.ratio.mean) else ""
        return f"win rate {told(self.win_rate, digits=1, scale=100)} points, KL {told(self.kl)} nats{ratio}"


class Reached(NamedTuple):
    """The last judgements of an arm's seeds, and what their win rates cost."""

    last: Sequence[Judged]
    ratios: Sequence[float]

    def less(self, other: Reached) -> Gain:
        return Gain(
            difference(*([one.win_rate for one in own.last] for own in (self, other))),
            difference(*([one.kl for one in own.last] for own in (self, other))),
            difference(self.ratios, other.ratios),
        )


def pooling_verdict(own: Reached, pooled: Reached, learned: Reached) -> str:
    """Where a prompt has few candidates, a law learned from other prompts is to do what counting among all that were
    logged would: better targets than counting among its own."""
    by_counting, by_learning, apart = pooled.less(own), learned.less(own), learned.less(pooled)
    numbers = (
        f"less counting among a prompt's own: counted among all logged, {by_counting}; by the learned law, "
        f"{by_learning}. The learned law less counting among all logged: {apart}."
    )
    if by_learning.is_sure and not apart.is_sure_loss:
        return f"Reproduced: the learned law does the pooling; {numbers}"
    if by_learning.is_sure:
        return f"Does not reproduce in full, because the learned law does only part of the pooling; {numbers}"
    if by_counting.is_sure:
        return f"Does not reproduce, because pooling is worth something and the learned law does not do it; {numbers}"
    return (
        f"Does not reproduce, because pooling itself is worth nothing that {_seeds(own.last)} could tell, so that "
        f"there is nothing for the learned law to do; {numbers}"
    )


def _seeds(seeds: Sequence[object]) -> str:
    return "one seed" if len(seeds) == 1 else f"the 95 % interval over {len(seeds)} seeds"

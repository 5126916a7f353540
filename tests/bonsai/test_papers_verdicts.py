"""A verdict on a paper's claim follows from the numbers, and turns over with them."""

from __future__ import annotations

import math

import pytest

from benchmarks.claims import above, at_most
from benchmarks.papers.findings import verdict as exact_verdict
from benchmarks.papers.model_lab import Judged
from benchmarks.papers.model_verdicts import (
    OffTarget,
    Reached,
    bonbon_verdict,
    j_bond_verdict,
    pooling_verdict,
    share_at,
)

NOISE = (-0.01, 0.0, 0.01)
"""Of three seeds: an interval of ±.025 around their mean."""


def judged(
    *, share: float = 0.0, kl: float = 1.0, win: float = 0.5, length: float = 27.0, distinct: float = 0.68
) -> Judged:
    return Judged(
        step=50,
        reward=0.0,
        gold=0.0,
        gain_share=share,
        win_rate=win,
        kl=kl,
        kl_error=0.0,
        length=length,
        distinct_2=distinct,
        truncated=0.0,
    )


# --- J-BOND above RLOO -----------------------------------------------------------------------------------


def paths(*points: tuple[float, float], seeds: tuple[float, ...] = NOISE) -> list[list[Judged]]:
    """Of (KL, share of the gain) over steps."""
    return [[judged(kl=kl, share=share + noise) for kl, share in points] for noise in seeds]


def test_between_two_points_it_is_the_part_of_the_best_that_is_straight():
    """Parts of √KL: .5 at 1 nat and .4 at 4, so .45 at 2.25."""
    (path,) = paths((1.0, 0.5), (4.0, 0.8), seeds=(0.0,))
    for kl, part in ((0.25, 0.5), (1.0, 0.5), (2.25, 0.45), (4.0, 0.4)):
        assert share_at(path, kl, math.sqrt) == pytest.approx(part * math.sqrt(kl))


def test_a_path_that_comes_back_is_read_by_its_kl_and_one_that_never_left_has_nothing():
    (path,) = paths((0.36, 0.4), (1.0, 0.7), (0.64, 0.6), seeds=(0.0,))
    assert share_at(path, 0.64, math.sqrt) == pytest.approx(0.6)
    assert share_at([judged(kl=0.0)], 0.0, math.sqrt) == 0


def test_a_path_along_the_best_is_on_it_between_points_that_are_far_apart():
    (path,) = paths((0.25, math.log1p(0.25)), (9.0, math.log1p(9.0)), seeds=(0.0,))
    assert share_at(path, 2.0, math.log1p) == pytest.approx(math.log1p(2.0))


RLOO = {"β = .1": paths((1.0, 0.5), (4.0, 1.0)), "β = 1": paths((0.25, 0.3), (0.49, 0.4))}


def test_j_bond_above_every_rloo_at_equal_kl_is_reproduced():
    """At 2.25 nats the one has .75; the other ends at .49, where J-BOND has 1.1·.7/1.5."""
    verdict = j_bond_verdict(paths((2.25, 1.1)), RLOO, math.sqrt)
    assert verdict.startswith("Reproduced: J-BOND is above all 2 RLOO runs")
    assert "β = .1 +35.0" in verdict
    assert "β = 1 +11.3" in verdict


@pytest.mark.parametrize(
    ("share", "why"),
    [
        (0.5, "because it is surely below β = .1, β = 1;"),
        (0.75, "below β = 1 and the 95 % interval over 3 seeds cannot tell it from β = .1"),
    ],
)
def test_j_bond_that_is_not_above_every_rloo_is_not(share: float, why: str):
    verdict = j_bond_verdict(paths((2.25, share)), RLOO, math.sqrt)
    assert verdict.startswith("Does not reproduce: J-BOND is not above all RLOO runs")
    assert why in verdict


def test_one_seed_shows_nothing():
    alone = {label: seeds[:1] for label, seeds in RLOO.items()}
    verdict = j_bond_verdict(paths((2.25, 2.0))[:1], alone, math.sqrt)
    assert "because one seed cannot tell it from β = .1, β = 1" in verdict


# --- BoNBoN's drift --------------------------------------------------------------------------------------

REFERENCE = OffTarget(best_win_rate=0.9, length=27.0, distinct_2=0.68)


def ended(win: float, length: float, distinct: float) -> list[Judged]:
    return [judged(win=win + one, length=length + one, distinct=distinct + one / 10) for one in NOISE]


OTHERS = {"SFT on the best": ended(0.7, 27.0, 0.68), "DPO": ended(0.88, 30.0, 0.6), "IPO": ended(0.88, 24.0, 0.6)}


def test_bonbon_near_best_of_n_with_the_least_drift_is_reproduced():
    """SFT wins too seldom to be compared with; longer and shorter are changes alike."""
    verdict = bonbon_verdict(ended(0.89, 27.5, 0.67), OTHERS, REFERENCE)
    assert verdict.startswith("Reproduced: BoNBoN is near best-of-n's win rate and drifts least")
    assert "DPO changes length by +2.50" in verdict
    assert "SFT" not in verdict


@pytest.mark.parametrize(
    ("bonbon", "others", "why"),
    [
        (ended(0.7, 27.0, 0.68), {}, "win rate is not within 5 points of best-of-n's and there is no other method"),
        (ended(0.7, 27.5, 0.68), {"IPO": ended(0.7, 30.0, 0.6)}, "best-of-n's, as IPO's is not"),
        (ended(0.89, 31.0, 0.67), OTHERS, "because it changes more than DPO, IPO:"),
        (ended(0.89, 30.0, 0.6), {"DPO": ended(0.88, 30.0, 0.6)}, "over 3 seeds cannot tell their drifts apart"),
        (ended(0.89, 27.5, 0.67)[:1], {"DPO": OTHERS["DPO"][:1]}, "one seed cannot tell their drifts apart"),
    ],
)
def test_bonbon_far_from_it_or_with_no_less_drift_is_not(
    bonbon: list[Judged], others: dict[str, list[Judged]], why: str
):
    verdict = bonbon_verdict(bonbon, others, REFERENCE)
    assert verdict.startswith("Does not reproduce, because ")
    assert why in verdict


# --- pooling ---------------------------------------------------------------------------------------------


def reached(win: float, ratio: float) -> Reached:
    return Reached([judged(win=win + one) for one in NOISE], [ratio + one for one in reversed(NOISE)])


OWN = reached(0.7, 2.0)


@pytest.mark.parametrize(
    ("pooled", "learned", "verdict"),
    [
        (reached(0.8, 1.3), reached(0.8, 1.3), "Reproduced: the learned law does the pooling"),
        (reached(0.7, 1.3), reached(0.7, 1.3), "Reproduced: the learned law does the pooling"),
        (reached(0.9, 1.3), reached(0.8, 1.3), "Does not reproduce in full, because the learned law does only part"),
        (reached(0.8, 1.3), reached(0.7, 2.0), "Does not reproduce, because pooling is worth something"),
        (reached(0.8, 3.0), reached(0.8, 3.0), "Does not reproduce, because pooling itself is worth nothing"),
        (reached(0.7, 2.0), reached(0.7, 2.0), "Does not reproduce, because pooling itself is worth nothing"),
        (reached(0.7, float("nan")), reached(0.8, float("nan")), "Reproduced"),
    ],
)
def test_a_learned_law_does_the_pooling_where_it_is_better_than_a_prompts_own_candidates(
    pooled: Reached, learned: Reached, verdict: str
):
    assert pooling_verdict(OWN, pooled, learned).startswith(verdict)
    assert "win rate" in pooling_verdict(OWN, pooled, learned)


def test_an_exact_experiment_reproduces_only_when_each_of_its_claims_holds():
    lower, drift = above("lower bound", 0.1, 0), at_most("drift", 0.2, 0.0)
    assert exact_verdict([lower]) == "Reproduced"
    assert exact_verdict([lower, drift]).startswith("Does not reproduce here, missed are: drift.")

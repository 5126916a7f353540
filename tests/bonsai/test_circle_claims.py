"""The circle benchmark claims something about its worst seed."""

import numpy as np
import pytest

from benchmarks import circle
from bon_algos.contracts import Interval
from bonsai.demo import measure
from bonsai.job_replies import JobEvent

RNG = np.random.default_rng(0)
PROMPTS = tuple(f"prompt {row}" for row in range(40))


def pool(reward_BM: np.ndarray) -> measure.Pool:
    is_complete_BM = np.ones(reward_BM.shape, dtype=bool)
    return measure.Pool(PROMPTS, reward_BM, reward_BM / 2, is_complete_BM, np.full(reward_BM.shape, 9.0))


REFERENCE = pool(RNG.normal(size=(40, 64)))


def seed(
    number: int, *, better: float, kl: float = 2.0, seconds: float = 100.0, evaluating: float = 10.0
) -> circle.Seed:
    """A policy whose reward is that of the reference plus a constant."""
    policy = pool(REFERENCE.reward[:, :32] + better)
    drift = Interval(mean=kl, low=kl, high=kl)
    quality = measure.quality_of_one(policy, REFERENCE, drift)
    return circle.Seed(number, policy, quality, measure.compare(policy, REFERENCE, 16), seconds, evaluating, 1e-5, 1.0)


def broken(*seeds: circle.Seed) -> list[str]:
    return [claim.name for claim in circle.claims_of(REFERENCE, seeds) if not claim.holds]


def test_a_good_policy_keeps_every_promise():
    # best of 16 normal draws is worth 1.77 over one: 2 is more than all of it
    assert broken(seed(0, better=2), seed(1, better=2)) == []


def test_one_bad_seed_breaks_the_claim_about_the_worst():
    assert broken(seed(0, better=2), seed(1, better=1)) == [
        "share of the gain, lower 95 % bound, all seeds",
        "share of the gain, mean, worst seed",
    ]


def test_a_policy_that_drifts_or_trains_too_long_is_found_out():
    # twice log 16 − 15/16 is 3.6702 nats
    assert broken(seed(0, better=2, kl=3.67)) == []
    assert broken(seed(0, better=2, kl=3.68)) == ["KL to the reference, nats, worst seed"]
    assert broken(seed(0, better=2, seconds=361)) == ["training and evaluation, seconds, slowest seed"]


def test_an_evaluation_that_takes_more_than_a_fifth_of_the_job_is_found_out():
    assert broken(seed(0, better=2, evaluating=20.0)) == []
    assert broken(seed(0, better=2), seed(1, better=2, evaluating=20.1)) == ["of these for the evaluation, worst seed"]


def test_a_phase_lasts_from_each_event_that_tells_of_it_to_the_next():
    """Ten steps at half a second, an evaluation of three seconds, its second attempt of one."""
    told = [("training", 0), ("training", 5000), ("evaluating", 5500), ("training", 8500), ("evaluating", 9000)]
    events = [
        JobEvent.model_validate(
            {"id": f"{at}-0", "created_at": at // 1000, "level": "info", "message": "", "data": {"phase": phase}}
        )
        for phase, at in [*told, ("done", 10_000)]
    ]
    assert circle.seconds_of("evaluating", events) == pytest.approx(4.0)


def test_gold_that_falls_is_found_out():
    good = seed(0, better=2)
    worse = good.policy._replace(gold=good.policy.gold - 3)
    assert broken(good, good._replace(comparison=measure.compare(worse, REFERENCE, 16))) == [
        "gold gain over one sample, lower 95 % bound, worst seed"
    ]


def test_seeds_together_are_their_mean():
    quality, share = circle.together(REFERENCE, [seed(0, better=1), seed(1, better=2)])
    assert quality.reward.mean == pytest.approx(REFERENCE.reward[:, :32].mean() + 1.5)
    alone = [seed(i, better=i + 1).comparison.gain_share.mean for i in range(2)]
    assert share.mean == pytest.approx(sum(alone) / 2)


def test_the_table_has_a_row_for_each_seed_and_one_for_all():
    rows = circle.rows_of(REFERENCE, [seed(0, better=1), seed(1, better=2)])
    assert [row[0] for row in rows][2:] == [
        "one sample, distilled, seed 0",
        "one sample, distilled, seed 1",
        "one sample, distilled, 2 seeds",
    ]
    assert all(len(row) == len(circle.COLUMNS) for row in rows)

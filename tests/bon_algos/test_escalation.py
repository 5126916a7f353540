"""The threshold below which one sample is not enough: against every threshold there is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bon_algos.escalation import Pair, learned_escalation

pairs = st.lists(st.builds(Pair, st.integers(-5, 5).map(float), st.integers(-5, 8).map(float)), min_size=1, max_size=12)


def served(some: list[Pair], threshold: float) -> float:
    return float(np.mean([max(one) if one.sample < threshold else one.sample for one in some]))


@given(pairs, st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_it_is_the_lowest_threshold_that_keeps_the_share(some, kept_gain):
    rule = learned_escalation(some, kept_gain)
    sample, best = (float(np.mean(column)) for column in zip(*some, strict=True))
    wanted = sample + kept_gain * (best - sample)
    assert served(some, rule.threshold) >= wanted - 1e-9
    lower = [one.sample for one in some if one.sample < rule.threshold]
    if lower:
        assert served(some, max(lower)) < wanted + 1e-9
    assert rule.escalated_share == pytest.approx(len(lower) / len(some))


def test_the_ends_of_the_dial():
    some = [Pair(0.0, 1.0), Pair(2.0, 3.0), Pair(4.0, 4.0)]
    assert learned_escalation(some, 0.0).threshold == -math.inf
    assert learned_escalation(some, 1.0).threshold == 4.0
    assert learned_escalation([Pair(0.0, 1.0), Pair(0.0, 3.0)], 1.0).threshold == math.inf
    # A student that is better than best-of-n is never escalated.
    assert learned_escalation([Pair(5.0, 4.0), Pair(3.0, 2.0)], 1.0).threshold == -math.inf


def test_what_is_missed_is_what_the_nearest_pairs_gained():
    """Ten pairs: the nearest two."""
    rule = learned_escalation([Pair(float(s), 10.0) for s in range(10)], 0.5)
    assert rule.gain_missed(2.4) == pytest.approx((8 + 7) / 2)
    assert rule.gain_missed(100.0) == pytest.approx((1 + 2) / 2)


@pytest.mark.parametrize(
    ("some", "kept_gain", "words"),
    [([], 0.5, "pairs"), ([Pair(math.nan, 1.0)], 0.5, "finite"), ([Pair(0.0, 1.0)], 1.5, "share")],
)
def test_what_cannot_be_learned_from_is_refused(some, kept_gain, words):
    with pytest.raises(ValueError, match=words):
        learned_escalation(some, kept_gain)

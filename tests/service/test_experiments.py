"""Who meets which arm, and what the arms have shown: facts of the pure functions."""

from __future__ import annotations

import math
from collections import Counter
from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bon_algos.contracts import Arm, Experiment, ExperimentArm, Exposure, Outcome
from service.catalogue import Snapshot
from service.errors import InvalidField, PolicyNotServed
from service.experiment_store import ramped_up
from service.experiments import (
    Assignment,
    arm_object,
    arm_of,
    assign,
    bucket,
    mean_interval,
    parse_forced_arm,
    statistics_increments,
)
from tests.service.records import BASE, STUDENT, group, policy, route

SALT = "5f" * 16
TEACHER_ARM, STUDENT_ARM = Arm(policy=BASE, n=16), Arm(policy=STUDENT, n=1)
UNITS = [f"unit-{i}" for i in range(10_000)]


def experiment(*weights: int) -> Experiment:
    arms = (TEACHER_ARM, STUDENT_ARM, Arm(policy=BASE, n=4))[: len(weights)]
    entries = tuple(ExperimentArm(arm=arm, weight=weight) for arm, weight in zip(arms, weights, strict=True))
    return Experiment(id="exp_1", route="default", salt=SALT, arms=entries, created_at=0.0)


def assigned(running: Experiment | None, unit: str = "u", n: int | None = None, **changes: object) -> Assignment:
    asked: dict[str, object] = {"live": None, "served": frozenset({BASE, STUDENT}), "forced": None, **changes}
    return assign(route(), experiment=running, unit=unit, n=n, **asked)  # type: ignore[arg-type]


def test_the_bucket_is_the_first_eight_bytes_of_a_keyed_blake2b():
    """The known answer from the two-block definition of keyed BLAKE2b (RFC 7693, 3.3): the key, padded to one block,
    is hashed before the data."""
    assert bucket("unit-1", SALT) == _reference_blake2b(b"unit-1", SALT.encode()) % 10_000
    assert bucket("unit-1", SALT) != bucket("unit-1", "60" * 16)


def _reference_blake2b(data: bytes, key: bytes) -> int:
    """BLAKE2b-512 in the words of RFC 7693, for data of at most one block; its first eight bytes, big-endian."""
    mask = 2**64 - 1
    primes = (2, 3, 5, 7, 11, 13, 17, 19)
    start = [math.isqrt(prime << 128) & mask for prime in primes]
    sigma = [
        "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
        "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
    ]  # fmt: skip
    rounds = [[int(digit, 16) for digit in row] for row in (*sigma, sigma[0], sigma[1])]
    state = [start[0] ^ 0x01010000 ^ (len(key) << 8) ^ 64, *start[1:]]
    for block, counter, last in ((key.ljust(128, b"\0"), 128, False), (data.ljust(128, b"\0"), 128 + len(data), True)):
        words = [int.from_bytes(block[i : i + 8], "little") for i in range(0, 128, 8)]
        v = [*state, *start]
        v[12] ^= counter
        v[14] ^= mask if last else 0
        for row in rounds:
            columns = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
            diagonals = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
            for i, (a, b, c, d) in enumerate(columns + diagonals):
                for word, first, second in ((words[row[2 * i]], 32, 24), (words[row[2 * i + 1]], 16, 63)):
                    v[a] = (v[a] + v[b] + word) & mask
                    v[d] = _rotated(v[d] ^ v[a], first)
                    v[c] = (v[c] + v[d]) & mask
                    v[b] = _rotated(v[b] ^ v[c], second)
        state = [state[i] ^ v[i] ^ v[i + 8] for i in range(8)]
    return int.from_bytes(state[0].to_bytes(8, "little"), "big")


def _rotated(word: int, by: int) -> int:
    return (word >> by | word << (64 - by)) & (2**64 - 1)


def test_the_shares_of_ten_thousand_units_are_the_weights():
    """Each count is binomial(10,000, p): within 4.5 standard deviations, 4.5·sqrt(10,000·p·(1−p))."""
    counts = Counter(assigned(experiment(7000, 2000, 1000), unit).arm for unit in UNITS)
    for entry in experiment(7000, 2000, 1000).arms:
        share = entry.weight / 10_000
        assert abs(counts[entry.arm] - entry.weight) <= 4.5 * math.sqrt(10_000 * share * (1 - share))


def test_a_unit_keeps_its_arm_on_every_gateway():
    here, there = experiment(5000, 5000), Experiment.model_validate_json(experiment(5000, 5000).model_dump_json())
    assert all(assigned(here, unit).arm == assigned(there, unit).arm for unit in UNITS)


def test_two_salts_deal_independently():
    """Under independence the joint share of (student, student) is a quarter: 2,500 ± 4.5·sqrt(10,000·¼·¾)."""
    other = experiment(5000, 5000).model_copy(update={"salt": "a0" * 16})
    both = sum(assigned(experiment(5000, 5000), unit).arm == assigned(other, unit).arm == STUDENT_ARM for unit in UNITS)
    assert abs(both - 2500) <= 4.5 * math.sqrt(10_000 * 0.25 * 0.75)


@settings(deadline=None)
@given(st.lists(st.integers(1, 2500), min_size=2, max_size=4), st.data())
def test_a_ramp_up_moves_nobody_back(lower, data):
    """Raising one weight and lowering any others keeps every bucket of the raised arm with it."""
    before = [*lower, 10_000 - sum(lower)] if sum(lower) < 10_000 else [5000, 5000]
    raised = data.draw(st.integers(0, len(before) - 1))
    after = [weight if i == raised else data.draw(st.integers(1, weight)) for i, weight in enumerate(before)]
    after[raised] = 10_000 - sum(weight for i, weight in enumerate(after) if i != raised)
    arms = [Arm(policy=BASE, n=i + 1) for i in range(len(before))]

    def dealt(weights: list[int]) -> list[Arm]:
        entries = [ExperimentArm(arm=arm, weight=weight) for arm, weight in zip(arms, weights, strict=True)]
        return [arm_of(number, entries) for number in range(0, 10_000, 7)]

    pairs = zip(dealt(before), dealt(after), strict=True)
    assert all(now == arms[raised] for then, now in pairs if then == arms[raised])


def test_with_two_arms_a_ramp_up_only_moves_units_towards_the_raised_arm():
    moves = Counter(
        (assigned(experiment(9000, 1000), unit).arm, assigned(experiment(5000, 5000), unit).arm) for unit in UNITS
    )
    assert moves[(STUDENT_ARM, TEACHER_ARM)] == 0
    assert moves[(TEACHER_ARM, STUDENT_ARM)] > 0


def test_raising_one_weight_is_the_same_experiment_and_anything_else_is_another():
    running = experiment(9000, 1000).arms
    assert ramped_up(running, experiment(5000, 5000).arms) == experiment(5000, 5000).arms
    assert ramped_up(running, experiment(5000, 5000).arms[::-1]) == experiment(5000, 5000).arms
    assert ramped_up(running, running) == running
    assert ramped_up(running, experiment(4000, 5000, 1000).arms) is None
    # 6,000 -> 3,000 while 3,000 -> 5,000 and 1,000 -> 2,000: two rise.
    assert ramped_up(experiment(6000, 3000, 1000).arms, experiment(3000, 5000, 2000).arms) is None


def test_without_experiment_or_live_policy_best_of_n_of_the_base_answers():
    assert assigned(None) == Assignment(Arm(policy=BASE, n=16), "default")
    assert assigned(None, n=3) == Assignment(Arm(policy=BASE, n=3), "default")


@pytest.mark.parametrize(
    ("n", "arm", "reason"),
    [
        (None, STUDENT_ARM, "live"),
        (1, STUDENT_ARM, "live"),
        (16, STUDENT_ARM, "live"),
        (17, Arm(policy=BASE, n=17), "n_above_equivalent"),
    ],
)
def test_the_live_policy_stands_in_up_to_the_n_it_was_distilled_for(n, arm, reason):
    """It replaces best-of-16; the route's default is 16."""
    promoted = route(live_policy=STUDENT)
    live = policy(STUDENT, state="live", n_equivalent=16)
    served = frozenset({BASE, STUDENT})
    found = assign(promoted, experiment=None, live=live, served=served, unit="u", n=n)
    assert (found.arm, found.reason, found.experiment_id) == (arm, reason, None)


def test_a_live_policy_that_is_not_served_falls_back_aloud():
    live = policy(STUDENT, state="live", n_equivalent=16)
    found = assign(route(live_policy=STUDENT), experiment=None, live=live, served=frozenset({BASE}), unit="u", n=None)
    assert (found.arm, found.reason) == (Arm(policy=BASE, n=16), "default")
    assert found.warnings


def test_in_an_experiment_only_the_hashed_arm_is_an_exposure():
    student = next(unit for unit in UNITS if assigned(experiment(5000, 5000), unit).arm == STUDENT_ARM)
    teacher = next(unit for unit in UNITS if assigned(experiment(5000, 5000), unit).arm == TEACHER_ARM)
    running = experiment(5000, 5000)
    assert assigned(running, student) == Assignment(STUDENT_ARM, "experiment", "exp_1")
    assert assigned(running, teacher, n=16) == Assignment(TEACHER_ARM, "experiment", "exp_1")
    # 4 is below the drawn arm's 16: that arm's policy with 4. The student's n of 1 is not above 4.
    assert assigned(running, teacher, n=4) == Assignment(Arm(policy=BASE, n=4), "n_below_arm")
    assert assigned(running, student, n=4) == Assignment(STUDENT_ARM, "experiment", "exp_1")
    # 17 is above every arm: nobody was distilled for that.
    assert assigned(running, student, n=17) == Assignment(Arm(policy=BASE, n=17), "n_above_equivalent")


def test_a_forced_arm_counts_as_forced_when_it_is_one_of_the_experiment():
    running = experiment(5000, 5000)
    assert assigned(running, forced=STUDENT_ARM) == Assignment(STUDENT_ARM, "forced", "exp_1")
    other = Arm(policy=BASE, n=2)
    assert assigned(running, forced=other) == Assignment(other, "forced", None)
    assert assigned(None, forced=other) == Assignment(other, "forced", None)


def test_a_policy_the_engine_does_not_serve_is_never_answered_by_other_weights():
    served = frozenset({BASE})
    with pytest.raises(PolicyNotServed):
        assigned(None, forced=STUDENT_ARM, served=served)
    student = next(unit for unit in UNITS if assigned(experiment(5000, 5000), unit).arm == STUDENT_ARM)
    with pytest.raises(PolicyNotServed):
        assigned(experiment(5000, 5000), student, served=served)


def test_a_forced_arm_names_a_known_policy_and_a_number():
    promoted = route(live_policy=STUDENT)
    snapshot = Snapshot(routes={"default": promoted}, policies={BASE: policy(BASE), STUDENT: policy(STUDENT)})
    assert parse_forced_arm("base:16", promoted, snapshot) == TEACHER_ARM
    assert parse_forced_arm("live:1", promoted, snapshot) == STUDENT_ARM
    assert parse_forced_arm(f"{STUDENT}:1", promoted, snapshot) == STUDENT_ARM
    for header in ("", "base", "base:", "base:0", "base:65", "base:1.5", "base:٤", "base:-1", "pol-0:1", "../x:1"):
        with pytest.raises(InvalidField):
            parse_forced_arm(header, promoted, snapshot)
    with pytest.raises(InvalidField):
        parse_forced_arm("live:1", route(), snapshot)


# --- statistics ------------------------------------------------------------------------------------------


def test_an_exposure_counts_once_and_a_forced_one_apart():
    exposure = Exposure(
        id="e",
        created_at=0,
        group_id="g",
        route="default",
        experiment="exp_1",
        arm=STUDENT_ARM,
        arm_reason="experiment",
    )
    assert statistics_increments(exposure) == {f"{STUDENT}:1|exposures": 1}
    assert statistics_increments(exposure.model_copy(update={"arm_reason": "forced"})) == {f"{STUDENT}:1|forced": 1}
    assert statistics_increments(exposure.model_copy(update={"experiment": None})) == {}
    assert statistics_increments(exposure.model_copy(update={"arm_reason": "n_below_arm"})) == {}


def test_a_group_adds_its_served_candidate_and_what_all_cost():
    drawn = group(
        [(2.0, 3), (5.0, 4), (None, 7)], arm=TEACHER_ARM, experiment="exp_1", arm_reason="experiment", selected=1
    )
    # 3 + 4 + 7 tokens were drawn, 4 of them served; 5.0² = 25.
    assert statistics_increments(drawn.model_copy(update={"engine_seconds": 0.5})) == {
        f"{BASE}:16|answers": 1,
        f"{BASE}:16|completion_tokens": 4,
        f"{BASE}:16|candidate_tokens": 14,
        f"{BASE}:16|engine_seconds": 0.5,
        f"{BASE}:16|scored": 1,
        f"{BASE}:16|reward_sum": 5.0,
        f"{BASE}:16|reward_sq": 25.0,
    }
    assert statistics_increments(drawn.model_copy(update={"arm_reason": "forced"})) == {}
    assert statistics_increments(drawn.model_copy(update={"experiment": None})) == {}


def test_a_reward_that_comes_late_is_added_once_by_its_outcome():
    single = group([(None, 4)], arm=STUDENT_ARM, experiment="exp_1", arm_reason="experiment", selected=0)
    late = Outcome(
        id="o", created_at=0, group_id=single.id, route="default", experiment="exp_1", arm=STUDENT_ARM,
        arm_reason="experiment", reward_model_id="rm-0", rewards=(-1.5,),
    )  # fmt: skip
    name = f"{STUDENT}:1"
    together = Counter(statistics_increments(single))
    together.update(statistics_increments(late))
    assert together[f"{name}|answers"] == together[f"{name}|scored"] == 1
    assert (together[f"{name}|reward_sum"], together[f"{name}|reward_sq"]) == (-1.5, 2.25)
    assert statistics_increments(late.model_copy(update={"rewards": (None,)})) == {}


def test_a_group_that_served_nothing_is_a_cost_and_no_answer():
    lost = group([(None, 2)], arm=STUDENT_ARM, experiment="exp_1", arm_reason="experiment", selected=None)
    assert statistics_increments(lost) == {f"{STUDENT}:1|candidate_tokens": 2, f"{STUDENT}:1|engine_seconds": 0}


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=50))
def test_the_interval_is_the_textbooks(rewards):
    """mean ± 1.96·s/sqrt(n), s from the standard library, from the three sums alone."""
    found = mean_interval(len(rewards), sum(rewards), sum(reward * reward for reward in rewards))
    assert found is not None
    half = 1.959964 * stdev(rewards) / math.sqrt(len(rewards))
    assert found["mean"] == pytest.approx(mean(rewards), abs=1e-9)
    assert found["high"] - found["low"] == pytest.approx(2 * half, abs=1e-4)


def test_one_reward_has_no_interval():
    assert mean_interval(1, 5.0, 25.0) is None


def test_an_arms_view_from_its_sums():
    """Rewards 1 and 3: mean 2, s² = 2, half width 1.959964·sqrt(2/2)."""
    name = str(STUDENT_ARM)
    sums = {"answers": "4", "exposures": "5", "forced": "2", "scored": "2", "reward_sum": "4", "reward_sq": "10"}
    sums |= {"completion_tokens": "40", "candidate_tokens": "60", "engine_seconds": "2"}
    view = arm_object(ExperimentArm(arm=STUDENT_ARM, weight=5000), {f"{name}|{key}": sums[key] for key in sums})
    assert (view["exposures"], view["forced"], view["answers"]) == (5, 2, 4)
    assert view["reward"]["low"] == pytest.approx(2 - 1.959964)
    assert view["completion_tokens_per_answer"] == 10
    assert view["candidate_tokens_per_answer"] == 15
    assert view["engine_seconds_per_answer"] == 0.5


def test_an_arm_nobody_met_has_no_averages():
    view = arm_object(ExperimentArm(arm=STUDENT_ARM, weight=5000), {})
    assert (view["exposures"], view["reward"], view["engine_seconds_per_answer"]) == (0, None, None)

"""The breaker of one engine, driven by a clock that the test holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.breaker import (
    FAILED_CALLS,
    FIRST_PAUSE_SECONDS,
    LAST_CALLS,
    LONGEST_PAUSE_SECONDS,
    LONGEST_PROBE_SECONDS,
    Breaker,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    breaker.trip()
    return breaker


def half_opened(clock: Clock) -> Breaker:
    breaker = opened(clock)
    clock.now = breaker.probe_at
    assert breaker.try_probe()
    return breaker


@given(st.lists(st.booleans(), max_size=60))
def test_it_opens_with_the_first_call_that_makes_five_failures_among_the_last_ten(outcomes: list[bool]):
    breaker = Breaker(Clock())
    opens_at = next(
        (i for i in range(len(outcomes)) if sum(outcomes[max(0, i + 1 - LAST_CALLS) : i + 1]) >= FAILED_CALLS), None
    )
    for i, failed in enumerate(outcomes):
        breaker.count(breaker.epoch, failed=failed)
        assert (breaker.state == "open") == (opens_at is not None and i >= opens_at)


def test_one_failed_canary_opens_it():
    assert opened(Clock()).state == "open"


def test_one_probe_goes_when_the_pause_is_over_and_no_second_one_before_it_ended():
    clock = Clock()
    breaker = opened(clock)
    clock.now += FIRST_PAUSE_SECONDS - 0.001
    assert not breaker.try_probe()
    clock.now += 0.001
    assert breaker.try_probe()
    assert breaker.state == "half_open"
    assert not breaker.try_probe()


def test_a_closed_breaker_needs_no_probe():
    assert not Breaker(Clock()).try_probe()


def test_each_failed_probe_doubles_the_pause_up_to_the_longest():
    clock = Clock()
    breaker = opened(clock)
    pauses = []
    for _ in range(6):
        pauses.append(breaker.probe_at - clock.now)
        clock.now = breaker.probe_at
        assert breaker.try_probe()
        breaker.trip()
    assert pauses == [1, 2, 4, 8, 10, 10]
    assert max(pauses) == LONGEST_PAUSE_SECONDS


def test_after_a_good_probe_the_past_is_forgotten_and_the_pause_begins_anew():
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILED_CALLS):
        breaker.count(breaker.epoch, failed=True)
    clock.now = breaker.probe_at
    assert breaker.try_probe()
    breaker.close()
    for _ in range(FAILED_CALLS - 1):
        breaker.count(breaker.epoch, failed=True)
        assert breaker.state == "closed"
    breaker.count(breaker.epoch, failed=True)
    assert breaker.probe_at == clock.now + FIRST_PAUSE_SECONDS


def test_calls_that_began_before_it_opened_tell_nothing_after_it_closed():
    clock = Clock()
    breaker = Breaker(clock)
    began = breaker.epoch
    breaker.trip()
    clock.now = breaker.probe_at
    assert breaker.try_probe()
    breaker.close()
    for _ in range(LAST_CALLS):
        breaker.count(began, failed=True)
    assert breaker.state == "closed"


def test_what_ends_while_it_is_open_or_probed_changes_nothing():
    clock = Clock()
    for breaker in (opened(clock), half_opened(clock)):
        before = (breaker.state, breaker.epoch, breaker.probe_at)
        for failed in (True, False) * LAST_CALLS:
            breaker.count(breaker.epoch, failed=failed)
        assert (breaker.state, breaker.epoch, breaker.probe_at) == before


def test_an_engine_that_may_be_back_is_probed_at_once():
    clock = Clock()
    breaker = opened(clock)
    breaker.hasten()
    assert breaker.try_probe()


def test_a_probe_that_was_given_up_is_followed_by_another_at_once_and_its_failure_by_the_next_longer_pause():
    clock = Clock()
    breaker = half_opened(clock)
    before = breaker.epoch
    breaker.give_up()
    assert (breaker.state, breaker.epoch) == ("open", before)
    assert breaker.admits
    assert breaker.try_probe()
    breaker.trip()
    assert breaker.probe_at == clock.now + 2 * FIRST_PAUSE_SECONDS


def test_giving_up_what_is_no_probe_changes_nothing():
    clock = Clock()
    closed, waiting = Breaker(clock), opened(clock)
    for breaker in (closed, waiting):
        breaker.give_up()
    assert (closed.state, waiting.state, waiting.admits) == ("closed", "open", False)


def test_a_probe_that_tells_nothing_holds_up_the_next_one_for_half_a_minute_and_no_longer():
    clock = Clock()
    breaker = half_opened(clock)
    clock.now += LONGEST_PROBE_SECONDS - 0.001
    assert (breaker.admits, breaker.try_probe()) == (False, False)
    clock.now += 0.001
    assert breaker.try_probe()
    assert (breaker.state, breaker.admits) == ("half_open", False)


@given(st.lists(st.sampled_from(["fail", "pass", "trip", "wait", "probe", "close", "hasten", "give up"]), max_size=200))
def test_whatever_happens_a_probe_is_the_only_way_back(events: list[str]):
    clock = Clock()
    breaker = Breaker(clock)
    probed = False
    for event in events:
        before = breaker.state
        match event:
            case "fail" | "pass":
                breaker.count(breaker.epoch, failed=event == "fail")
            case "trip":
                breaker.trip()
            case "wait":
                clock.now += 3
            case "probe":
                probed = breaker.try_probe() or probed
            case "close":
                breaker.close()
            case "hasten":
                breaker.hasten()
            case "give up":
                breaker.give_up()
        if before != "closed" and breaker.state == "closed":
            assert probed
        if breaker.state == "open":
            probed = False
            assert breaker.probe_at <= clock.now + LONGEST_PAUSE_SECONDS

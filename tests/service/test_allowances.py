"""What a key may take in a minute and at once: never more than its limit, wherever the minute begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.allowances import MAX_IDLE_BOOKS, WINDOW_SECONDS, Allowances, TakingLimits
from service.errors import OverBudget, RateLimited


def of_tokens(limit: int) -> Allowances:
    return Allowances("key", TakingLimits(tokens_per_minute=limit))


def test_without_limits_everything_goes_and_no_header_is_told():
    books = Allowances("key", TakingLimits())
    for _ in range(1000):
        books.take("a", 10**9, 0.0)
    assert books.left("a", 0.0) == []


def test_a_request_is_charged_with_its_most_and_settled_with_what_was_drawn():
    books = of_tokens(100)
    books.take("a", 80, 0.0)
    with pytest.raises(RateLimited):
        books.take("a", 30, 0.0)
    books.settle("a", 80, 10, 1.0)
    books.take("a", 90, 1.0)
    with pytest.raises(RateLimited):
        books.take("a", 1, 1.0)


def test_what_was_not_carried_out_never_counted():
    books = Allowances("key", TakingLimits(requests_per_minute=1, tokens_per_minute=100))
    books.take("a", 100, 0.0)
    books.give_back("a", 100)
    books.take("a", 100, 0.0)


def test_all_that_is_a_minute_old_is_forgotten_at_once():
    books = of_tokens(100)
    for second in range(5):
        books.take("a", 20, float(second))
        books.settle("a", 20, 20, float(second))
    [left] = books.left("a", 5.0 + WINDOW_SECONDS)
    assert left.remaining == 100


def test_one_key_does_not_pay_for_another():
    books = of_tokens(100)
    books.take("a", 100, 0.0)
    books.take("b", 100, 0.0)


def test_whoever_is_refused_is_told_when_enough_will_be_forgotten():
    """30 at 0.5 s and 50 at 10.5 s of a limit of 100: 40 more have room when the first are a minute old."""
    books = of_tokens(100)
    for drawn, at in ((30, 0.5), (50, 10.5)):
        books.take("a", drawn, at)
        books.settle("a", drawn, drawn, at)
    with pytest.raises(RateLimited) as refused:
        books.take("a", 40, 20.0)
    # Second 0 ends at 1, and is a minute old at 61.
    assert refused.value.retry_after == 41
    with pytest.raises(RateLimited) as refused:
        books.take("a", 71, 20.0)
    assert refused.value.retry_after == 51
    with pytest.raises(RateLimited):
        books.take("a", 40, 60.9)
    books.take("a", 40, 61.0)


def test_a_request_that_can_never_be_is_over_budget_with_its_cost():
    with pytest.raises(OverBudget) as refused:
        of_tokens(100).take("a", 101, 0.0)
    assert refused.value.facts == {"tokens": 101, "limit": 100}
    with pytest.raises(OverBudget):
        Allowances("key", TakingLimits(tokens_in_flight=50)).take("a", 51, 0.0)


def test_tokens_at_once_are_free_again_as_soon_as_a_request_ends():
    books = Allowances("key", TakingLimits(tokens_in_flight=100))
    books.take("a", 60, 0.0)
    with pytest.raises(RateLimited):
        books.take("a", 60, 0.0)
    books.settle("a", 60, 60, 0.5)
    books.take("a", 60, 0.5)


def test_requests_of_a_minute_are_counted():
    books = Allowances("key", TakingLimits(requests_per_minute=2))
    for _ in range(2):
        books.take("a", 1, 0.0)
        books.settle("a", 1, 1, 0.0)
    with pytest.raises(RateLimited) as refused:
        books.take("a", 1, 5.0)
    assert refused.value.retry_after == 56


def test_the_headers_say_what_is_left_and_when_everything_is():
    books = Allowances("key", TakingLimits(requests_per_minute=10, tokens_per_minute=1000))
    books.take("a", 300, 0.0)
    books.settle("a", 300, 100, 5.0)
    books.take("a", 200, 6.0)
    requests, tokens = books.left("a", 6.0)
    assert requests.headers | tokens.headers == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "8",
        "x-ratelimit-reset-requests": "61s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "700",
        "x-ratelimit-reset-tokens": "61s",
    }
    assert [one.reset for one in books.left("b", 6.0)] == [0, 0]


def test_books_with_nothing_in_them_are_thrown_away():
    books = of_tokens(100)
    for key in range(3 * MAX_IDLE_BOOKS):
        books.take(str(key), 1, float(key))
        books.settle(str(key), 1, 1, float(key))
    assert len(books._books) <= MAX_IDLE_BOOKS + 1


REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 30),  # after the one before, s
        st.integers(1, 120),  # most
        st.floats(0, 1),  # drawn of it
        st.floats(0, 90),  # how long it runs, s
        st.booleans(),  # carried out
    ),
    max_size=60,
)


@given(REQUESTS)
def test_no_minute_has_more_than_the_limit_in_it(requests):
    """Drawn at the moment a request ends, which is when its tokens are out."""
    limit, now, books = 200, 0.0, of_tokens(200)
    running: list[tuple[float, int, int, bool]] = []
    drawn_at: list[tuple[float, int]] = []

    def end_until(moment: float) -> None:
        for end, most, drawn, is_carried_out in sorted(running):
            if end <= moment:
                running.remove((end, most, drawn, is_carried_out))
                if is_carried_out:
                    books.settle("a", most, drawn, end)
                    drawn_at.append((end, drawn))
                else:
                    books.give_back("a", most)

    for pause, most, share, seconds, is_carried_out in requests:
        now += pause
        end_until(now)
        try:
            books.take("a", most, now)
        except RateLimited:
            continue
        running.append((now + seconds, most, int(share * most), is_carried_out))
    end_until(float("inf"))
    for start, _ in drawn_at:
        assert sum(drawn for at, drawn in drawn_at if start <= at < start + WINDOW_SECONDS) <= limit

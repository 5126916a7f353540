"""What one key, or one tenant, may take: requests and tokens in a minute, and tokens at once.

Owns: the counts of one gateway process, and when somebody has something left. Does not own: the clock, which is handed
in; the queue that all share (fair_queue.py). Several gateways count each for itself.

A request counts with the most it can cost as long as it goes on, and with what it drew for a minute after it has ended.
So no minute has more than the limit in it, wherever that minute begins.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from service.errors import OverBudget, RateLimited

WINDOW_SECONDS: Final = 60
Whose = Literal["key", "tenant"]
MAX_IDLE_BOOKS: Final = 1000
"""With more books than this, those that have nothing in them are thrown away."""


class TakingLimits(NamedTuple):
    """Of every key, or of every tenant; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_in_flight: int | None = None


@dataclass
class _Book:
    """What somebody is doing, and did in the last minute."""

    requests: int = 0
    """Under way."""
    tokens: int = 0
    """The most they can cost."""
    ended_requests: Counter[int] = field(default_factory=Counter)
    """By the second of the clock in which they ended, the earliest first."""
    ended_tokens: Counter[int] = field(default_factory=Counter)

    def forget(self, now: float) -> None:
        for ended in (self.ended_requests, self.ended_tokens):
            while ended and _forgotten_at(earliest := next(iter(ended))) <= now:
                del ended[earliest]

    @property
    def is_empty(self) -> bool:
        return not (self.requests or self.ended_requests)


def _forgotten_at(second: int) -> int:
    """A whole second is forgotten when its end is a minute old."""
    return second + 1 + WINDOW_SECONDS


class Left(NamedTuple):
    """Of one limit."""

    what: Literal["requests", "tokens"]
    limit: int
    remaining: int
    reset: int
    """Seconds until nothing counts any more."""

    @property
    def headers(self) -> dict[str, str]:
        """`x-ratelimit-…` as OpenAI names them."""
        return {
            f"x-ratelimit-limit-{self.what}": str(self.limit),
            f"x-ratelimit-remaining-{self.what}": str(self.remaining),
            f"x-ratelimit-reset-{self.what}": f"{self.reset}s",
        }


class Allowances:
    """The books of all keys, or of all tenants."""

    def __init__(self, whose: Whose, limits: TakingLimits) -> None:
        self._whose = whose
        self._limits = limits
        self._books: dict[str, _Book] = {}

    def take(self, name: str, most: int, now: float) -> None:
        """Count a request that begins and may cost `most` tokens. Raises OverBudget when it alone is above a limit,
        RateLimited when there is not enough left; then nothing is counted."""
        self._require_possible(most)
        book = self._book(name, now)
        for limit, wanted, ended, of_what in (
            (self._limits.requests_per_minute, book.requests + 1, book.ended_requests, "requests"),
            (self._limits.tokens_per_minute, book.tokens + most, book.ended_tokens, "tokens"),
        ):
            if limit is not None and (seconds := _seconds_until(wanted, ended, limit, now)):
                raise _limited(
                    f"this {self._whose} may have {limit} {of_what} in a minute, and has not enough left", seconds
                )
        if self._limits.tokens_in_flight is not None and book.tokens + most > self._limits.tokens_in_flight:
            raise _limited(f"this {self._whose} may have {self._limits.tokens_in_flight} tokens under way at once", 1)
        book.requests += 1
        book.tokens += most

    def give_back(self, name: str, most: int) -> None:
        """A request that was taken was not carried out: it never counted."""
        book = self._books[name]
        book.requests -= 1
        book.tokens -= most

    def settle(self, name: str, most: int, drawn: int, now: float) -> None:
        """A request that was taken has ended and drew so many tokens."""
        self.give_back(name, most)
        book = self._book(name, now)
        book.ended_requests[math.floor(now)] += 1
        book.ended_tokens[math.floor(now)] += drawn

    def left(self, name: str, now: float) -> list[Left]:
        """Of the limits that there are in a minute."""
        book = self._book(name, now)
        requests, tokens = self._limits.requests_per_minute, self._limits.tokens_per_minute
        found = []
        if requests is not None:
            found.append(_left("requests", book.requests, book.ended_requests, requests, now))
        if tokens is not None:
            found.append(_left("tokens", book.tokens, book.ended_tokens, tokens, now))
        return found

    def _require_possible(self, most: int) -> None:
        for limit, of_what in (
            (self._limits.tokens_per_minute, "in a minute"),
            (self._limits.tokens_in_flight, "under way at once"),
        ):
            if limit is not None and most > limit:
                error = OverBudget(
                    f"this request may cost {most} tokens (prompt + n × max_tokens); a {self._whose} may have {limit} "
                    f"{of_what}",
                    facts={"tokens": most, "limit": limit},
                )
                error.retry_after = WINDOW_SECONDS
                raise error

    def _book(self, name: str, now: float) -> _Book:
        if len(self._books) > MAX_IDLE_BOOKS:
            for other in self._books.values():
                other.forget(now)
            self._books = {other: book for other, book in self._books.items() if not book.is_empty}
        book = self._books.get(name)
        if book is None:
            book = self._books[name] = _Book()
        book.forget(now)
        return book


def _limited(message: str, seconds: int) -> RateLimited:
    error = RateLimited(message)
    error.retry_after = seconds
    return error


def _seconds_until(wanted: int, ended: Mapping[int, int], limit: int, now: float) -> int:
    """Until `wanted` has room beside what ended in the last minute; 0 when it has now. What still goes on is taken to
    end in this moment."""
    excess = wanted + sum(ended.values()) - limit
    if excess <= 0:
        return 0
    for second, amount in ended.items():
        excess -= amount
        if excess <= 0:
            return math.ceil(_forgotten_at(second) - now)
    return WINDOW_SECONDS


def _left(
    what: Literal["requests", "tokens"], under_way: int, ended: Mapping[int, int], limit: int, now: float
) -> Left:
    used = under_way + sum(ended.values())
    newest = math.floor(now) if under_way else max(ended, default=None)
    reset = 0 if newest is None else math.ceil(_forgotten_at(newest) - now)
    return Left(what, limit, max(0, limit - used), reset)

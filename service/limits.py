"""Admission: whether and when a request for text may begin. Before that nothing is spent on it.

Owns: waiting for a turn, how long that is worth while, the refusals and when to come back after one. Does not own:
whose turn it is (fair_queue.py), what a key may take (allowances.py), what a request costs (request_cost.py).
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from typing import Any, Final

from bon_algos.contracts import CandidateGroup
from service.access import Caller
from service.allowances import Allowances
from service.errors import GatewayError, Overloaded, RateLimited
from service.fair_queue import FairQueue, Ticket
from service.request_cost import CompletionLengths, drawn_tokens

LONGEST_RETRY_SECONDS: Final = 600
MARGIN: Final = 0.8
"""Of a request's patience the expected wait may take so much: whoever is let in to wait should get his turn."""


class Admission:
    """A request and what its key is charged for it."""

    def __init__(self, most: int) -> None:
        self.charged = most
        """Tokens."""
        self.waited: float | None = None
        """Seconds until it was admitted; None: it never was."""
        self.group: CandidateGroup | None = None
        """What was drawn; None while that is not known."""


class Limits:
    """Admission of one gateway process."""

    def __init__(self, queue: FairQueue, allowances: Allowances) -> None:
        self._queue = queue
        self._allowances = allowances
        self._lengths = CompletionLengths()
        self._turns: dict[Ticket, asyncio.Future[None]] = {}
        self._refused = Counter({"overloaded": 0, "rate_limited": 0, "over_budget": 0})

    @asynccontextmanager
    async def admitted(
        self, caller: Caller, group: CandidateGroup, most_candidates: int, deadline: float
    ) -> AsyncGenerator[Admission]:
        """Holds a place for drawing this group's candidates, after waiting for it if need be. Whoever draws them puts
        them into the admission. most_candidates: that may be drawn. deadline: the request's, by the monotonic clock.

        Raises RateLimited, OverBudget, Overloaded.
        """
        cost = self._lengths.cost_of(group, most_candidates)
        try:
            with self._charged(caller.key_id, cost.most) as admission:
                async with self._in_flight(caller.key_id, cost.expected, deadline) as admission.waited:
                    yield admission
        except (Overloaded, RateLimited) as refusal:
            self._refused[refusal.code] += 1
            raise

    def headers(self, caller: Caller) -> dict[str, str]:
        """What a reply tells its caller of the limits that there are."""
        return self._allowances.headers(caller.key_id, monotonic())

    @property
    def status(self) -> dict[str, Any]:
        """What an operator is told."""
        return {
            "max_tokens_in_flight": self._queue.budget,
            "tokens_in_flight": self._queue.tokens_in_flight,
            "requests_in_flight": self._queue.num_in_flight,
            "tokens_waiting": self._queue.tokens_waiting,
            "requests_waiting": self._queue.num_waiting,
            "refused": dict(self._refused),
        }

    @contextmanager
    def _charged(self, key: str, most: int) -> Generator[Admission]:
        """Of an engine that failed a key got nothing, and pays nothing. Where the caller went away nobody knows what
        was drawn, and the most is charged: whoever leaves early must not get more than whoever stays."""
        self._allowances.take(key, most, monotonic())
        admission = Admission(most)
        try:
            yield admission
        except GatewayError:
            admission.charged = 0
            raise
        finally:
            if admission.group is not None:
                admission.charged = drawn_tokens(admission.group)
                self._lengths.note(admission.group)
            if admission.waited is None:
                self._allowances.give_back(key, most)
            else:
                self._allowances.settle(key, most, admission.charged, monotonic())

    @asynccontextmanager
    async def _in_flight(self, key: str, cost: int, deadline: float) -> AsyncGenerator[float]:
        """The seconds that were waited, when the turn has come."""
        entered = monotonic()
        patience = self._patience(deadline - entered)
        if not self._queue.fits(cost):
            self._require_worth_waiting(key, cost, patience)
        ticket = self._queue.enter(key, cost)
        try:
            await self._turn(ticket, patience)
            yield monotonic() - entered
        finally:
            self._queue.leave(ticket, monotonic())
            self._admit()

    async def _turn(self, ticket: Ticket, patience: float) -> None:
        turn = self._turns[ticket] = asyncio.get_running_loop().create_future()
        self._admit()
        try:
            if not turn.done():
                async with asyncio.timeout(patience):
                    await turn
        except TimeoutError:
            raise self._overloaded(ticket.key, ticket.cost) from None
        finally:
            del self._turns[ticket]

    def _admit(self) -> None:
        for ticket in self._queue.admit(monotonic()):
            # Not there: its request is giving up in this moment, and leaves.
            if (turn := self._turns.get(ticket)) is not None and not turn.done():
                turn.set_result(None)

    def _patience(self, seconds_left: float) -> float:
        """How long a request may wait: so that it can still be answered in time, if all goes as it did of late; but
        half of its time at least, for it may be shorter than the others."""
        return max(seconds_left - self._queue.seconds_in_flight, seconds_left / 2)

    def _require_worth_waiting(self, key: str, cost: int, patience: float) -> None:
        if not self._queue.has_room(key, cost) or self._queue.expected_wait(key, cost) > MARGIN * patience:
            raise self._overloaded(key, cost)

    def _overloaded(self, key: str, cost: int) -> Overloaded:
        wait = math.ceil(self._queue.expected_wait(key, cost))
        seconds = min(max(1, wait), LONGEST_RETRY_SECONDS)
        error = Overloaded(f"the gateway is full: a request of {cost} tokens would begin in about {seconds} s")
        error.retry_after = seconds
        return error

"""Admission: whether and when a request for text may begin. Before that nothing is spent on it.

Owns: waiting for a turn, how long that is worth while, the refusals and when to come back after one. Does not own:
whose turn it is (fair_queue.py), what a key and a tenant may take (allowances.py), what a request costs
(request_cost.py).
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from time import monotonic
from typing import Any, Final

from bon_algos.contracts import CandidateGroup
from service.access import Caller
from service.allowances import Allowances
from service.errors import AnswerTooLong, GatewayError, Overloaded, RateLimited
from service.fair_queue import FairQueue, Owner, Ticket
from service.request_cost import CompletionLengths, drawn_tokens

LONGEST_RETRY_SECONDS: Final = 600
MARGIN: Final = 0.8
"""Of a request's patience the expected wait may take so much: whoever is let in to wait should get his turn."""


SHADOW_KEY: Final = "shadow"
"""The caller that draws shadows: it takes a key's turns, and no tenant is charged for what nobody asked for."""


class Admission:
    """A request and what is charged for it."""

    def __init__(self, most: int) -> None:
        self.charged = most
        """Tokens."""
        self.waited: float | None = None
        """Seconds until it was admitted; None: it never was."""
        self.group: CandidateGroup | None = None
        """What was drawn; None while that is not known."""


class Limits:
    """Admission of one gateway process."""

    def __init__(self, queue: FairQueue, of_keys: Allowances, of_tenants: Allowances) -> None:
        self._queue = queue
        self._of_keys = of_keys
        self._of_tenants = of_tenants
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
        admission = Admission(cost.most)
        try:
            with ExitStack() as charged:
                for books, name in self._accounts(caller):
                    charged.enter_context(_charged(books, name, cost.most, admission))
                async with self._in_flight(Owner(caller.tenant, caller.key_id), cost.expected, deadline) as waited:
                    admission.waited = waited
                    yield admission
        except (Overloaded, RateLimited) as refusal:
            self._refused[refusal.code] += 1
            raise
        finally:
            if admission.group is not None:
                self._lengths.note(admission.group)

    def headers(self, caller: Caller) -> dict[str, str]:
        """What a reply tells its caller of the limits that there are: of its key's and its tenant's the one that leaves
        less."""
        now, told = monotonic(), dict[str, str]()
        left = [one for books, name in self._accounts(caller) for one in books.left(name, now)]
        for one in sorted(left, key=lambda one: one.remaining, reverse=True):
            told |= one.headers
        return told

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

    def _accounts(self, caller: Caller) -> list[tuple[Allowances, str]]:
        """What a request counts in."""
        of_key = (self._of_keys, caller.key_id)
        return [of_key] if caller.key_id == SHADOW_KEY else [of_key, (self._of_tenants, caller.tenant)]

    @asynccontextmanager
    async def _in_flight(self, owner: Owner, cost: int, deadline: float) -> AsyncGenerator[float]:
        """The seconds that were waited, when the turn has come."""
        entered = monotonic()
        patience = self._patience(deadline - entered)
        if not self._queue.fits(cost):
            self._require_worth_waiting(owner, cost, patience)
        ticket = self._queue.enter(owner, cost)
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
            raise self._overloaded(ticket.owner, ticket.cost) from None
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

    def _require_worth_waiting(self, owner: Owner, cost: int, patience: float) -> None:
        if not self._queue.has_room(owner, cost) or self._queue.expected_wait(owner, cost) > MARGIN * patience:
            raise self._overloaded(owner, cost)

    def _overloaded(self, owner: Owner, cost: int) -> Overloaded:
        wait = math.ceil(self._queue.expected_wait(owner, cost))
        seconds = min(max(1, wait), LONGEST_RETRY_SECONDS)
        error = Overloaded(f"the gateway is full: a request of {cost} tokens would begin in about {seconds} s")
        error.retry_after = seconds
        return error


@contextmanager
def _charged(books: Allowances, name: str, most: int, admission: Admission) -> Generator[None]:
    """Of an engine that failed nobody got anything, and nobody pays. Where the caller went away nobody knows what was
    drawn, and the most is charged: whoever leaves early must not get more than whoever stays. So it is where the answer
    was too long for us: the engine did all that work."""
    books.take(name, most, monotonic())
    try:
        yield
    except AnswerTooLong:
        raise
    except GatewayError:
        admission.charged = 0
        raise
    finally:
        if admission.group is not None:
            admission.charged = drawn_tokens(admission.group)
        if admission.waited is None:
            books.give_back(name, most)
        else:
            books.settle(name, most, admission.charged, monotonic())

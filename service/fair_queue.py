"""Who is next when there is not room for everybody: start-time fair queueing over keys, in tokens.

Owns: the tokens in flight and waiting, the order of admission, how much of the queue one key may fill, how long a wait
will be. Does not own: the clock, which is handed in; what a token is, what waits, what a refusal is called (limits.py).

Each key has a line. The head of a line has a virtual start: where the key's service before it ended, but never before
the start that was admitted last, so nobody saves up turns. The least start is admitted next (Goyal, Vin and Cheng,
1996). Two keys that both wait therefore never differ by more than one request of each, and a key that comes new is
behind at most one request of every other key, however many those have waiting.

Whoever is next is waited for until it fits: smaller requests behind it are not squeezed in, or a large one would wait
for ever. A request larger than the whole budget runs alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

MAX_WAITING: Final = 4096
"""Requests; a waiting request fills at least this share of the queue, however few tokens it costs."""
REMEMBERED: Final = 0.95
"""Weight of what was known of the time in flight when one more request has finished."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request, waiting or in flight."""

    key: str
    cost: int
    """Tokens, at least 1."""
    number: int
    """In order of arrival."""
    admitted_at: float | None = None


@dataclass(slots=True)
class _Line:
    """What waits of one key, in order of arrival; never empty."""

    start: int
    """Virtual time of its head."""
    tickets: OrderedDict[Ticket, None] = field(default_factory=OrderedDict)
    tokens: int = 0
    filled: int = 0
    """Tokens of the queue's room."""

    @property
    def head(self) -> Ticket:
        return next(iter(self.tickets))


class FairQueue:
    """Times are seconds of any one clock that never goes back."""

    def __init__(self, budget: int, room: int) -> None:
        """budget: tokens in flight at once. room: tokens that may wait."""
        self.budget = budget
        self.room = room
        self.tokens_in_flight = 0
        self.num_in_flight = 0
        self.num_waiting = 0
        self._lines: dict[str, _Line] = {}
        self._ends: dict[str, int] = {}
        """Virtual end of the last service of keys that were served not long ago."""
        self._virtual = 0
        self._arrivals = 0
        self._finished_tokens = self._finished_token_seconds = 0.0

    @property
    def tokens_waiting(self) -> int:
        return sum(line.tokens for line in self._lines.values())

    @property
    def seconds_in_flight(self) -> float:
        """How long a token has been in flight of late; 0 before anything has finished."""
        return self._finished_token_seconds / self._finished_tokens if self._finished_tokens else 0.0

    def fits(self, cost: int) -> bool:
        """Whether a request would be in flight at once."""
        return not self._lines and self._fits(cost)

    def has_room(self, key: str, cost: int) -> bool:
        """Whether a request may wait. A key may fill as much as all keys have left free: one alone fills half of the
        queue, and whoever comes new always finds some (Choudhury and Hahne, 1998)."""
        free = self.room - sum(line.filled for line in self._lines.values())
        own = self._lines[key].filled if key in self._lines else 0
        # A request larger than the room may wait alone, as one larger than the budget may run alone.
        return own + self._filling(cost) <= free or (self.room > 0 and not self._lines)

    def expected_wait(self, key: str, cost: int) -> float:
        """Seconds until a request of this key would be admitted, if nobody else comes: the tokens that must leave
        before, at the pace at which a full budget turns over (Little's law)."""
        if self.fits(cost):
            return 0.0
        must_leave = self.tokens_in_flight + self._ahead(key) + min(cost, self.budget) - self.budget
        return self.seconds_in_flight * max(0, must_leave) / self.budget

    def enter(self, key: str, cost: int) -> Ticket:
        """Wait at the end of the key's line."""
        ticket = Ticket(key, cost, self._arrivals)
        self._arrivals += 1
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(self._next_start(key))
        line.tickets[ticket] = None
        line.tokens += cost
        line.filled += self._filling(cost)
        self.num_waiting += 1
        return ticket

    def admit(self, now: float) -> list[Ticket]:
        """Everything that is in flight from now on, in its order."""
        admitted = []
        while self._lines:
            line = min(self._lines.values(), key=lambda line: (line.start, line.head.number))
            ticket = line.head
            if not self._fits(ticket.cost):
                break
            self._drop(ticket)
            self._virtual = line.start
            line.start += ticket.cost
            self._ends[ticket.key] = line.start
            self.tokens_in_flight += ticket.cost
            self.num_in_flight += 1
            ticket.admitted_at = now
            admitted.append(ticket)
        self._forget()
        return admitted

    def leave(self, ticket: Ticket, now: float) -> None:
        """Done, or waiting no longer."""
        if ticket.admitted_at is None:
            self._drop(ticket)
            return
        self.tokens_in_flight -= ticket.cost
        self.num_in_flight -= 1
        self._finished_tokens = REMEMBERED * self._finished_tokens + ticket.cost
        token_seconds = ticket.cost * (now - ticket.admitted_at)
        self._finished_token_seconds = REMEMBERED * self._finished_token_seconds + token_seconds

    def _fits(self, cost: int) -> bool:
        return not self.num_in_flight or self.tokens_in_flight + cost <= self.budget

    def _filling(self, cost: int) -> int:
        return max(cost, self.room // MAX_WAITING)

    def _next_start(self, key: str) -> int:
        return max(self._virtual, self._ends.get(key, 0))

    def _ahead(self, key: str) -> int:
        """Tokens that would be admitted before one more request of this key, to within one request of every key."""
        line = self._lines.get(key)
        own = 0 if line is None else line.tokens
        start = self._next_start(key) if line is None else line.start + own
        others = (other for other in self._lines.values() if other is not line)
        return own + sum(min(other.tokens, max(0, start - other.start)) for other in others)

    def _drop(self, ticket: Ticket) -> None:
        line = self._lines[ticket.key]
        del line.tickets[ticket]
        line.tokens -= ticket.cost
        line.filled -= self._filling(ticket.cost)
        self.num_waiting -= 1
        if not line.tickets:
            del self._lines[ticket.key]

    def _forget(self) -> None:
        """An end that lies behind the virtual time says nothing any more."""
        if len(self._ends) > 2 * len(self._lines) + MAX_WAITING:
            self._ends = {key: end for key, end in self._ends.items() if end > self._virtual}

"""Who is next when there is not room for everybody: start-time fair queueing over tenants and their keys, in tokens.

Owns: the tokens in flight and waiting, the order of admission, how much of the queue one key and one tenant may fill,
how long a wait will be. Does not own: the clock, which is handed in; what a token is, what waits, what a refusal is
called (limits.py).

Each key has a line, and so has each tenant, of its keys' lines. A line has a virtual start: where its service before it
ended, but never before the start that was admitted last, so nobody saves up turns. Of all tenants' lines the one with
the least start is next, and of its keys' lines again that with the least (Goyal, Vin and Cheng, 1996; two levels of it,
Bennett and Zhang, 1996). Two tenants that both wait therefore never differ by more than one request of each, however
many keys they have, nor do two keys of one tenant; and whoever comes new is behind at most one request of every other.

Whoever is next is waited for until it fits: smaller requests behind it are not squeezed in, or a large one would wait
for ever. A request larger than the whole budget runs alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

MAX_WAITING: Final = 4096
"""Requests; a waiting request fills at least this share of the queue, however few tokens it costs."""
REMEMBERED: Final = 0.95
"""Weight of what was known of the time in flight when one more request has finished."""


class Owner(NamedTuple):
    """Whose turn it is that a request takes."""

    tenant: str
    key: str


@dataclass(eq=False, slots=True)
class Ticket:
    """One request, waiting or in flight."""

    owner: Owner
    cost: int
    """Tokens, at least 1."""
    number: int
    """In order of arrival."""
    admitted_at: float | None = None


@dataclass(slots=True)
class _Line:
    """What waits of one key; never empty."""

    start: int
    """Virtual time of its head."""
    tickets: OrderedDict[Ticket, None] = field(default_factory=OrderedDict)
    """In order of arrival."""
    tokens: int = 0
    filled: int = 0
    """Tokens of the queue's room."""

    @property
    def head(self) -> Ticket:
        return next(iter(self.tickets))


@dataclass(slots=True)
class _TenantLine:
    """What waits of one tenant; never empty."""

    start: int
    keys: _Lines[_Line]
    tokens: int = 0
    filled: int = 0

    @property
    def head(self) -> Ticket:
        return self.keys.first.head


LineT = TypeVar("LineT", _Line, _TenantLine)


class _Lines(Generic[LineT]):
    """The lines of one level, by name, and their virtual time."""

    def __init__(self) -> None:
        self.waiting: dict[str, LineT] = {}
        self.ends: dict[str, int] = {}
        """Virtual end of the last service of those that were served not long ago."""
        self._virtual = 0

    @property
    def first(self) -> LineT:
        return min(self.waiting.values(), key=lambda line: (line.start, line.head.number))

    def next_start(self, name: str) -> int:
        return max(self._virtual, self.ends.get(name, 0))

    def serve(self, name: str, line: LineT, cost: int) -> None:
        self._virtual = line.start
        line.start += cost
        self.ends[name] = line.start
        if len(self.ends) > 2 * len(self.waiting) + MAX_WAITING:
            # An end that lies behind the virtual time says nothing any more.
            self.ends = {name: end for name, end in self.ends.items() if end > self._virtual}

    def ahead(self, name: str, own: int) -> int:
        """Tokens that would be admitted before one more request of this name with `own` of its own before it, to within
        one request of every name."""
        line = self.waiting.get(name)
        start = self.next_start(name) if line is None else line.start + own
        others = (other for other in self.waiting.values() if other is not line)
        return own + sum(min(other.tokens, max(0, start - other.start)) for other in others)


class FairQueue:
    """Times are seconds of any one clock that never goes back."""

    def __init__(self, budget: int, room: int) -> None:
        """budget: tokens in flight at once. room: tokens that may wait."""
        self.budget = budget
        self.room = room
        self.tokens_in_flight = 0
        self.num_in_flight = 0
        self.num_waiting = 0
        self._tenants: _Lines[_TenantLine] = _Lines()
        self._keys: dict[str, _Lines[_Line]] = {}
        """By tenant, of those that were served not long ago too."""
        self._arrivals = 0
        self._finished_tokens = self._finished_token_seconds = 0.0

    @property
    def tokens_waiting(self) -> int:
        return sum(line.tokens for line in self._tenants.waiting.values())

    @property
    def seconds_in_flight(self) -> float:
        """How long a token has been in flight of late; 0 before anything has finished."""
        return self._finished_token_seconds / self._finished_tokens if self._finished_tokens else 0.0

    def fits(self, cost: int) -> bool:
        """Whether a request would be in flight at once."""
        return not self.num_waiting and self._fits(cost)

    def has_room(self, owner: Owner, cost: int) -> bool:
        """Whether a request may wait. What its key and its tenant fill may be as much as is left free, in the mean of
        both: one key alone fills half of the queue, a tenant two thirds however many keys it has, and whoever comes
        new always finds some (after Choudhury and Hahne, 1998)."""
        free = self.room - sum(line.filled for line in self._tenants.waiting.values())
        tenant = self._tenants.waiting.get(owner.tenant)
        key = None if tenant is None else tenant.keys.waiting.get(owner.key)
        own = sum(line.filled for line in (tenant, key) if line is not None)
        # A request larger than the room may wait alone, as one larger than the budget may run alone.
        return own + 2 * self._filling(cost) <= 2 * free or (self.room > 0 and not self.num_waiting)

    def expected_wait(self, owner: Owner, cost: int) -> float:
        """Seconds until a request of this key would be admitted, if nobody else comes: the tokens that must leave
        before, at the pace at which a full budget turns over (Little's law)."""
        if self.fits(cost):
            return 0.0
        must_leave = self.tokens_in_flight + self._ahead(owner) + min(cost, self.budget) - self.budget
        return self.seconds_in_flight * max(0, must_leave) / self.budget

    def enter(self, owner: Owner, cost: int) -> Ticket:
        """Wait at the end of the key's line."""
        ticket = Ticket(owner, cost, self._arrivals)
        self._arrivals += 1
        keys = self._keys.setdefault(owner.tenant, _Lines())
        key = keys.waiting.get(owner.key)
        if key is None:
            key = keys.waiting[owner.key] = _Line(keys.next_start(owner.key))
        key.tickets[ticket] = None
        tenant = self._tenants.waiting.get(owner.tenant)
        if tenant is None:
            tenant = _TenantLine(self._tenants.next_start(owner.tenant), keys)
            self._tenants.waiting[owner.tenant] = tenant
        for line in (tenant, key):
            line.tokens += cost
            line.filled += self._filling(cost)
        self.num_waiting += 1
        return ticket

    def admit(self, now: float) -> list[Ticket]:
        """Everything that is in flight from now on, in its order."""
        admitted = []
        while self.num_waiting:
            tenant = self._tenants.first
            key = tenant.keys.first
            ticket = key.head
            if not self._fits(ticket.cost):
                break
            self._drop(ticket)
            self._tenants.serve(ticket.owner.tenant, tenant, ticket.cost)
            tenant.keys.serve(ticket.owner.key, key, ticket.cost)
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

    def _ahead(self, owner: Owner) -> int:
        keys = self._keys.get(owner.tenant, _Lines[_Line]())
        line = keys.waiting.get(owner.key)
        return self._tenants.ahead(owner.tenant, keys.ahead(owner.key, 0 if line is None else line.tokens))

    def _drop(self, ticket: Ticket) -> None:
        tenant = self._tenants.waiting[ticket.owner.tenant]
        key = tenant.keys.waiting[ticket.owner.key]
        del key.tickets[ticket]
        for line in (tenant, key):
            line.tokens -= ticket.cost
            line.filled -= self._filling(ticket.cost)
        self.num_waiting -= 1
        if not key.tickets:
            del tenant.keys.waiting[ticket.owner.key]
        if not tenant.keys.waiting:
            del self._tenants.waiting[ticket.owner.tenant]

    def _forget(self) -> None:
        """Tenants of which neither a turn nor an end is known."""
        if len(self._keys) > len(self._tenants.waiting) + len(self._tenants.ends):
            known = self._tenants.waiting.keys() | self._tenants.ends.keys()
            self._keys = {name: keys for name, keys in self._keys.items() if name in known}

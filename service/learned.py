"""What strategies know of rewards: learned from the ledger in the background, one route at a time.

Owns: reading the groups that tell of it, once each, and learning again when there are enough new ones. Does not own:
the mathematics (`bon_algos.stopping`, `bon_algos.escalation`), the use of it (strategies.py).

Rules of strategy adaptive come from full groups of the base policy, the threshold of distilled_first from probes: none
of them ended as its rewards were. Every gateway learns for itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final, cast

import numpy as np
from redis.asyncio import Redis

from archive.reading import Archive, Question
from bon_algos.contracts import LEDGER_STREAM, Candidate, CandidateGroup, Route, of_tenant
from bon_algos.escalation import EscalationRule, Pair, learned_escalation
from bon_algos.ledger_entries import EntryId, UnreadableRecord, group_of
from bon_algos.stopping import LoggedDraws, StoppingRule, learned_rules, stops_of
from service.catalogue import Catalogue
from service.curve import unfit
from service.errors import StoreFull, StoreUnavailable
from service.ledger_reading import PAGE_ENTRIES, archive_pages
from service.store import translated

GROUPS_NEEDED: Final = 100
"""Full groups before drawing is stopped by what they tell."""
PAIRS_NEEDED: Final = 100
MOST_GROUPS: Final = 500
"""The newest of a route; older ones are forgotten."""
MOST_PAGES: Final = 100
"""Of the ledger, looked through for groups of a route that was not learned about before."""
MOST_ARCHIVED: Final = 20_000
"""Groups of the route, looked through in the archive."""
MOST_OF_N: Final = 4
"""Times the route's n that a request may draw, within the route's cap."""
NEWS_SHARE: Final = 0.1
"""Of what is known, new groups that make it worth learning again."""
DEFAULT_KEPT_GAIN: Final = 0.95
log = logging.getLogger("bonsai.learned")


@dataclass(frozen=True)
class Learned:
    """About one route."""

    groups: int = 0
    pairs: int = 0
    rules: Mapping[int, StoppingRule] = field(default_factory=dict)
    """By the n aimed at; none where stopping early saves nothing."""
    why_no_rules: str | None = f"0 of the {GROUPS_NEEDED} groups that stopping is learned from are logged"
    escalation: EscalationRule | None = None


class LearnedStrategies:
    """What one gateway process has learned."""

    def __init__(self, redis: Redis, archive: Archive, catalogue: Catalogue, *, seconds: float) -> None:
        """redis: one that answers in bytes. seconds: between two looks at the ledger."""
        self._redis, self._archive = redis, archive
        self._catalogue = catalogue
        self._seconds = seconds
        self._seen: dict[str, _Seen] = {}
        self._learned: dict[str, Learned] = {}
        self._newest = b""

    def of(self, route: Route) -> Learned:
        return self._learned.get(of_tenant(route.tenant, route.name), Learned())

    async def run(self) -> None:
        """Learn until cancelled."""
        while True:
            try:
                await self.look()
            except (StoreUnavailable, StoreFull) as error:
                log.warning("nothing is learned: %s", error.message)
            await asyncio.sleep(self._seconds)

    async def look(self) -> None:
        """Read what is new in the ledger, and learn where that is enough. Raises StoreUnavailable."""
        routes = {
            name: route
            for name, route in self._catalogue.snapshot.routes.items()
            if route.strategy in ("adaptive", "distilled_first")
        }
        for name in [name for name, seen in self._seen.items() if not seen.is_about(routes.get(name))]:
            del self._seen[name]
            self._learned.pop(name, None)
        await self._read_on()
        for name in routes.keys() - self._seen.keys():
            seen = _Seen(routes[name])
            await self._read_back(seen)
            self._seen[name] = seen
        for name, seen in self._seen.items():
            if seen.has_news:
                self._learned[name] = await asyncio.to_thread(seen.learned)

    async def _read_on(self) -> None:
        """What was logged since the last look."""
        while self._seen and (page := await self._page(b"(" + self._newest, forwards=True)):
            groups = await asyncio.to_thread(_groups, page)
            for group in groups:
                if (seen := self._seen.get(of_tenant(group.tenant, group.route))) is not None:
                    seen.add(group, is_newest=True)
            self._newest = page[-1][0]
        if not self._seen:
            newest = await self._page(b"+", forwards=False, count=1)
            self._newest = newest[0][0] if newest else b"0-0"

    async def _read_back(self, seen: _Seen) -> None:
        """What was logged before, newest first: in the stream, and behind it in the archive, where each route's groups
        lie by themselves."""
        before, oldest = self._newest, self._newest
        for _ in range(MOST_PAGES):
            page = await self._page(before, forwards=False)
            if not page or seen.is_full:
                break
            seen.add_older(await asyncio.to_thread(_groups, page))
            oldest = page[-1][0]
            before = b"(" + oldest
        try:
            await self._read_archive(seen, EntryId.parse(oldest))
        except StoreUnavailable as error:
            log.warning("of %s only what the stream holds is learned from: %s", seen.route.name, error.message)

    async def _read_archive(self, seen: _Seen, before: EntryId) -> None:
        # Where the stream is empty nothing of the archive is behind it.
        behind = before if before > EntryId(0, 0) else None
        question, looked = Question(("groups",), seen.route.tenant, seen.route.name, before=behind), 0
        async for page in archive_pages(self._archive, question):
            seen.add_older([cast(CandidateGroup, one.record) for one in page])
            looked += len(page)
            if seen.is_full or looked >= MOST_ARCHIVED:
                return

    async def _page(
        self, end: bytes, *, forwards: bool, count: int = PAGE_ENTRIES
    ) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Entries after `end`, or backwards from it."""
        with translated():
            if forwards:
                found: Any = await self._redis.xrange(LEDGER_STREAM, end, "+", count=count)
            else:
                found = await self._redis.xrevrange(LEDGER_STREAM, end, "-", count=count)
        return cast("list[tuple[bytes, dict[bytes, bytes]]]", found)


class _Seen:
    """What the ledger says of one route, in the form it is learned from."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._draws: deque[LoggedDraws] = deque(maxlen=MOST_GROUPS)
        self._pairs: deque[Pair] = deque(maxlen=MOST_GROUPS)
        self._news = 0

    def is_about(self, route: Route | None) -> bool:
        """Whether what is known still holds for the route as it is."""
        return route is not None and route.model_copy(update={"previous_policies": ()}) == self.route.model_copy(
            update={"previous_policies": ()}
        )

    @property
    def is_full(self) -> bool:
        known = self._draws if self.route.strategy == "adaptive" else self._pairs
        return len(known) == MOST_GROUPS

    @property
    def has_news(self) -> bool:
        return self._news > NEWS_SHARE * (len(self._draws) + len(self._pairs) - self._news)

    def add_older(self, groups: Iterable[CandidateGroup]) -> None:
        """As many of the route's as there is room for, newest first."""
        for group in groups:
            is_of_route = (group.tenant, group.route) == (self.route.tenant, self.route.name)
            if is_of_route and not self.is_full:
                self.add(group, is_newest=False)

    def add(self, group: CandidateGroup, *, is_newest: bool) -> None:
        pair = _pair(group, self.route)
        if pair is not None:
            (self._pairs.append if is_newest else self._pairs.appendleft)(pair)
        elif unfit(group, self.route, None) is None:
            (self._draws.append if is_newest else self._draws.appendleft)(_draws(group))
        else:
            return
        self._news += 1

    def learned(self) -> Learned:
        self._news = 0
        rules, why_not = self._rules()
        return Learned(len(self._draws), len(self._pairs), rules, why_not, self._escalation())

    def _rules(self) -> tuple[Mapping[int, StoppingRule], str | None]:
        route, known = self.route, len(self._draws)
        if known < GROUPS_NEEDED:
            return {}, f"{known} of the {GROUPS_NEEDED} groups that stopping is learned from are logged"
        most = min(route.n_cap, MOST_OF_N * route.default_n)
        try:
            return learned_rules(list(self._draws), stops_of(route.default_n, most), range(2, most + 1)), None
        except ValueError:
            return {}, "the logged rewards of a prompt never differ, so stopping cannot be learned from them"

    def _escalation(self) -> EscalationRule | None:
        if len(self._pairs) < PAIRS_NEEDED:
            return None
        kept = DEFAULT_KEPT_GAIN if self.route.kept_gain is None else self.route.kept_gain
        return learned_escalation(list(self._pairs), kept)


def learned_object(route: Route, learned: Learned) -> dict[str, Any]:
    """What is known, as the API tells it. An infinite threshold is null."""
    rule, escalation = learned.rules.get(route.default_n), learned.escalation
    return {
        "object": "bonsai.strategy",
        "route": route.name,
        "strategy": route.strategy,
        "groups": learned.groups,
        "groups_needed": GROUPS_NEEDED,
        "probes": learned.pairs,
        "probes_needed": PAIRS_NEEDED,
        "adaptive": None
        if rule is None
        else {
            "n": route.default_n,
            "stops": list(rule.stops),
            "reward_per_token": rule.price,
            "token_share": rule.token_share,
        },
        "distilled_first": None
        if escalation is None
        else {
            "threshold": escalation.threshold if isfinite(escalation.threshold) else None,
            "escalated_share": escalation.escalated_share,
        },
    }


def _groups(entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> list[CandidateGroup]:
    groups = []
    for _, fields in entries:
        try:
            group = group_of(fields)
        except UnreadableRecord as error:
            # Of another version: it must not stop what is learned from all the others.
            log.error("%s", error)
            continue
        groups += [group] if group is not None else []
    return groups


def _draws(group: CandidateGroup) -> LoggedDraws:
    eligible = set(group.eligible)
    rewards = [one.reward if i in eligible else None for i, one in enumerate(group.candidates)]
    return LoggedDraws(np.array(rewards, dtype=np.float64), _lengths(group.candidates))


def _lengths(candidates: Sequence[Candidate]) -> Any:
    return np.array([max(1, len(candidate.token_ids)) for candidate in candidates], dtype=np.float64)


def _pair(group: CandidateGroup, route: Route) -> Pair | None:
    """What a probe tells of the live policy; None where the group is no probe, or not whole."""
    is_of_route = (group.policy_id, group.reward_model_id) == (route.best_of_n_policy, route.reward_model)
    if group.stop_reason != "probe" or not group.store or not is_of_route or len(group.scored) != group.requested:
        return None
    sample, *others = group.candidates
    if sample.policy_id != route.live_policy or not sample.is_complete or not group.sampling.is_policy_law:
        return None
    best = group.model_copy(update={"candidates": tuple(others)})
    return Pair(cast(float, sample.reward), cast(float, others[cast(int, best.best)].reward))

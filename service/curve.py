"""The n-curve of a route from its ledger: what best-of-k would have earned, for every k, without a further draw.

Owns: which logged groups tell of it, the estimate with its intervals, and the smallest k that is good enough. Does not
own: the estimator (`bon_algos.order`), HTTP (routes/routing.py).

Each group of n is n independent draws of the policy that the route's best-of-n draws from; only such groups are looked
at, for one that stopped early or lost candidates would bend the curve.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, NamedTuple, cast

import numpy as np
from redis.asyncio import Redis

from archive.reading import SKEW_SECONDS, Archive, Question
from bon_algos.contracts import CandidateGroup, Interval, Route
from bon_algos.ledger_entries import EntryId, UnreadableRecord, group_of
from bon_algos.order import mean_interval, n_curve
from bon_algos.serving_order import serving_ranks
from service.errors import Conflict
from service.ledger_reading import Entry, archive_pages, archived_to, stream_page

MOST_PAGES: Final = 200
"""Of the stream, newest first: what lies deeper and is not in the archive either is not looked for."""
MOST_ARCHIVED: Final = 200_000
"""Groups of the route that are looked at in the archive."""
DEFAULT_GROUPS: Final = 1000
MOST_GROUPS: Final = 5000
DEFAULT_LOSS: Final = 0.05


@dataclass(frozen=True)
class Curve:
    """Of one route; entry k − 1 belongs to best-of-k."""

    n: int
    groups: int
    prompts: int
    skipped: dict[str, int]
    reward: tuple[Interval, ...]
    missing: tuple[Interval, ...]
    """By how much best-of-k is below best-of-n; paired by prompt."""
    tokens_per_candidate: float

    def smallest(self, loss: float, *, is_sure: bool) -> int:
        """The least k that misses at most `loss` of what n gains over one sample, by the mean or by the upper end of
        its interval."""
        gain = self.missing[0].mean
        ends = [one.high if is_sure else one.mean for one in self.missing]
        return next(k for k, end in enumerate(ends, start=1) if end <= loss * gain or k == self.n)


class Draws(NamedTuple):
    """What a curve needs of a group: with all their tokens thousands would be gigabytes."""

    prompt: bytes
    """A digest of its tokens."""
    rewards: tuple[float, ...]
    is_complete: tuple[bool, ...]
    tokens: int
    """Of all candidates."""

    @classmethod
    def of(cls, group: CandidateGroup) -> Draws:
        return cls(
            blake2b(repr(group.prompt_token_ids).encode(), digest_size=16).digest(),
            tuple(cast(float, one.reward) for one in group.candidates),
            tuple(one.is_complete for one in group.candidates),
            sum(len(one.token_ids) for one in group.candidates),
        )


class Curves:
    """Reads the ledger for curves."""

    def __init__(self, redis: Redis, archive: Archive) -> None:
        """redis: one that answers in bytes."""
        self._redis, self._archive = redis, archive

    async def of(self, route: Route, *, num_groups: int, n: int | None, since: float = 0.0) -> Curve:
        """The curve of the newest groups of n candidates from `since` on; n None: of the most frequent n among them.

        Raises Conflict (too_few_groups) with fewer than two prompts, StoreUnavailable.
        """
        found = _Found(route, num_groups, n, since)
        before = await self._read_stream(found)
        if found.has_room:
            await self._read_archive(found, before)
        return await asyncio.to_thread(_curve, found.alike, found.skipped)

    async def _read_stream(self, found: _Found) -> EntryId | None:
        """What the archive does not have yet; the oldest entry that was read. What both have is read from the archive,
        which keeps routes apart: the stream holds everybody's groups, and must be read through for those of one."""
        since = EntryId(max(0, int((found.since - SKEW_SECONDS) * 1000)), 0)
        oldest = max(since, await archived_to(self._archive))
        newest, before = "+", None
        for _ in range(MOST_PAGES):
            page = await stream_page(self._redis, newest, f"({oldest}")
            if not page:
                break
            before = EntryId.parse(page[-1][0])
            newest = f"({before}"
            # A page is many thousand candidates: reading it must not hold up requests.
            await asyncio.to_thread(found.take_entries, page)
            if not found.has_room:
                break
        return before

    async def _read_archive(self, found: _Found, before: EntryId | None) -> None:
        route, looked = found.route, 0
        question = Question(("groups",), route.tenant, route.name, since=found.since, before=before)
        async for page in archive_pages(self._archive, question):
            await asyncio.to_thread(found.take, [cast(CandidateGroup, one.record) for one in page])
            looked += len(page)
            if not found.has_room or looked >= MOST_ARCHIVED:
                return


class _Found:
    """The groups that tell of a route's curve, and why others do not."""

    def __init__(self, route: Route, num_groups: int, n: int | None, since: float) -> None:
        self.route, self.since = route, since
        self._num_groups, self._n = num_groups, n
        self._of_n: dict[int, list[Draws]] = {}
        self._unfit: Counter[str] = Counter()

    @property
    def has_room(self) -> bool:
        return len(self._most) < self._num_groups

    @property
    def alike(self) -> list[Draws]:
        """The newest of the n asked for, or of the most frequent one."""
        return self._most[: self._num_groups]

    @property
    def skipped(self) -> Counter[str]:
        others = sum(map(len, self._of_n.values())) - len(self._most)
        return self._unfit + Counter(other_n=others)

    @property
    def _most(self) -> list[Draws]:
        return max(self._of_n.values(), key=len, default=[])

    def take_entries(self, entries: Iterable[Entry]) -> None:
        for _, fields in entries:
            try:
                group = group_of(fields)
            except UnreadableRecord:
                # Of another version: it must not take the curve away from all the others.
                self._unfit["unreadable"] += 1
                continue
            if group is not None and (group.tenant, group.route) == (self.route.tenant, self.route.name):
                self.take([group])

    def take(self, groups: Iterable[CandidateGroup]) -> None:
        """Groups of the route."""
        for group in groups:
            if group.created_at < self.since:
                continue
            reason = unfit(group, self.route, self._n)
            if reason is None:
                self._of_n.setdefault(group.requested, []).append(Draws.of(group))
            else:
                self._unfit[reason] += 1


def unfit(group: CandidateGroup, route: Route, n: int | None) -> str | None:
    """Why the route's group tells nothing of its best-of-n; None when it does. n None: of any n."""
    if group.policy_id != route.best_of_n_policy:
        return "other_policy"
    if group.reward_model_id != route.reward_model:
        return "other_reward_model"
    if not group.store:
        return "not_stored"
    if not group.sampling.is_policy_law:
        return "changed_law"
    if not group.is_fixed:
        return "not_fixed"
    if not group.is_unbiased:
        return "incomplete"
    if group.requested < 2 or n not in (None, group.requested):
        return "other_n"
    return None


def _curve(alike: Sequence[Draws], skipped: Counter[str]) -> Curve:
    """Of groups of one n."""
    prompts = [one.prompt for one in alike]
    if len(set(prompts)) < 2:
        raise Conflict(
            f"{len(set(prompts))} prompts of this route have groups to learn a curve from, and two are needed: serve "
            "requests with n of at least 2 first",
            code="too_few_groups",
            facts={"groups_found": len(alike), "skipped": dict(skipped)},
        )
    value_BM = np.array([one.rewards for one in alike])
    rank_BM = serving_ranks(value_BM, [one.is_complete for one in alike])
    curve = n_curve(value_BM, rank_BM, prompts)
    of_all_P = curve.value_PM[:, -1]
    return Curve(
        n=value_BM.shape[1],
        groups=len(alike),
        prompts=len(curve.value_PM),
        skipped=dict(skipped),
        reward=curve.intervals(),
        missing=tuple(mean_interval(of_all_P - of_k_P) for of_k_P in curve.value_PM.T),
        tokens_per_candidate=sum(one.tokens for one in alike) / value_BM.size,
    )


def curve_object(route: Route, curve: Curve, loss: float) -> dict[str, Any]:
    """The curve of the API."""
    return {
        "object": "bonsai.curve",
        "route": route.name,
        "policy": route.best_of_n_policy,
        "reward_model": route.reward_model,
        "n": curve.n,
        "groups": curve.groups,
        "prompts": curve.prompts,
        "skipped": curve.skipped,
        "points": [
            {"k": k, "reward": one.model_dump(), "candidate_tokens": k * curve.tokens_per_candidate}
            for k, one in enumerate(curve.reward, start=1)
        ],
        "within": {
            "loss": loss,
            "k": curve.smallest(loss, is_sure=False),
            "k_at_95": curve.smallest(loss, is_sure=True),
        },
    }

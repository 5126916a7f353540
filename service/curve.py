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
from typing import Any, Final, cast

import numpy as np
from redis.asyncio import Redis

from bon_algos.contracts import LEDGER_STREAM, CandidateGroup, Interval, Route
from bon_algos.ledger_entries import UnreadableRecord, group_of
from bon_algos.order import Array, best_of_k_values, mean_interval
from service.errors import Conflict
from service.store import translated

PAGE_ENTRIES: Final = 200
MOST_PAGES: Final = 200
"""Of the ledger, newest first: groups that lie deeper are not looked for."""
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


class Curves:
    """Reads the ledger for curves."""

    def __init__(self, redis: Redis) -> None:
        """redis: one that answers in bytes."""
        self._redis = redis

    async def of(self, route: Route, *, num_groups: int, n: int | None, since: float = 0.0) -> Curve:
        """The curve of the newest groups of n candidates from `since` on; n None: of the most frequent n among them.

        Raises Conflict (too_few_groups) with fewer than two prompts.
        """
        skipped: Counter[str] = Counter()
        chosen: list[CandidateGroup] = []
        newest = "+"
        for _ in range(MOST_PAGES):
            if len(chosen) >= num_groups:
                break
            with translated():
                page = cast(
                    "list[tuple[bytes, dict[bytes, bytes]]]",
                    await self._redis.xrevrange(LEDGER_STREAM, newest, "-", count=PAGE_ENTRIES),
                )
            if not page:
                break
            newest = f"({page[-1][0].decode()}"
            # A page is many thousand candidates: reading it must not hold up requests.
            fitting = await asyncio.to_thread(_fitting, [fields for _, fields in page], route, n, skipped)
            chosen += [group for group in fitting if group.created_at >= since]
        return await asyncio.to_thread(_curve, chosen[:num_groups], n, skipped)


def _fitting(
    entries: Iterable[dict[bytes, bytes]], route: Route, n: int | None, skipped: Counter[str]
) -> list[CandidateGroup]:
    chosen = []
    for fields in entries:
        try:
            group = group_of(fields)
        except UnreadableRecord:
            # Of another version: it must not take the curve away from all the others.
            skipped["unreadable"] += 1
            continue
        if group is None or (group.tenant, group.route) != (route.tenant, route.name):
            continue
        reason = unfit(group, route, n)
        if reason is None:
            chosen.append(group)
        else:
            skipped[reason] += 1
    return chosen


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


def _curve(groups: Sequence[CandidateGroup], n: int | None, skipped: Counter[str]) -> Curve:
    if n is None and groups:
        [(n, _)] = Counter(group.requested for group in groups).most_common(1)
    alike = [group for group in groups if group.requested == n]
    skipped["other_n"] += len(groups) - len(alike)
    prompts = [group.prompt_token_ids for group in alike]
    if n is None or len(set(prompts)) < 2:
        raise Conflict(
            f"{len(set(prompts))} prompts of this route have groups to learn a curve from, and two are needed: serve "
            "requests with n of at least 2 first",
            code="too_few_groups",
            facts={"groups_found": len(alike), "skipped": dict(+skipped)},
        )
    value_BM = np.array([[cast(float, one.reward) for one in group.candidates] for group in alike])
    curve_PM = _by_prompt(best_of_k_values(value_BM, _ranking(alike, value_BM)), prompts)
    lengths = [len(one.token_ids) for group in alike for one in group.candidates]
    return Curve(
        n=n,
        groups=len(alike),
        prompts=len(curve_PM),
        skipped=dict(+skipped),
        reward=tuple(mean_interval(column) for column in curve_PM.T),
        missing=tuple(mean_interval(curve_PM[:, -1] - column) for column in curve_PM.T),
        tokens_per_candidate=float(np.mean(lengths)),
    )


def _ranking(groups: Sequence[CandidateGroup], value_BM: Array) -> Array:
    """Numbers that order candidates as they are served: every incomplete one below every complete one."""
    is_complete_BM = np.array([[one.is_complete for one in group.candidates] for group in groups])
    width = value_BM.max() - value_BM.min() + 1.0
    ranking: Array = value_BM - np.where(is_complete_BM, 0.0, width)
    return ranking


def _by_prompt(curve_BM: Array, prompts: Sequence[tuple[int, ...]]) -> Array:
    """The mean of each prompt's rows: however often it was asked, it is one observation."""
    rows: dict[tuple[int, ...], list[Array]] = {}
    for prompt, row in zip(prompts, curve_BM, strict=True):
        rows.setdefault(prompt, []).append(row)
    return np.stack([np.mean(own, axis=0) for own in rows.values()])


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

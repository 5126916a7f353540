"""Logged candidates scored by another reward model, without generating a token: from the ledger to a report.

Owns: which groups are replayed, reading and scoring them page by page, patience with a reward model that has no room.
Does not own: the estimates (`bon_algos.replay`), how any of it is shown.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, cast

from redis.asyncio import Redis

from archive.reading import Archive, Question
from bon_algos.contracts import DEFAULT_TENANT, CandidateGroup, Record
from bon_algos.ledger_entries import EntryId, UnreadableRecord, group_of
from bon_algos.replay import Comparison, Reranked, compare, reranked
from bon_algos.scoring import Score
from service.errors import EngineBroken, RewardModelUnavailable
from service.ledger_reading import archive_pages, stream_page
from service.reward import RewardModel

AT_ONCE: Final = 8
"""Groups that are scored at the same time."""
CALL_SECONDS: Final = 600.0
PATIENCE_SECONDS: Final = 30.0
FIRST_PAUSE_SECONDS: Final = 0.25

Told = Callable[[int], None]
"""Hears how many groups have been replayed."""


class ReplayFailed(Exception):
    """There is nothing to report; the message says why."""


@dataclass(frozen=True)
class Window:
    """Which groups: the newest `num_groups` of the route that can be replayed."""

    route: str
    num_groups: int
    since: float | None = None
    """Seconds since the epoch."""
    tenant: str = DEFAULT_TENANT


class ReplayReport(Record):
    route: str
    since: float | None
    old_reward_model: str
    new_reward_model: str
    skipped: dict[str, int]
    """Groups that could not be replayed, by reason."""
    comparison: Comparison


@dataclass
class _Found:
    """What has been replayed so far; of each group a few numbers a candidate."""

    groups: list[Reranked] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    old_reward_model: str | None = None
    whole_policy: str | None = None
    """Groups of another one are no draws of the same law."""

    def rejects(self, group: CandidateGroup, window: Window) -> bool:
        """Whether it cannot be replayed; then it is counted."""
        reason = self._reason(group, window)
        if reason is None:
            self.old_reward_model = group.reward_model_id
        else:
            self.skipped[reason] += 1
        return reason is not None

    def _reason(self, group: CandidateGroup, window: Window) -> str | None:
        if window.since is not None and group.created_at < window.since:
            return "too_old"
        if not group.store:
            return "not_stored"
        if len(group.scored) < 2:
            return "fewer_than_two_rewards"
        if self.old_reward_model not in (None, group.reward_model_id):
            return "other_reward_model"
        return None

    def add(self, group: CandidateGroup, rewards: dict[int, float]) -> None:
        is_whole = group.is_unbiased and self.whole_policy in (None, group.policy_id)
        if is_whole:
            self.whole_policy = group.policy_id
        prompt = sha256(repr(group.prompt_token_ids).encode()).hexdigest()
        self.groups.append(reranked(group, prompt, rewards))
        self.whole.append(is_whole)


async def replay(redis: Redis, archive: Archive, reward_model: RewardModel, window: Window, told: Told) -> ReplayReport:
    """The report. redis: one that answers in bytes.

    Raises ReplayFailed, RewardModelUnavailable or StoreUnavailable.
    """
    found = _Found()
    async for page in _pages(redis, archive, window, found.skipped):
        usable = [group for group in page if not found.rejects(group, window)]
        for start in range(0, len(usable), AT_ONCE):
            room = window.num_groups - len(found.groups)
            part = usable[start : start + AT_ONCE][:room]
            await _replay_part(reward_model, part, found)
            told(len(found.groups))
        if len(found.groups) >= window.num_groups:
            break
    return _report(found, reward_model.model, window)


async def _replay_part(reward_model: RewardModel, part: Sequence[CandidateGroup], found: _Found) -> None:
    answers = await asyncio.gather(*(_rewards(reward_model, group) for group in part))
    for group, rewards in zip(part, answers, strict=True):
        if isinstance(rewards, str):
            found.skipped[rewards] += 1
        else:
            found.add(group, rewards)


async def _pages(
    redis: Redis, archive: Archive, window: Window, skipped: Counter[str]
) -> AsyncIterator[list[CandidateGroup]]:
    """The route's groups, newest first: those of the stream, then those of the archive that the stream has no more. No
    entry is older than the group in it."""
    newest, oldest = "+", "-" if window.since is None else str(max(0, int(window.since * 1000)))
    before: EntryId | None = None
    while page := await stream_page(redis, newest, oldest):
        before = EntryId.parse(page[-1][0])
        newest = f"({before}"
        groups = [_read(fields, skipped) for _, fields in page]
        asked = (window.tenant, window.route)
        yield [one for one in groups if one is not None and (one.tenant, one.route) == asked]
    question = Question(("groups",), window.tenant, window.route, since=window.since, before=before)
    async for archived in archive_pages(archive, question):
        yield [cast(CandidateGroup, one.record) for one in archived]


def _read(fields: dict[bytes, bytes], skipped: Counter[str]) -> CandidateGroup | None:
    try:
        return group_of(fields)
    except UnreadableRecord:
        skipped["unreadable"] += 1
        return None


async def _rewards(reward_model: RewardModel, group: CandidateGroup) -> dict[int, float] | str:
    """The new reward of each candidate that has an old one, by place; or why the group cannot be replayed."""
    places = [i for i, candidate in enumerate(group.candidates) if candidate.reward is not None]
    texts = [group.candidates[i].text for i in places]
    try:
        scores = await _patiently(reward_model, group, texts)
    except EngineBroken:
        return "reward_model_broken"
    rewards = {i: score.reward for i, score in zip(places, scores, strict=True) if score.reward is not None}
    if len(rewards) == len(places):
        return rewards
    return next(score.failure for score in scores if score.failure is not None)


async def _patiently(reward_model: RewardModel, group: CandidateGroup, texts: Sequence[str]) -> list[Score]:
    """A reward model that has no room now is asked again for a while."""
    loop = asyncio.get_running_loop()
    give_up, pause = loop.time() + PATIENCE_SECONDS, FIRST_PAUSE_SECONDS
    while True:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await reward_model.score(group.prompt, group.messages, texts)
        except TimeoutError:
            raise RewardModelUnavailable(f"the reward model did not answer within {CALL_SECONDS:g} s") from None
        except RewardModelUnavailable:
            if loop.time() + pause > give_up:
                raise
        await asyncio.sleep(pause)
        pause *= 2


def _report(found: _Found, new_reward_model: str, window: Window) -> ReplayReport:
    skipped = dict(+found.skipped)
    why = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    if not found.groups or found.old_reward_model is None:
        raise ReplayFailed(f"no group of route {window.route} can be replayed: {why or 'the ledger holds none'}")
    if len({group.prompt for group in found.groups}) < 2:
        rest = f"; others: {why}" if why else ""
        raise ReplayFailed(f"groups of two prompts are needed, and {len(found.groups)} of one can be replayed{rest}")
    return ReplayReport(
        route=window.route,
        since=window.since,
        old_reward_model=found.old_reward_model,
        new_reward_model=new_reward_model,
        skipped=skipped,
        comparison=compare(found.groups, found.whole),
    )

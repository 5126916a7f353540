"""Pages of the ledger, newest first: from the stream while it has them, then from the archive.

Owns: how far one request looks, joining late rewards and feedback, what a row shows to whom. Does not own: what is
asked (ledger_query.py), the archive's files (`archive`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, Final, NamedTuple, cast

from redis.asyncio import Redis

from archive.reading import Archive, Question
from archive.tables import SegmentSet, Stored
from bon_algos.contracts import LEDGER_STREAM, Candidate, CandidateGroup, Feedback, Outcome, feedback_key
from bon_algos.ledger_entries import EntryId, UnreadableRecord, record_of, with_outcome
from service.access import Caller
from service.feedback import feedback_object
from service.ledger_query import LedgerQuery, cursor_text, read_cursor, served_reward
from service.ledger_reading import PAGE_ENTRIES, Entry, archive_pages, stream_page
from service.store import translated

KINDS: Final[tuple[SegmentSet, ...]] = ("groups", "outcomes")
MOST_ENTRIES: Final = 20_000
"""Looked at for one request, the cursor goes on from there; and so many more of the stream for late rewards."""
OUTCOME_MILLISECONDS: Final = 120_000
"""A reward that was measured after the reply is delivered so soon after its group."""


class Row(NamedTuple):
    group: CandidateGroup
    feedback: tuple[Feedback, ...]


class Page(NamedTuple):
    rows: tuple[Row, ...]
    next_cursor: str | None
    """None: there is nothing further."""


class LedgerPages:
    """The ledger of one Redis and one archive, page by page."""

    def __init__(self, redis: Redis, archive: Archive, secret: bytes) -> None:
        """redis: one that answers in bytes. secret: what cursors are signed with."""
        self._redis = redis
        self._archive = archive
        self._secret = secret

    async def page(self, query: LedgerQuery, cursor: str | None, by: Caller) -> Page:
        """Raises InvalidField for a cursor of another question, StoreUnavailable."""
        before = None if cursor is None else read_cursor(cursor, query, by.tenant, self._secret)
        looked, rows = 0, list[tuple[EntryId, Row]]()
        outcomes = {} if before is None else await self._late_outcomes(before, by.tenant)
        last = before
        async for chunk in self._chunks(query, before, by.tenant):
            groups = _wanted(chunk, outcomes, query, by)
            rows += await self._with_feedback(groups, query)
            looked, last = looked + len(chunk), chunk[-1].entry
            if len(rows) > query.limit or looked >= MOST_ENTRIES:
                break
        else:
            last = None
        if len(rows) > query.limit:
            rows = rows[: query.limit]
            last = rows[-1][0]
        text = None if last is None else cursor_text(last, query, by.tenant, self._secret)
        return Page(tuple(row for _, row in rows), text)

    async def _chunks(self, query: LedgerQuery, before: EntryId | None, tenant: str) -> AsyncIterator[list[Stored]]:
        """Groups and outcomes beyond the cursor, newest first."""
        newest = "+" if before is None else f"({before}"
        while page := await stream_page(self._redis, newest):
            before = EntryId.parse(page[-1][0])
            newest = f"({before}"
            if chunk := await asyncio.to_thread(_decoded, page, (b"group", b"outcome")):
                yield chunk
        question = Question(KINDS, tenant, query.route, since=query.since, until=query.until, before=before)
        async for chunk in archive_pages(self._archive, question):
            yield chunk

    async def _late_outcomes(self, cursor: EntryId, tenant: str) -> dict[str, Outcome]:
        """Rewards that were delivered soon after the cursor's entry, by group."""
        end = EntryId(cursor.ms + OUTCOME_MILLISECONDS, 0)
        found: list[Stored] = []
        looked, after = 0, cursor
        while looked < MOST_ENTRIES and (page := await self._stream_from(f"({after}", f"({end}", PAGE_ENTRIES)):
            looked, after = looked + len(page), EntryId.parse(page[-1][0])
            found += await asyncio.to_thread(_decoded, page, (b"outcome",))
        oldest = await self._stream_from("-", "+", 1)
        hot = EntryId.parse(oldest[0][0]) if oldest else end
        if hot > cursor:  # the stream no longer has all of them
            question = Question(("outcomes",), tenant, before=min(hot, end), after=cursor)
            async for chunk in archive_pages(self._archive, question):
                found += chunk
        return {one.record.group_id: one.record for one in found if isinstance(one.record, Outcome)}

    async def _stream_from(self, oldest: str, newest: str, count: int) -> list[Entry]:
        """Oldest first."""
        with translated():
            found: Any = await self._redis.xrange(LEDGER_STREAM, oldest, newest, count=count)
        return cast("list[Entry]", found)

    async def _with_feedback(
        self, groups: Sequence[tuple[EntryId, CandidateGroup]], query: LedgerQuery
    ) -> list[tuple[EntryId, Row]]:
        if not groups or (query.has_feedback is None and "feedback" not in query.fields):
            return [(entry, Row(group, ())) for entry, group in groups]
        with translated():
            async with self._redis.pipeline(transaction=False) as pipe:
                for _, group in groups:
                    pipe.hvals(feedback_key(group.id))
                answers: list[list[bytes]] = await pipe.execute()
        rows = [
            (entry, Row(group, tuple(Feedback.model_validate_json(one) for one in said)))
            for (entry, group), said in zip(groups, answers, strict=True)
        ]
        return [one for one in rows if query.has_feedback in (None, bool(one[1].feedback))]


def _decoded(page: Sequence[Entry], kinds: Collection[bytes]) -> list[Stored]:
    """Entries of these kinds; what cannot be read shows nothing."""
    found = []
    for name, fields in page:
        if fields.get(b"kind") not in kinds:
            continue
        try:
            found.append(Stored(EntryId.parse(name), record_of(fields)))
        except UnreadableRecord:
            continue
    return found


def _wanted(
    chunk: Sequence[Stored], outcomes: dict[str, Outcome], query: LedgerQuery, by: Caller
) -> list[tuple[EntryId, CandidateGroup]]:
    """The caller's groups of a chunk that match, with the rewards that came later."""
    found = []
    for entry, record in chunk:
        if isinstance(record, Outcome):
            outcomes[record.group_id] = record
        if isinstance(record, CandidateGroup) and record.tenant == by.tenant and by.may_use(record.route):
            group = with_outcome(record, outcomes.pop(record.id, None))
            found += [(entry, group)] if query.matches(group) else []
    return found


def row_object(row: Row, fields: Sequence[str], *, shows_content: bool) -> dict[str, Any]:
    """A row of the API. Without the right to content its texts are null."""
    group = row.group
    told: dict[str, Any] = {
        "created_at": group.created_at,
        "route": group.route,
        "policy": group.policy_id,
        "reward_model": group.reward_model_id,
        "experiment": group.experiment,
        "arm": str(group.arm),
        "arm_reason": group.arm_reason,
        "session": group.session,
        "user": group.user,
        "requested": group.requested,
        "status": group.status,
        "stop_reason": group.stop_reason,
        "selected": group.selected,
        "reward": served_reward(group),
        "store": group.store,
        "sampling": group.sampling.model_dump(mode="json", exclude=None if shows_content else {"json_schema", "stop"}),
        "prompt": group.prompt if shows_content else None,
        "messages": [one.model_dump(mode="json") for one in group.messages or ()] if shows_content else None,
        "candidates": [_candidate_object(one, shows_content=shows_content) for one in group.candidates],
        "feedback": [_said(one, shows_content=shows_content) for one in row.feedback],
    }
    return {"object": "bonsai.ledger_group", "id": group.id, **{name: told[name] for name in fields}}


def _candidate_object(candidate: Candidate, *, shows_content: bool) -> dict[str, Any]:
    return {
        "text": candidate.text if shows_content else None,
        "tokens": len(candidate.token_ids),
        "logprob": sum(candidate.logprobs) if candidate.logprobs else None,
        "finish_reason": candidate.finish_reason,
        "reward": candidate.reward,
        "disagreement": candidate.disagreement,
        "failure": candidate.failure,
        "policy": candidate.policy_id,
    }


def _said(feedback: Feedback, *, shows_content: bool) -> dict[str, Any]:
    told = feedback_object(feedback)
    return told if shows_content else told | {"comment": None, "correction": None}

"""What people think of answers: checked against the group it is about, logged with it, the newest of each kept.

Owns: what feedback may say and about what, finding the group in the ledger, reading what counts. Does not own: its
delivery (ledger.py), HTTP (routes/feedback.py).

Late feedback is as good as early, as long as the ledger has the group. Said again by the same author about the same
thing, the newest counts and the log keeps all; what different authors say stands side by side.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from time import time
from typing import Annotated, Any, Final, cast

from pydantic import Field
from redis.asyncio import Redis
from uuid_utils import uuid7

from archive.reading import Archive, Question
from bon_algos.contracts import (
    LEDGER_STREAM,
    CandidateGroup,
    Feedback,
    FeedbackName,
    Record,
    feedback_key,
    seen_key,
    target_of,
)
from bon_algos.ledger_entries import Fields, UnreadableRecord, group_of
from service.access import Caller
from service.errors import InvalidField, NotFound, StoreUnavailable
from service.generation import Unit
from service.ledger import Ledger
from service.store import translated

PAGE_ENTRIES: Final = 200
MOST_PAGES: Final = 100
SKEW_MILLISECONDS: Final = 60_000
"""By how much a gateway's clock may be before Redis'."""
DELIVERY_SECONDS: Final = 1.0
"""A group is in the spool before its reply is out, and in Redis soon after."""
_MARK_WITHOUT_PLACE: Final = b"1"
"""Of a gateway that does not write places down; it lives for a day."""
_GROUP_ID = re.compile(r"resp_[0-9a-f]{32}")


Category = Annotated[str, Field(min_length=1, max_length=64)]


class FeedbackRequest(Record):
    """Body of `POST /v1/feedback`."""

    response: str | None = None
    """The id of a reply."""
    session: Unit | None = None
    """Instead: `metadata.session` of some requests."""
    candidate: int | None = Field(None, ge=0)
    """Place in drawing order; left out: the one that was served."""
    name: FeedbackName = "quality"
    value: (
        bool | Annotated[float, Field(ge=-1e9, le=1e9)] | Annotated[str, Field(min_length=1, max_length=64)] | None
    ) = None
    better: int | None = Field(None, ge=0)
    worse: int | None = Field(None, ge=0)
    comment: str | None = Field(None, min_length=1, max_length=4096)
    correction: str | None = Field(None, min_length=1, max_length=65_536)
    author: Unit | None = None


class FeedbackBook:
    """The feedback of one Redis."""

    def __init__(self, redis: Redis, ledger: Ledger, archive: Archive) -> None:
        """redis: one that answers in bytes. archive: where the ledger goes on that Redis has no more."""
        self._redis = redis
        self._archive = archive
        self._ledger = ledger

    async def record(self, asked: FeedbackRequest, by: Caller) -> Feedback:
        """Log it. Raises InvalidField, NotFound for a reply the ledger does not have, Forbidden, StoreUnavailable."""
        _require_sense(asked)
        group = None if asked.response is None else await self._group(asked.response)
        if group is not None:
            if group.tenant != by.tenant:
                raise _no_such_reply()
            by.require_route(group.route)
        feedback = _about(asked, group, by.tenant)
        if not self._ledger.append(feedback):
            raise StoreUnavailable("the ledger has no room: the feedback was not logged", code="ledger_full")
        return feedback

    async def that_counts(self, response: str | None, session: str | None, by: Caller) -> Sequence[Feedback]:
        """Of a reply or a session, oldest first; what the caller may see of it."""
        with translated():
            rows = cast("list[bytes]", await self._redis.hvals(feedback_key(target_of(response, session, by.tenant))))
        found = [Feedback.model_validate_json(row) for row in rows]
        seen = [one for one in found if one.tenant == by.tenant and (one.route is None or by.may_use(one.route))]
        return sorted(seen, key=lambda one: (one.created_at, one.id))

    async def _group(self, group_id: str) -> CandidateGroup:
        if not _GROUP_ID.fullmatch(group_id):
            raise InvalidField("response must be the id of a reply", param="response")
        for pause in (DELIVERY_SECONDS, 0.0):
            found = await self._find(group_id)
            if found is not None:
                return found
            await asyncio.sleep(pause if self._ledger.status.pending_bytes else 0.0)
        found = await asyncio.to_thread(self._find_archived, group_id)
        if found is None:
            raise _no_such_reply()
        return found

    async def _find(self, group_id: str) -> CandidateGroup | None:
        """In the stream, by the mark of its delivery. Once the mark has expired, the archive has the group."""
        with translated():
            mark = cast("bytes | None", await self._redis.get(seen_key(group_id)))
        if mark is None:
            return None
        if mark == _MARK_WITHOUT_PLACE:
            return await self._search(group_id)
        return next((_read(fields) for _, fields in await self._page(mark.decode(), mark.decode())), None)

    async def _search(self, group_id: str) -> CandidateGroup | None:
        """From the time in its id on: the ledger has it soon after."""
        oldest = str(max(0, _made_ms(group_id) - SKEW_MILLISECONDS))
        for _ in range(MOST_PAGES):
            page = await self._page(oldest, "+")
            for _, fields in page:
                if fields[b"id"] == group_id.encode():
                    return _read(fields)
            if len(page) < PAGE_ENTRIES:
                break
            oldest = f"({page[-1][0].decode()}"
        return None

    async def _page(self, oldest: str, newest: str) -> list[tuple[bytes, Fields]]:
        with translated():
            found: Any = await self._redis.xrange(LEDGER_STREAM, oldest, newest, count=PAGE_ENTRIES)
        return cast("list[tuple[bytes, Fields]]", found)

    def _find_archived(self, group_id: str) -> CandidateGroup | None:
        made = _made_ms(group_id) / 1000
        slack = SKEW_MILLISECONDS / 1000
        question = Question(("groups",), since=made - slack, until=made + slack)
        try:
            records = (one.record for one in self._archive.records(question))
            return next((one for one in records if isinstance(one, CandidateGroup) and one.id == group_id), None)
        except OSError as error:
            raise StoreUnavailable("the ledger's archive did not answer", code="archive_unavailable") from error


def _read(fields: Fields) -> CandidateGroup | None:
    with suppress(UnreadableRecord):
        return group_of(fields)
    return None


def _made_ms(group_id: str) -> int:
    """The time in a reply's id."""
    return int(group_id.removeprefix("resp_")[:12], 16)


def _require_sense(asked: FeedbackRequest) -> None:
    if (asked.response is None) == (asked.session is None):
        raise InvalidField("exactly one of response and session is required", param="response")
    if (asked.better is None) != (asked.worse is None):
        raise InvalidField(
            "a preference has both better and worse", param="better" if asked.better is None else "worse"
        )
    if asked.better is not None and asked.better == asked.worse:
        raise InvalidField("better and worse are the same candidate", param="worse")
    if asked.better is not None and asked.candidate is not None:
        raise InvalidField("a preference is about two candidates: leave candidate out", param="candidate")
    if asked.session is not None and (asked.candidate, asked.better) != (None, None):
        raise InvalidField("a session has no candidates: name a response", param="session")
    if (asked.value, asked.comment, asked.correction, asked.better) == (None,) * 4:
        raise InvalidField("one of value, comment, correction, or better and worse is required", param="value")


def _no_such_reply() -> NotFound:
    return NotFound("the ledger has no such reply", param="response", code="response_not_found")


def _about(asked: FeedbackRequest, group: CandidateGroup | None, tenant: str) -> Feedback:
    candidate = asked.candidate
    if group is not None:
        for name in ("candidate", "better", "worse"):
            _require_candidate(group, getattr(asked, name), name)
        if not group.store and (asked.comment or asked.correction):
            kept = "comment" if asked.comment else "correction"
            raise InvalidField(f"the reply was not to be stored: neither is its {kept}", param=kept)
        if candidate is None and asked.better is None:
            candidate = group.selected
    return Feedback(
        id=f"fb_{uuid7().hex}",
        tenant=tenant,
        created_at=time(),
        group_id=asked.response,
        route=None if group is None else group.route,
        experiment=None if group is None else group.experiment,
        arm=None if group is None else group.arm,
        arm_reason=None if group is None else group.arm_reason,
        candidate=candidate,
        **asked.model_dump(include={"session", "author", "name", "value", "better", "worse", "comment", "correction"}),
    )


def _require_candidate(group: CandidateGroup, place: int | None, name: str) -> None:
    if place is None:
        return
    if place >= len(group.candidates):
        raise InvalidField(f"{name} must be below {len(group.candidates)}, the reply's candidates", param=name)
    if group.candidates[place].finish_reason is None:
        raise InvalidField(f"{name} names a candidate that never finished", param=name)


def feedback_object(feedback: Feedback) -> dict[str, Any]:
    """The feedback of the API."""
    told = feedback.model_dump(mode="json", exclude={"kind", "schema_version", "tenant", "group_id", "arm"})
    arm = None if feedback.arm is None else str(feedback.arm)
    return {"object": "bonsai.feedback", "response": feedback.group_id, "arm": arm, **told}

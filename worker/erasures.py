"""Who is to be forgotten, and what is theirs.

Owns: reading the erasures that were asked for, whether a record or a window belongs to one, which groups and sessions
are a subject's. Does not own: removing anything (erasing.py). A subject is known by its digest alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import redis

from bon_algos.contracts import (
    ERASURES,
    CandidateGroup,
    Erasure,
    Exposure,
    Feedback,
    Outcome,
    subject_digest,
    target_of,
)
from bon_algos.ledger_entries import Fields, UnreadableRecord, record_of
from worker.sources import read_sources

LedgerRecord = CandidateGroup | Exposure | Feedback | Outcome


@dataclass(frozen=True)
class Erasures:
    """All that was asked for so far, by subject."""

    by_subject: dict[str, Erasure]

    @classmethod
    def read(cls, client: redis.Redis) -> Erasures:
        rows = cast("list[bytes]", client.hvals(ERASURES))
        found = [Erasure.model_validate_json(row) for row in rows]
        return cls({one.subject_digest: one for one in found})

    def __bool__(self) -> bool:
        return bool(self.by_subject)

    def cover(self, record: LedgerRecord) -> bool:
        """Whether the record is of a subject and was made before that was to be forgotten."""
        user = user_of(record)
        erasure = None if not user or not self else self.by_subject.get(subject_digest(record.tenant, user))
        return erasure is not None and record.created_at <= erasure.requested_at

    def cover_entry(self, fields: Fields) -> bool:
        try:
            return self.cover(record_of(fields)) if fields else False
        except UnreadableRecord:
            return False

    def concern(self, window: Path) -> bool:
        """Whether a frozen window holds rows of a subject. Raises DamagedSources, OSError."""
        for one in read_sources(window):
            erasure = self.by_subject.get(one.subject or "")
            if erasure is not None and one.created_at <= erasure.requested_at:
                return True
        return False


def user_of(record: LedgerRecord) -> str | None:
    match record:
        case CandidateGroup():
            return record.user
        case Feedback():
            return record.author
        case _:
            return None


def is_of(erasure: Erasure, user: str | None, created_at: float) -> bool:
    """Whether what this user made at that time is the subject's, and old enough."""
    if user is None or created_at > erasure.requested_at:
        return False
    return subject_digest(erasure.tenant, user) == erasure.subject_digest


def targets_of(
    erasure: Erasure, rows: Callable[[], Iterable[Mapping[str, Any]]], known: Collection[str] = ()
) -> set[str]:
    """What of a ledger is the subject's, as feedback is kept under it (`target_of`): its groups, and the sessions that
    are nobody else's. (One without a name is what began with the same words.)

    rows: id, created_at, user and session of every group of the tenant. They are gone through twice, so that what is
    held does not grow with what others said.
    known: what was found before, of which not all may be there any more.
    """
    targets = set(known)
    for row in rows():
        if is_of(erasure, row["user"], row["created_at"]):
            targets |= {row["id"], *_session(erasure, row)}
    others = (row for row in rows() if not is_of(erasure, row["user"], row["created_at"])) if targets else ()
    return targets - {target for row in others for target in _session(erasure, row) if target in targets}


def _session(erasure: Erasure, row: Mapping[str, Any]) -> list[str]:
    return [] if row["session"] is None else [target_of(None, row["session"], erasure.tenant)]

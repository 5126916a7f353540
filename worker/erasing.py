"""Erasing what one user's requests left: in the stream, the archive, beside them, and in what was learned from them.

Owns: what belongs to a subject, the order in which it goes, the proof that nothing is left. Does not own: asking for it
(service/erasures.py), when it is done (`worker.compactor`). Safe to run again; only under the compactor's lease.

A subject is a digest of tenant and user, so that the request to forget a name does not keep it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic, time
from typing import Any, Final, cast

import redis

from archive.fence import ALONE, Fence
from archive.manifest import Segment
from archive.merging import remove_superseded
from archive.reading import Archive, DamagedSegment
from archive.repair import QUARANTINE, UNREADABLE, sweep
from archive.tables import SET_OF, read_table, stored, table_of
from archive.writing import UNREADABLE_TENANT, rewrite
from bon_algos.contracts import (
    ERASURES,
    LEDGER_STREAM,
    SPOOLS,
    CandidateGroup,
    Erased,
    Erasure,
    Feedback,
    erasure_targets_key,
    feedback_key,
    idempotency_key,
    served_id,
    target_of,
)
from bon_algos.crash_points import crash_point
from bon_algos.ledger_entries import Fields, UnreadableRecord, record_of
from worker.compaction import is_in_stream
from worker.erased_windows import fail_jobs, taint
from worker.erasures import Erasures, LedgerRecord, is_of, targets_of, user_of
from worker.sources import (
    DamagedSources,
    Source,
    delete_content,
    delete_unfinished,
    holds,
    read_sources,
    unfinished,
    windows,
)

PAGE_ENTRIES: Final = 500
SPOOL_SILENT_SECONDS: Final = 7 * 86_400.0
"""A spool that was silent for longer is no longer waited for: what it still brings is erased as it arrives."""
LOOK_AGAIN_SECONDS: Final = 600.0
"""Whether a damaged file was mended, which only another pass over everything tells."""
TARGETS_KEPT_SECONDS: Final = 30 * 86_400
_GROUP_ID: Final = re.compile(rb"resp_[0-9a-f]{32}")
Entry = tuple[bytes, Fields]
log = logging.getLogger("bonsai.compactor")


@dataclass
class _Traces:
    """What one erasure is about, as found by looking at every group."""

    targets: set[str]
    """Ids of groups, and what feedback on sessions is kept under."""
    unsearched: set[str] = field(default_factory=set)
    """Files that are damaged: what is in them nobody knows."""


@dataclass
class _Removed:
    """Ids of records: most are in the stream and in the archive."""

    groups: set[str] = field(default_factory=set)
    feedback: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)

    def note(self, kind: str, ids: Iterable[str]) -> None:
        """kind: the set they belong to."""
        {"groups": self.groups, "feedback": self.feedback}.get(kind, self.others).update(ids)


class Eraser:
    """Carries out erasures."""

    def __init__(self, client: redis.Redis, archive: Archive, artefacts: Path, fence: Fence = ALONE) -> None:
        """client: one that answers in bytes."""
        self._client = client
        self._archive = archive
        self._artefacts = artefacts
        self._fence = fence
        self._looked: dict[str, float] = {}
        """When this one looked for what is whose; by the monotonic clock."""

    def has_work(self) -> bool:
        return bool(self._due())

    def work(self) -> list[Erasure]:
        """Do what can be done now for every erasure that is not proven. Raises OSError, RedisError."""
        return [self._advance(one) for one in sorted(self._due(), key=lambda one: one.requested_at)]

    def _due(self) -> list[Erasure]:
        open_ones = [one for one in Erasures.read(self._client).by_subject.values() if one.state != "proven"]
        return [one for one in open_ones if one.state == "requested" or not self._is_held_up(one)]

    def _is_held_up(self, erasure: Erasure) -> bool:
        """Whether another pass could prove no more than the last one."""
        is_recent = monotonic() - self._looked.get(erasure.id, -inf) < LOOK_AGAIN_SECONDS
        return bool(self._silent_spools(erasure)) or (bool(erasure.unsearched) and is_recent)

    def _advance(self, erasure: Erasure) -> Erasure:
        waits_for = self._silent_spools(erasure)
        self._looked[erasure.id] = monotonic()
        crash_point("erasure.asked")
        erased = self._pass(erasure).model_copy(update={"state": "erased", "waits_for": waits_for})
        if not waits_for and not erased.unsearched and self.residue(erased) == 0:
            erased = erased.model_copy(update={"state": "proven", "proven_at": time()})
        self._write(erasure, erased)
        crash_point("erasure.recorded")
        return erased

    def _write(self, before: Erasure, after: Erasure) -> None:
        """What was done; where it was asked for again in between, there is more to do."""

        def change(pipe: Any) -> None:
            kept = Erasure.model_validate_json(pipe.hget(ERASURES, before.id))
            found = after.model_dump(include={"erased", "jobs", "policies"})
            again = Erasure.model_validate(kept.model_dump() | found)
            pipe.multi()
            written = after if kept.requested_at == before.requested_at else again
            pipe.hset(ERASURES, before.id, written.model_dump_json())

        self._client.transaction(change, ERASURES)

    def _silent_spools(self, erasure: Erasure) -> tuple[str, ...]:
        told = cast("dict[bytes, bytes]", self._client.hgetall(SPOOLS))
        late, oldest = erasure.requested_at, time() - SPOOL_SILENT_SECONDS
        return tuple(sorted(name.decode() for name, clean in told.items() if oldest < float(clean) < late))

    def _pass(self, erasure: Erasure) -> Erasure:
        traces = _Traces(self._targets(erasure))
        removed = _Removed()
        self._erase_archive(erasure, traces, removed)
        self._erase_stream(erasure, traces, removed)
        self._client.delete(*map(feedback_key, traces.targets), b"")
        crash_point("targets.forgotten")
        kept_replies = self._erase_replies(traces.targets)
        told = self._erase_windows(erasure, traces)
        before = erasure.erased
        erased = Erased(
            groups=before.groups + len(removed.groups),
            feedback=before.feedback + len(removed.feedback),
            other_records=before.other_records + len(removed.others),
            kept_replies=before.kept_replies + kept_replies,
            datasets=len(told.jobs),
        )
        return told.model_copy(update={"erased": erased, "unsearched": tuple(sorted(traces.unsearched))})

    # --- finding -----------------------------------------------------------------------------------------

    def _targets(self, erasure: Erasure) -> set[str]:
        """Kept before anything goes: after that, and of what arrives late, only this tells that it belongs to them."""
        known = self._known_targets(erasure)
        targets = targets_of(erasure, partial(self._rows_of, erasure.tenant), known)
        key = erasure_targets_key(erasure.id)
        with self._client.pipeline() as pipe:
            pipe.delete(key)
            if targets:
                pipe.sadd(key, *targets)
                pipe.expire(key, TARGETS_KEPT_SECONDS)
            pipe.execute()
        crash_point("erasure.noted")
        return targets

    def _known_targets(self, erasure: Erasure) -> set[str]:
        found = cast("set[bytes]", self._client.smembers(erasure_targets_key(erasure.id)))
        return {one.decode() for one in found}

    def _rows_of(self, tenant: str) -> Iterator[dict[str, Any]]:
        """Of groups. Without those of damaged segments, which are told of where they should be rewritten."""
        columns = ("id", "created_at", "user", "session")
        for segment in self._segments("groups"):
            if segment.tenant == tenant:
                with suppress(DamagedSegment, FileNotFoundError):
                    yield from self._archive.load(segment, columns).to_pylist()
        for _, record in self._stream():
            if isinstance(record, CandidateGroup) and record.tenant == tenant:
                yield record.model_dump(include=set(columns))

    def _segments(self, *kinds: str) -> Iterator[Segment]:
        for batch in self._archive.manifest.batches_newest_first():
            yield from (one for one in batch.segments if one.path is not None and one.kind in kinds)

    def _stream(self) -> Iterator[tuple[bytes, LedgerRecord | None]]:
        """Every entry; None for what cannot be read."""
        after = "-"
        while page := cast("list[Entry]", self._client.xrange(LEDGER_STREAM, after, "+", count=PAGE_ENTRIES)):
            for name, fields in page:
                try:
                    yield name, record_of(fields)
                except UnreadableRecord:
                    yield name, None
            after = f"({page[-1][0].decode()}"

    def _is_concerned(self, erasure: Erasure, traces: _Traces, record: LedgerRecord) -> bool:
        if record.tenant != erasure.tenant:
            return False
        user = user_of(record)
        if user is not None and is_of(erasure, user, record.created_at):
            return True
        if isinstance(record, CandidateGroup):
            return served_id(record.id) in traces.targets
        session = record.session if isinstance(record, Feedback) else None
        return _target(erasure, record.group_id, session) in traces.targets

    # --- removing ----------------------------------------------------------------------------------------

    def _erase_archive(self, erasure: Erasure, traces: _Traces, removed: _Removed) -> None:
        def change(segment: Segment, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], tuple[str, ...]] | None:
            kept = [row for row in rows if not self._is_row_concerned(erasure, traces, segment, row)]
            if len(kept) == len(rows):
                return None
            gone = [row for row in rows if self._is_row_concerned(erasure, traces, segment, row)]
            self._forget_answers(segment, gone)
            removed.note(segment.kind, (str(row.get("id", row["entry_ms"])) for row in gone))
            return kept, segment.lacks

        def left(segment: Segment) -> None:
            is_there = segment.path in self._archive.storage.names(segment.kind)
            if is_there and segment.tenant in (erasure.tenant, UNREADABLE_TENANT):
                traces.unsearched.add(segment.path or "")

        for batch in list(self._archive.manifest.batches_newest_first()):
            rewrite(self._archive, batch, change, self._fence, left)
        for day in self._archive.manifest.days():
            remove_superseded(self._archive, day, inf, self._fence)
        sweep(self._archive, self._fence, partial(is_in_stream, self._client))
        for name in self._quarantined():
            if self._holds(erasure, traces.targets, name):
                self._archive.storage.delete(name)

    def _quarantined(self) -> list[str]:
        """What no manifest could name goes as a whole."""
        return self._archive.storage.names(QUARANTINE)

    def _is_row_concerned(self, erasure: Erasure, traces: _Traces, segment: Segment, row: dict[str, Any]) -> bool:
        if segment.kind == "unreadable":
            # What cannot be read cannot be searched.
            return cast(int, row["entry_ms"]) <= erasure.requested_at * 1000
        if segment.tenant != erasure.tenant:
            return False
        user = row.get("user") or row.get("author")
        if user is not None and is_of(erasure, user, row["created_at"]):
            return True
        return _target_of_row(erasure, row) in traces.targets

    def _forget_answers(self, segment: Segment, rows: Iterable[dict[str, Any]]) -> None:
        """What a subject said of anything counts no longer."""
        if segment.kind != "feedback":
            return
        for one in stored("feedback", table_of("feedback", list(rows)), segment.tenant, segment.route):
            self._forget_answer(cast(Feedback, one.record))

    def _forget_answer(self, said: Feedback) -> None:
        self._client.hdel(feedback_key(target_of(said.group_id, said.session, said.tenant)), said.question)
        crash_point("answer.forgotten")

    def _erase_stream(self, erasure: Erasure, traces: _Traces, removed: _Removed) -> None:
        made_before = erasure.requested_at * 1000
        for name, record in self._stream():
            if record is None:
                if int(name.partition(b"-")[0]) <= made_before:
                    self._client.xdel(LEDGER_STREAM, name)
                    removed.note("unreadable", [name.decode()])
            elif self._is_concerned(erasure, traces, record):
                if isinstance(record, Feedback):
                    self._forget_answer(record)
                self._client.xdel(LEDGER_STREAM, name)
                crash_point("entry.removed")
                removed.note(SET_OF[record.kind], [record.id])

    def _erase_replies(self, groups: set[str]) -> int:
        gone = 0
        for key in self._replies_of(groups):
            gone += self._client.delete(key)
            crash_point("reply.removed")
        return gone

    def _replies_of(self, groups: set[str]) -> Iterator[bytes]:
        if not groups:
            return
        for key in cast("Iterator[bytes]", self._client.scan_iter(idempotency_key("*"), count=1000)):
            kept = cast("bytes | None", self._client.get(key)) or b""
            if any(found.decode() in groups for found in _GROUP_ID.findall(kept)):
                yield key

    def _erase_windows(self, erasure: Erasure, traces: _Traces) -> Erasure:
        """The receipt with the jobs of the windows and the policies. They are kept before anything of a window goes:
        after that nobody could tell any more whose it was."""
        concerned = self._concerned(erasure, traces)
        job_ids = [window.parent.name for window in concerned]
        # First the jobs, so that nobody reads a window that is half there.
        fail_jobs(self._client, job_ids)
        crash_point("job.failed")
        policies = taint(self._client, frozenset(job_ids), erasure.tenant)
        crash_point("policies.tainted")
        jobs = {"jobs": {*erasure.jobs, *job_ids}, "policies": {*erasure.policies, *policies}}
        told = erasure.model_copy(update={name: tuple(sorted(found)) for name, found in jobs.items()})
        self._write(erasure, told)
        crash_point("erasure.told")
        for aside in unfinished(self._artefacts):
            delete_unfinished(aside, partial(self._is_source_concerned, erasure, traces.targets))
        for window, gone in concerned.items():
            delete_content(window, gone)
        return told

    def _concerned(self, erasure: Erasure, traces: _Traces) -> dict[Path, list[str]]:
        """Window -> the groups in it that are to go, of those that have any."""
        concerned = {}
        for window in windows(self._artefacts):
            try:
                sources = read_sources(window)
            except DamagedSources as error:
                log.error("%s", error)
                traces.unsearched.add(str(window.relative_to(self._artefacts)))
                continue
            gone = [one.group_id for one in sources if self._is_source_concerned(erasure, traces.targets, one)]
            if gone:
                concerned[window] = gone
        return concerned

    @staticmethod
    def _is_source_concerned(erasure: Erasure, groups: set[str], one: Source) -> bool:
        is_subject = one.subject == erasure.subject_digest and one.created_at <= erasure.requested_at
        return is_subject or served_id(one.group_id) in groups

    # --- proving -----------------------------------------------------------------------------------------

    def residue(self, erasure: Erasure) -> int:
        """How many places still hold something, after looking at every file and every key there is, whether or not a
        manifest names it."""
        targets = self._known_targets(erasure)
        traces = _Traces(targets)
        late = erasure.requested_at * 1000
        found = 0
        for name, record in self._stream():
            is_unread = record is None and int(name.partition(b"-")[0]) <= late
            found += is_unread or (record is not None and self._is_concerned(erasure, traces, record))
        found += sum(self._holds(erasure, targets, name) for name in self._files())
        found += sum(1 for _ in self._replies_of(targets))
        found += sum(self._client.exists(feedback_key(one)) for one in targets)
        is_concerned = partial(self._is_source_concerned, erasure, targets)
        found += sum(holds(aside, is_concerned) for aside in unfinished(self._artefacts))
        sources = [one for window in windows(self._artefacts) for one in read_sources(window)]
        return found + sum(map(is_concerned, sources))

    def _files(self) -> Sequence[str]:
        kinds = ("groups", "feedback", "outcomes", "exposures")
        return [*(name for kind in kinds for name in self._archive.storage.names(kind)), *self._quarantined()]

    def _holds(self, erasure: Erasure, targets: set[str], name: str) -> bool:
        if f"/tenant={erasure.tenant}/" not in name:
            return False
        try:
            return any(
                _target_of_row(erasure, row) in targets
                or is_of(erasure, row.get("user") or row.get("author"), row["created_at"])
                for row in read_table(self._archive.storage.get(name)).to_pylist()
            )
        except UNREADABLE:
            return True


def _target_of_row(erasure: Erasure, row: Mapping[str, Any]) -> str:
    return _target(erasure, row.get("group_id", row["id"]), row.get("session"))


def _target(erasure: Erasure, group_id: str | None, session: str | None) -> str:
    return target_of(group_id and served_id(group_id), session, erasure.tenant)

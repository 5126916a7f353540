"""Reading the archive: segments against their checksums, records newest first.

Owns: which segments a question can leave out, the order of what the others hold. Does not own: joining one kind of
record to another, who may see what.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from heapq import merge
from typing import Final

import pyarrow as pa
from pydantic import ValidationError

from archive.manifest import Batch, Manifest, Segment
from archive.storage import Storage, open_storage
from archive.tables import SegmentSet, Stored, backwards, read_table, stored
from bon_algos.ledger_entries import EntryId

READS: Final = 3
"""Of a segment whose checksum is not that of the manifest: a connection may have cut it short."""
ROWS_AT_ONCE: Final = 64
DELIVERY_SLACK_SECONDS: Final = 86_400.0
"""A spool that waited for Redis delivers late: an entry's own id may be this much younger than its record."""
SKEW_SECONDS: Final = 60.0
"""And by how much a gateway's clock may be before Redis'."""
log = logging.getLogger("bonsai.archive")


class DamagedSegment(OSError):
    """A segment is not what was written."""


@dataclass(frozen=True)
class Question:
    """Which records are wanted."""

    kinds: tuple[SegmentSet, ...]
    tenant: str | None = None
    """None: of any."""
    route: str | None = None
    since: float | None = None
    """Of creation, seconds; both ends belong to it."""
    until: float | None = None
    before: EntryId | None = None
    """Only entries that stand before this one in the stream."""
    after: EntryId | None = None
    """And behind this one."""

    def can_be_in(self, segment: Segment) -> bool:
        is_in_time = (self.since is None or segment.last_created >= self.since) and (
            self.until is None or segment.first_created <= self.until
        )
        is_there = segment.path is not None and segment.kind in self.kinds
        return is_there and is_in_time and segment.is_of(self.tenant, self.route)

    def is_met(self, one: Stored) -> bool:
        made = one.record.created_at
        is_between = (self.before is None or one.entry < self.before) and (self.after is None or one.entry > self.after)
        return is_between and (self.since is None or made >= self.since) and (self.until is None or made <= self.until)

    def is_past(self, batch: Batch) -> bool:
        """Whether this batch and all older ones were delivered before anything wanted was, or was made."""
        is_old = self.since is not None and batch.last.ms / 1000 < self.since - SKEW_SECONDS
        return is_old or (self.after is not None and batch.last <= self.after)

    def may_be_in(self, batch: Batch) -> bool:
        is_before = self.before is None or batch.first < self.before
        is_late = self.until is not None and batch.first.ms / 1000 > self.until + DELIVERY_SLACK_SECONDS
        return is_before and not is_late


class Archive:
    """The archive at one address."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.manifest = Manifest(storage)

    @classmethod
    def at(cls, url: str) -> Archive:
        """Raises ValueError for what is no address."""
        return cls(open_storage(url))

    def load(self, segment: Segment, columns: Sequence[str] | None = None) -> pa.Table:
        """Raises DamagedSegment, FileNotFoundError where it was rewritten since the manifest was read, OSError."""
        return read_table(self._content(segment), columns)

    def _content(self, segment: Segment) -> bytes:
        for _ in range(READS):
            content = self.storage.get(segment.path or "")
            if sha256(content).hexdigest() == segment.sha256:
                return content
        raise DamagedSegment(f"segment {segment.path} does not match its checksum")

    def records(self, question: Question) -> Iterator[Stored]:
        """What is wanted, newest entry first. A damaged segment is logged and passed over. Raises OSError."""
        missing = ""
        while True:
            try:
                for one in self._as_it_stands(question):
                    question = replace(question, before=one.entry)
                    yield one
            except FileNotFoundError as error:
                if str(error) == missing:
                    raise
                # Rewritten or merged in the meantime: the manifest says where it is now.
                missing = str(error)
            else:
                return

    def _as_it_stands(self, question: Question) -> Iterator[Stored]:
        for batch in self.manifest.batches_newest_first():
            if question.is_past(batch):
                return
            if question.may_be_in(batch):
                wanted = [segment for segment in batch.segments if question.can_be_in(segment)]
                found = (self._newest_first(segment, question.before) for segment in wanted)
                yield from filter(question.is_met, merge(*found, key=lambda one: one.entry, reverse=True))

    def _newest_first(self, segment: Segment, before: EntryId | None) -> Iterator[Stored]:
        """A few rows at a time: of a large segment a reader may want no more than the end."""
        try:
            for table in backwards(self._content(segment), before, ROWS_AT_ONCE):
                yield from reversed(stored(segment.kind, table, segment.tenant, segment.route))
        except (DamagedSegment, ValidationError, pa.ArrowInvalid) as error:
            log.error("%s is passed over: %s", segment.path, type(error).__name__)

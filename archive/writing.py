"""Writing the archive: a batch of entries as segments, a segment anew.

Owns: the order of the steps, each of which may be the last before the process dies. Does not own: the stream, merging
(merging.py), what a death leaves (repair.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final, NamedTuple

import pyarrow as pa

from archive.fence import ALONE, Fence
from archive.manifest import Batch, DayManifest, Segment, Totals, day_of
from archive.names import FileName, Partition, Stretch
from archive.reading import Archive, DamagedSegment
from archive.tables import SET_OF, parquet_bytes, row_of, table_of
from bon_algos.crash_points import crash_point
from bon_algos.ledger_entries import EntryId, Fields, UnreadableRecord, record_and_document

UNREADABLE_TENANT: Final = "_"
ROWS_AT_ONCE: Final = 64
"""As Python objects, which take twenty times the room of what they become."""
log = logging.getLogger("bonsai.archive")


class Entry(NamedTuple):
    id: EntryId
    fields: Fields


class _Draft:
    """A segment's rows, put together a few at a time."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._made: list[float] = []
        """When each row was made."""
        self._tables: list[pa.Table] = []
        self._rows: list[Mapping[str, Any]] = []
        self._totals: list[Totals] = []

    @property
    def is_empty(self) -> bool:
        return not self._made and not self._rows

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self._rows.append(row)
            if len(self._rows) == ROWS_AT_ONCE:
                self._pack()

    def write(self, archive: Archive, name: FileName) -> Segment:
        """Put the file where it belongs. Raises OSError."""
        self._pack()
        content = parquet_bytes(self._tables)
        archive.storage.put(name.path, content)
        return Segment(
            **self._partition._asdict(),
            path=name.path,
            rows=len(self._made),
            bytes=len(content),
            sha256=sha256(content).hexdigest(),
            first_created=min(self._made),
            last_created=max(self._made),
            revision=name.revision,
            totals=sum_of(self._totals),
        )

    def _pack(self) -> None:
        if self._rows:
            kind = self._partition.kind
            self._tables.append(table_of(kind, self._rows))
            self._totals += [totals_of(self._rows)] if kind == "groups" else []
            self._made += [made_at(row) for row in self._rows]
            self._rows = []


def write_batch(archive: Archive, entries: Sequence[Entry], fence: Fence = ALONE) -> Batch:
    """The entries, in the order of the stream, as segments that the manifest names; those without fields are gone from
    the stream. Raises Overtaken, StaleView, OSError; a repetition does the rest."""
    stretch = Stretch(entries[0].id, entries[-1].id)
    drafts: dict[Partition, _Draft] = {}
    for entry in (entry for entry in entries if entry.fields):
        partition, row = _row(entry)
        drafts.setdefault(partition, _Draft(partition)).add([row])
    crash_point("batch.asked")
    segments: tuple[Segment, ...] = ()
    for partition, draft in drafts.items():
        segments += (draft.write(archive, FileName(partition, stretch, fence.epoch)),)
        crash_point("batch.written")
    groups = sum(segment.rows for segment in segments if segment.kind == "groups")
    batch = Batch(first=stretch.first, last=stretch.last, entries=len(entries), groups=groups, segments=segments)
    archive.manifest.add(batch, fence)
    crash_point("batch.named")
    return batch


Rewriting = Callable[[Segment, list[dict[str, Any]]], tuple[list[dict[str, Any]], tuple[str, ...]] | None]
"""Of some rows of a segment: what is left of them and the classes of content they lack, or None to leave them alone."""


def rewrite(
    archive: Archive,
    batch: Batch,
    change: Rewriting,
    fence: Fence = ALONE,
    left: Callable[[Segment], None] = lambda segment: None,
) -> Batch:
    """The batch with some segments changed, which the manifest then names; without rows a segment goes. left: told of a
    segment that is damaged or lost, and stays as it is. Raises Overtaken, StaleView, OSError."""
    segments, obsolete = [], []
    for segment in batch.segments:
        name = FileName.parse(segment.path or "")
        try:
            kept = segment if name is None else _rewritten(archive, name, segment, change, fence.epoch)
        except (DamagedSegment, FileNotFoundError) as error:
            log.error("%s is left as it is: %s", segment.path, type(error).__name__)
            left(segment)
            kept = segment
        segments.append(kept)
        obsolete += [segment.path] if segment.path is not None and kept.path != segment.path else []
    changed = batch.model_copy(update={"segments": tuple(segments)})
    if changed != batch:
        archive.manifest.replace([batch], changed, fence)
        crash_point("rewrite.named")
    for path in obsolete:
        archive.storage.delete(path)
        crash_point("rewrite.removed")
    return changed


def forget_totals(archive: Archive, day: str, gone: Collection[Segment], fence: Fence = ALONE) -> None:
    """Takes segments that are gone, and batches without any, out of a day's manifest. The newest batch stays: it says
    where the stream is read on."""

    def forget(known: DayManifest) -> DayManifest:
        kept = [
            one.model_copy(update={"segments": tuple(s for s in one.segments if s not in gone)})
            for one in known.batches
        ]
        kept = [one for place, one in enumerate(kept) if one.segments or place == len(kept) - 1]
        return known.model_copy(update={"batches": tuple(kept)})

    archive.manifest.change(day, forget, fence)


def _row(entry: Entry) -> tuple[Partition, dict[str, Any]]:
    try:
        record, document = record_and_document(entry.fields)
    except UnreadableRecord as error:
        log.error("%s: kept as it is", error)
        raw = {"kind": entry.fields.get(b"kind", b"").decode(errors="replace"), "data": entry.fields.get(b"data", b"")}
        place = {"entry_ms": entry.id.ms, "entry_seq": entry.id.seq}
        return Partition("unreadable", UNREADABLE_TENANT, day_of(entry.id.ms / 1000), None), raw | place
    partition = Partition(SET_OF[record.kind], record.tenant, day_of(record.created_at), record.route)
    return partition, row_of(entry.id, document)


def _rewritten(archive: Archive, name: FileName, segment: Segment, change: Rewriting, epoch: int) -> Segment:
    draft, lacks = _Draft(segment.partition), None
    for part in archive.load(segment).to_batches(max_chunksize=ROWS_AT_ONCE):
        rows = part.to_pylist()
        changed = change(segment, rows)
        rows, lacks = (rows, lacks) if changed is None else changed
        draft.add(rows)
    if lacks is None:
        return segment
    if draft.is_empty:
        return segment.model_copy(update={"path": None, "rows": 0, "bytes": 0, "lacks": lacks})
    written = draft.write(archive, name._replace(epoch=epoch, revision=segment.revision + 1))
    crash_point("rewrite.written")
    # What was counted when it was whole: aggregates outlive rows.
    return written.model_copy(update={"lacks": lacks, "totals": segment.totals})


def made_at(row: Mapping[str, Any]) -> float:
    """When a row's record was made; of one that nobody can read, when it was delivered."""
    return float(row.get("created_at", row["entry_ms"] / 1000))


def sum_of(totals: Iterable[Totals]) -> Totals:
    columns = zip(*(one.model_dump().values() for one in totals), strict=True)
    return Totals(**dict(zip(Totals.model_fields, map(sum, columns), strict=False)))


def totals_of(rows: Iterable[Mapping[str, Any]]) -> Totals:
    candidates = [(row, one) for row in rows for one in row["candidates"]]
    rewards = [one["reward"] for _, one in candidates if one["reward"] is not None]
    return Totals(
        groups=len({row["id"] for row, _ in candidates}),
        candidates=len(candidates),
        scored=len(rewards),
        reward_sum=sum(rewards),
        candidate_tokens=sum(len(one["token_ids"] or ()) for _, one in candidates),
    )

"""Writing the archive: a batch of entries as segments, a segment anew, what no manifest names away.

Owns: the order of the steps, each of which may be the last before the process dies. Does not own: the stream. A batch's
names are made of its first and last entry and its content of theirs, so that a repetition writes the same files.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final, NamedTuple

from archive.manifest import Batch, DayManifest, Segment, Totals, day_of, revised_path, segment_path
from archive.reading import Archive
from archive.tables import SET_OF, SegmentSet, parquet_bytes, row_of, table_of
from bon_algos.ledger_entries import EntryId, Fields, UnreadableRecord, record_of

UNREADABLE_TENANT: Final = "_"
_SEGMENT = re.compile(r"/segment-(\d+)-(\d+)-(\d+)-(\d+)(\.r\d+)?\.parquet$")
log = logging.getLogger("bonsai.archive")


class Entry(NamedTuple):
    id: EntryId
    fields: Fields


class _Partition(NamedTuple):
    kind: SegmentSet
    tenant: str
    day: str
    route: str | None


def write_batch(
    archive: Archive,
    entries: Sequence[Entry],
    *,
    confirm: Callable[[], None] = lambda: None,
) -> Batch:
    """The entries, in the order of the stream, as segments that the manifest names; those without fields are gone from
    the stream. confirm: raises when another process may write by now. Raises OSError; a repetition does the rest."""
    stretch = (entries[0].id, entries[-1].id)
    sorted_rows: dict[_Partition, list[dict[str, Any]]] = {}
    for entry in (entry for entry in entries if entry.fields):
        partition, row = _row(entry)
        sorted_rows.setdefault(partition, []).append(row)
    segments = tuple(
        _written(archive, partition, rows, segment_path(*partition, stretch), revision=0)
        for partition, rows in sorted_rows.items()
    )
    groups = sum(segment.rows for segment in segments if segment.kind == "groups")
    batch = Batch(first=stretch[0], last=stretch[1], entries=len(entries), groups=groups, segments=segments)
    confirm()
    archive.manifest.add(batch)
    return batch


def rewrite(
    archive: Archive,
    batch: Batch,
    change: Callable[[Segment, list[dict[str, Any]]], tuple[list[dict[str, Any]], tuple[str, ...]] | None],
    *,
    confirm: Callable[[], None] = lambda: None,
) -> Batch:
    """The batch with some segments changed, which the manifest then names. change: of each segment that is there, its
    rows afterwards and the classes of content they lack, or None to leave it alone; without rows a segment goes."""
    segments, obsolete = [], []
    for segment in batch.segments:
        kept = _rewritten(archive, segment, change) if segment.path is not None else segment
        segments.append(kept)
        obsolete += [segment.path] if segment.path is not None and kept.path != segment.path else []
    changed = batch.model_copy(update={"segments": tuple(segments)})
    if changed != batch:
        confirm()
        archive.manifest.add(changed)
    for path in obsolete:
        archive.storage.delete(path)
    return changed


def forget_totals(archive: Archive, day: str, gone: Collection[Segment]) -> None:
    """Takes segments that are gone, and batches without any, out of a day's manifest. The newest batch stays: it says
    where the stream is read on."""
    known = archive.manifest.read(day).batches
    kept = [one.model_copy(update={"segments": tuple(s for s in one.segments if s not in gone)}) for one in known]
    kept = [one for place, one in enumerate(kept) if one.segments or place == len(kept) - 1]
    if tuple(kept) != known:
        archive.manifest.write(day, DayManifest(batches=tuple(kept)))


def sweep(archive: Archive) -> list[str]:
    """Removes what a process left that died: files of a stretch that was not finished, and older or newer forms of a
    segment that is named. Gives the files of stretches that the manifests do not know, which are nobody's to remove."""
    archive.storage.remove_unfinished()
    position = archive.manifest.position()
    batches = list(archive.manifest.batches_newest_first())
    named = {segment.path for batch in batches for segment in batch.segments}
    stretches = {(batch.first, batch.last) for batch in batches}
    strange = []
    for name in (name for kind in (*SET_OF.values(), "unreadable") for name in archive.storage.names(kind)):
        if name in named or (found := _SEGMENT.search(name)) is None:
            continue
        numbers = [int(part) for part in found.groups()[:4]]
        first, last = EntryId(*numbers[:2]), EntryId(*numbers[2:])
        if (first, last) in stretches or last > position:
            archive.storage.delete(name)
        else:
            strange.append(name)
    return strange


def _row(entry: Entry) -> tuple[_Partition, dict[str, Any]]:
    try:
        record = record_of(entry.fields)
    except UnreadableRecord as error:
        log.error("%s: kept as it is", error)
        raw = {"kind": entry.fields.get(b"kind", b"").decode(errors="replace"), "data": entry.fields.get(b"data", b"")}
        place = {"entry_ms": entry.id.ms, "entry_seq": entry.id.seq}
        return _Partition("unreadable", UNREADABLE_TENANT, day_of(entry.id.ms / 1000), None), raw | place
    document: Mapping[str, Any] = json.loads(zlib.decompress(entry.fields[b"data"]))
    partition = _Partition(SET_OF[record.kind], record.tenant, day_of(record.created_at), record.route)
    return partition, row_of(entry.id, document)


def _written(
    archive: Archive, partition: _Partition, rows: Sequence[Mapping[str, Any]], path: str, *, revision: int
) -> Segment:
    content = parquet_bytes(table_of(partition.kind, rows))
    archive.storage.put(path, content)
    made = [row.get("created_at", row["entry_ms"] / 1000) for row in rows]
    return Segment(
        **partition._asdict(),
        path=path,
        rows=len(rows),
        bytes=len(content),
        sha256=sha256(content).hexdigest(),
        first_created=min(made),
        last_created=max(made),
        revision=revision,
        totals=_totals(rows) if partition.kind == "groups" else Totals(),
    )


def _rewritten(
    archive: Archive,
    segment: Segment,
    change: Callable[[Segment, list[dict[str, Any]]], tuple[list[dict[str, Any]], tuple[str, ...]] | None],
) -> Segment:
    changed = change(segment, archive.load(segment).to_pylist())
    if changed is None:
        return segment
    rows, lacks = changed
    if not rows:
        return segment.model_copy(update={"path": None, "rows": 0, "bytes": 0, "lacks": lacks})
    partition = _Partition(segment.kind, segment.tenant, segment.day, segment.route)
    revision = segment.revision + 1
    written = _written(archive, partition, rows, revised_path(segment.path or "", revision), revision=revision)
    # What was counted when it was whole: aggregates outlive rows.
    return written.model_copy(update={"lacks": lacks, "totals": segment.totals})


def _totals(rows: Iterable[Mapping[str, Any]]) -> Totals:
    candidates = [(row, one) for row in rows for one in row["candidates"]]
    rewards = [one["reward"] for _, one in candidates if one["reward"] is not None]
    return Totals(
        groups=len({row["id"] for row, _ in candidates}),
        candidates=len(candidates),
        scored=len(rewards),
        reward_sum=sum(rewards),
        candidate_tokens=sum(len(one["token_ids"] or ()) for _, one in candidates),
    )

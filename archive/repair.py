"""What a writer left that died, was frozen, or whose manifest was lost.

Owns: what becomes of files that no manifest names. Does not own: files that one names.

    of a stretch that is named, in another form            deleted: what counts of its rows stands in what is named
    of a merge that was not finished                       deleted: its rows stand in what is named
    of a stretch behind the archive, still in the stream   deleted: it is written again
    of a stretch that nobody else has                      named: it is a batch that was lost from the manifest
    anything else                                          put aside under _quarantine, which the log says
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from itertools import groupby
from typing import Final, NamedTuple

import pyarrow as pa
from pyarrow import compute

from archive.fence import ALONE, Fence
from archive.manifest import Batch, Segment, Totals
from archive.names import FileName, Stretch
from archive.reading import Archive
from archive.tables import SET_OF, read_table
from archive.writing import totals_of
from bon_algos.ledger_entries import EntryId

QUARANTINE: Final = "_quarantine"
UNREADABLE: Final = (pa.ArrowException, OSError, ValueError, KeyError)
"""What reading bytes that are no segment can raise: those of a page that is damaged may still unpack, as no text."""
log = logging.getLogger("bonsai.archive")


class Repaired(NamedTuple):
    """Names of files, by what became of them."""

    deleted: tuple[str, ...]
    named: tuple[str, ...]
    quarantined: tuple[str, ...]


def sweep(
    archive: Archive, fence: Fence = ALONE, is_in_stream: Callable[[Stretch], bool] = lambda stretch: True
) -> Repaired:
    """Deal with all files that no manifest names. is_in_stream: whether the stream has entries of a stretch. Only for
    the one that writes, between two changes. Raises Overtaken, DamagedManifest, OSError; again is the same."""
    archive.manifest.seal(fence)
    fence.confirm()
    archive.storage.remove_unfinished()
    archive.manifest.remove_unnamed()
    batches = list(archive.manifest.batches_newest_first())
    position = batches[0].last if batches else EntryId(0, 0)
    wholes = {batch.stretch for batch in batches}
    parts = [part.stretch for batch in batches for part in batch.parts]
    deleted: list[str] = []
    lost: list[FileName] = []
    strange: list[str] = []
    for path in _unnamed(archive):
        name = FileName.parse(path)
        if name is None:
            strange.append(path)
        elif name.stretch in wholes or any(part.has(name.stretch) for part in parts):
            deleted.append(path)
        elif any(part.meets(name.stretch) for part in parts):
            (deleted if _is_held(archive, name, batches) else strange).append(path)
        elif name.stretch.last > position and is_in_stream(name.stretch):
            deleted.append(path)
        else:
            lost.append(name)
    for path in deleted:
        archive.storage.delete(path)
    named, conflicting = _name(archive, lost, fence)
    for path in (*strange, *conflicting):
        put_aside(archive, path)
    return Repaired(tuple(deleted), tuple(named), (*strange, *conflicting))


def put_aside(archive: Archive, path: str) -> None:
    """Out of the way of those who read every file there is."""
    log.error("%s is in no manifest and cannot be named in one: it is in %s", path, QUARANTINE)
    archive.storage.put(f"{QUARANTINE}/{path}", archive.storage.get(path))
    archive.storage.delete(path)


def _unnamed(archive: Archive) -> list[str]:
    named = set()
    for day in archive.manifest.days():
        known = archive.manifest.read(day)
        named |= {segment.path for batch in known.batches for segment in batch.segments}
        named |= {one.path for one in known.superseded}
    kinds = (*SET_OF.values(), "unreadable")
    return [path for kind in kinds for path in archive.storage.names(kind) if path not in named]


def _is_held(archive: Archive, name: FileName, batches: Sequence[Batch]) -> bool:
    """Whether it is what a merge left that was not finished: all rows of some batches, which are named."""
    there = [one for batch in batches if name.stretch.has(batch.stretch) for one in batch.segments]
    rows = sum(one.rows for one in there if one.partition == name.partition)
    content = archive.storage.get(name.path)
    try:
        return rows == len(read_table(content, ["entry_ms"]))
    except UNREADABLE:
        return False


def _name(archive: Archive, lost: Sequence[FileName], fence: Fence) -> tuple[list[str], list[str]]:
    """Make batches of the files; the paths of those that are, and of those that cannot be. Of two that overlap the one
    that holds more counts; of two forms of one segment the newer."""
    named: list[str] = []
    conflicting: list[str] = []
    taken: list[Stretch] = []
    ordered = sorted(lost, key=lambda one: (one.stretch.first, [-number for number in one.stretch.last]))
    for stretch, files in groupby(ordered, key=lambda one: one.stretch):
        newest = {one.partition: one for one in sorted(files, key=lambda one: (one.epoch, one.revision))}
        others = [one.path for one in lost if one.stretch == stretch and newest[one.partition] != one]
        segments = [(one, _described(archive, one)) for one in newest.values()]
        whole = [segment for _, segment in segments if segment is not None]
        is_free = not any(one.meets(stretch) for one in taken)
        conflicting += [*others, *(one.path for one, segment in segments if segment is None or not is_free)]
        if is_free and whole:
            _restore(archive, _batch_of(stretch, whole), fence)
            taken.append(stretch)
            named += [segment.path or "" for segment in whole]
    for path in named:
        log.error("%s was in no manifest, and is in one again", path)
    return named, conflicting


def _restore(archive: Archive, lost: Batch, fence: Fence) -> None:
    """In its place. Where its neighbours were merged over it, it is a part of what they became."""
    known = archive.manifest.read(lost.day).batches
    host = next((one for one in known if one.stretch.has(lost.stretch)), None)
    if host is None:
        archive.manifest.restore(lost, fence)
        return
    changes = {
        "entries": host.entries + lost.entries,
        "groups": host.groups + lost.groups,
        "segments": (*host.segments, *lost.segments),
        "merged": tuple(sorted((*host.parts, *lost.parts), key=lambda one: one.first)),
    }
    archive.manifest.replace([host], host.model_copy(update=changes), fence)


def _batch_of(stretch: Stretch, segments: Iterable[Segment]) -> Batch:
    segments = tuple(segments)
    return Batch(
        first=stretch.first,
        last=stretch.last,
        entries=sum(one.rows for one in segments),
        groups=sum(one.rows for one in segments if one.kind == "groups"),
        segments=segments,
    )


def _described(archive: Archive, name: FileName) -> Segment | None:
    """What a manifest says of a file; None for one that cannot be read."""
    content = archive.storage.get(name.path)
    try:
        return _description(name, content, read_table(content))
    except UNREADABLE:
        return None


def _description(name: FileName, content: bytes, table: pa.Table) -> Segment:
    is_timed = "created_at" in table.column_names
    made = table.column("created_at") if is_timed else compute.divide(table.column("entry_ms"), 1000.0)
    return Segment(
        **name.partition._asdict(),
        path=name.path,
        rows=len(table),
        bytes=len(content),
        sha256=sha256(content).hexdigest(),
        first_created=compute.min(made).as_py(),
        last_created=compute.max(made).as_py(),
        revision=name.revision,
        totals=totals_of(table.to_pylist()) if name.partition.kind == "groups" else Totals(),
    )

"""Small segments become larger ones: neighbouring batches of a day are made one.

Owns: which batches are merged, the order of the steps, how long what they were stays. Does not own: when this runs
(`worker.merging`).

An hour's batches are merged when a later hour has one, a day's when a later day has one, as long as no file grows over
the target: a row is written three times at most. The manifest changes once, when the new files are whole; before that
nobody sees them, after it nobody is told of the old ones, which stay for a while for those who were.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import groupby
from typing import Final, NamedTuple

import pyarrow as pa

from archive.fence import Fence
from archive.manifest import Batch, DayManifest, Segment, Superseded
from archive.names import FileName, Partition, Stretch
from archive.reading import Archive, DamagedSegment
from archive.tables import SCHEMAS, parquet_bytes
from archive.writing import sum_of
from bon_algos.crash_points import crash_point

HOUR_MS: Final = 3_600_000
log = logging.getLogger("bonsai.archive")


class Limits(NamedTuple):
    """What may become one."""

    bytes: int
    """Of a file."""
    seconds: float | None = None
    """From its first entry to its last; None: a day."""


class Unmergeable(Exception):
    """A segment cannot be read as this version writes one: it stays what it is."""

    def __init__(self, path: str | None) -> None:
        super().__init__(path)
        self.path = path


Run = tuple[Batch, ...]
"""Neighbours in the stream that become one, two or more."""


def due(
    batches: Sequence[Batch], newest: Batch, limits: Limits, unmergeable: frozenset[str] = frozenset()
) -> list[Run]:
    """What can be merged of a day's batches, in the order of the stream. newest: of the archive; its hour is not over.
    unmergeable: paths of segments that are left alone."""
    closed = [one for one in batches if _hour(one) != _hour(newest)]
    runs: list[Run] = []
    for _, of_one_time in groupby(closed, key=lambda one: _hour(one) if one.day == newest.day else 0):
        run: Run = ()
        for one in of_one_time:
            longer = (*run, one)
            if run and not _fits(longer, limits, unmergeable):
                runs.append(run)
                longer = (one,)
            run = longer
        runs.append(run)
    return [run for run in runs if len(run) > 1]


def merge(archive: Archive, run: Run, fence: Fence, now: float) -> Batch:
    """The batch that they became. Raises Unmergeable, Overtaken, StaleView, OSError; again is the same."""
    stretch = Stretch(run[0].first, run[-1].last)
    segments = [segment for batch in run for segment in batch.segments]
    partitions: dict[Partition, list[Segment]] = {}
    for segment in segments:
        partitions.setdefault(segment.partition, []).append(segment)
    merged = Batch(
        first=stretch.first,
        last=stretch.last,
        entries=sum(batch.entries for batch in run),
        groups=sum(batch.groups for batch in run),
        segments=tuple(
            _merged(archive, FileName(partition, stretch, fence.epoch), alike)
            for partition, alike in partitions.items()
        ),
        merged=tuple(part for batch in run for part in batch.parts),
    )
    gone = [Superseded(path=one.path, since=now) for one in segments if one.path is not None]
    archive.manifest.replace(run, merged, fence, gone)
    crash_point("merge.named")
    return merged


def remove_superseded(archive: Archive, day: str, before: float, fence: Fence) -> list[str]:
    """The files of a day that stand in another for so long; seconds since the epoch. Raises Overtaken, OSError."""
    gone = [one for one in archive.manifest.read(day).superseded if one.since <= before]
    if not gone:
        return []
    fence.confirm()
    for one in gone:
        archive.storage.delete(one.path)
        crash_point("superseded.removed")

    def forget(known: DayManifest) -> DayManifest:
        return known.model_copy(update={"superseded": tuple(one for one in known.superseded if one not in gone)})

    archive.manifest.change(day, forget, fence)
    return [one.path for one in gone]


def _hour(batch: Batch) -> int:
    return batch.last.ms // HOUR_MS


def _fits(run: Run, limits: Limits, unmergeable: frozenset[str]) -> bool:
    if any(len({one.partition for one in batch.segments}) < len(batch.segments) for batch in run):
        return False  # two files of a partition that share their stretch: one in another would not be in order
    sizes: Counter[Partition] = Counter()
    lacking: dict[Partition, tuple[str, ...]] = {}
    for segment in (segment for batch in run for segment in batch.segments):
        sizes[segment.partition] += segment.bytes
        # What is retained stays so, and what is not is not counted as if it were.
        if segment.path in unmergeable or lacking.setdefault(segment.partition, segment.lacks) != segment.lacks:
            return False
    is_short = limits.seconds is None or run[-1].last.ms - run[0].first.ms <= limits.seconds * 1000
    return is_short and max(sizes.values(), default=0) <= limits.bytes


def _merged(archive: Archive, name: FileName, segments: Sequence[Segment]) -> Segment:
    """The rows of some segments of one partition, in their order, in one file."""
    told = {
        "first_created": min(one.first_created for one in segments),
        "last_created": max(one.last_created for one in segments),
        "totals": sum_of(one.totals for one in segments),
    }
    there = [one for one in segments if one.path is not None]
    if not there:
        return segments[0].model_copy(update=told)
    content = parquet_bytes(_tables(archive, there))
    archive.storage.put(name.path, content)
    crash_point("merge.written")
    written = {
        "path": name.path,
        "rows": sum(one.rows for one in there),
        "bytes": len(content),
        "sha256": sha256(content).hexdigest(),
        "revision": 0,
    }
    return there[0].model_copy(update=told | written)


def _tables(archive: Archive, segments: Iterable[Segment]) -> Iterator[pa.Table]:
    for segment in segments:
        try:
            table = archive.load(segment)
        except (DamagedSegment, FileNotFoundError, pa.ArrowInvalid) as error:
            log.error("%s is not merged: %s", segment.path, type(error).__name__)
            raise Unmergeable(segment.path) from None
        if table.schema != SCHEMAS[segment.kind] or len(table) != segment.rows:
            log.error("%s is not merged: it was written by another version", segment.path)
            raise Unmergeable(segment.path)
        yield table

"""What files the archive consists of, and merging small ones where no compactor is there to do it.

Owns: the tables. Does not own: what is merged and how (`archive.merging`, `worker.merging`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby

from rich.table import Table

from archive.fence import ALONE
from archive.manifest import Batch, Segment
from archive.merging import Run
from archive.reading import Archive
from archive.repair import sweep
from archive.retention import Retention
from archive.tables import SegmentSet
from bonsai.ledger.place import Place
from bonsai.ledger.retention import LEASE_SECONDS
from worker.archive_lease import ArchiveLease
from worker.compaction import is_in_stream
from worker.merging import Merging, limits_of

MIB = 2**20


def addresses(archive: Archive, kind: SegmentSet) -> list[str]:
    """Of the files of one kind that count, the oldest entries first."""
    paths = [one.path for batch in _batches(archive) for one in batch.segments if one.kind == kind]
    return [archive.storage.address(path) for path in paths if path is not None]


def overview(archive: Archive) -> Table:
    """By day, of when entries were delivered, and kind: files, rows, size."""
    drawn = Table("day", "kind", "files", "rows", "MiB", title="Segments", title_justify="left")
    there = sorted(
        ((batch.day, one.kind, one) for batch in _batches(archive) for one in _files(batch)), key=lambda row: row[:2]
    )
    for (day, kind), rows in groupby(there, key=lambda row: row[:2]):
        files = [one for _, _, one in rows]
        size = sum(one.bytes for one in files) / MIB
        drawn.add_row(day, kind, str(len(files)), str(sum(one.rows for one in files)), f"{size:.1f}")
    return drawn


def merged(place: Place, retention: str, target_bytes: int, *, dry_run: bool) -> Iterator[Table]:
    """retention: JSON. Raises ValidationError for other than that, Overtaken while a compactor works."""
    limits = limits_of(target_bytes, Retention.model_validate_json(retention).shortest_of_all)
    if dry_run:
        yield _runs(Merging(place.archive, limits, ALONE).plan(), "What would be merged")
        return
    with ArchiveLease(place.client, place.archive, LEASE_SECONDS) as lease:
        sweep(place.archive, lease, partial(is_in_stream, place.client))
        merging = Merging(place.archive, limits, lease)
        plan = list(merging.plan())
        while merging.step() is not None:
            pass
        merging.tidy()
    yield _runs(plan, "What was merged")


def _runs(runs: Iterable[Run], title: str) -> Table:
    drawn = Table("day", "batches", "files before", "files after", "MiB", title=title, title_justify="left")
    for run in runs:
        files = [one for batch in run for one in _files(batch)]
        after = len({one.partition for one in files})
        size = sum(one.bytes for one in files) / MIB
        drawn.add_row(run[0].day, str(len(run)), str(len(files)), str(after), f"{size:.1f}")
    return drawn


def _batches(archive: Archive) -> list[Batch]:
    return list(archive.manifest.batches_newest_first())[::-1]


def _files(batch: Batch) -> list[Segment]:
    return [one for one in batch.segments if one.path is not None]

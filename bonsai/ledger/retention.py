"""What retention takes, as a table; and taking it, where no compactor is there to do it.

Owns: the table. Does not own: times and rows (`archive.retention`), what is kept whatever its age (`worker.retaining`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from rich.table import Table

from archive.reading import Archive, DamagedSegment
from archive.repair import sweep
from archive.retention import CLASSES, Due, Retention
from bonsai.ledger.place import Place
from worker.archive_lease import ArchiveLease
from worker.compaction import is_in_stream
from worker.retaining import Retaining

LEASE_SECONDS: Final = 60.0
log = logging.getLogger("bonsai.ledger")


def retained(place: Place, retention: str, *, dry_run: bool) -> Iterator[Table]:
    """retention: JSON. Raises ValidationError for other than that, Overtaken while a compactor works."""
    settings = Retention.model_validate_json(retention)
    retaining = Retaining(place.client, place.archive, place.artefacts, settings)
    if dry_run:
        yield table_of(place.archive, retaining, retaining.plan(), "What would go")
        return
    with ArchiveLease(place.client, place.archive, LEASE_SECONDS) as lease:
        sweep(place.archive, lease, partial(is_in_stream, place.client))
        plan = retaining.plan()
        told = table_of(place.archive, retaining, plan, "What went")
        retaining.carry_out(lease)
    yield told


def table_of(archive: Archive, retaining: Retaining, plan: Sequence[Due], title: str) -> Table:
    """By class: segments, rows that lose something, rows that are kept by feedback or a dataset."""
    segments: Counter[str] = Counter()
    losing: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for one in plan:
        num_kept = 0
        if one.segment.path is not None:
            try:
                rows = archive.load(one.segment).to_pylist()
            except (DamagedSegment, FileNotFoundError) as error:
                log.error("%s is left as it is: %s", one.segment.path, type(error).__name__)
                continue
            spared = retaining.kept(one.segment, rows)
            num_kept = sum(row.get("group_id", row.get("id")) in spared for row in rows)
        for name in one.classes:
            segments[name] += 1
            losing[name] += one.segment.rows - num_kept
            kept[name] += num_kept
    drawn = Table("class", "segments", "rows that lose it", "rows that keep it", title=title, title_justify="left")
    for name in CLASSES:
        drawn.add_row(name, str(segments[name]), str(losing[name]), str(kept[name]))
    return drawn

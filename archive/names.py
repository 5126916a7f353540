"""What the files of segments are called, and what a name tells.

Owns: paths. Does not own: which of them exist (manifest.py). Two writers never write the same name: it holds the epoch
of whoever wrote the file, so that one that was frozen and wakes harms nobody else's.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple, Self, cast

from archive.tables import SegmentSet
from bon_algos.ledger_entries import EntryId

NO_ROUTE: Final = "__HIVE_DEFAULT_PARTITION__"
"""How a path says null, for everybody who reads partitioned data."""
_FILE: Final = re.compile(
    r"(?P<kind>[a-z]+)/tenant=(?P<tenant>[^/]+)/day=(?P<day>[^/]+)/route=(?P<route>[^/]+)/"
    r"segment-(?P<first>\d+-\d+)-(?P<last>\d+-\d+)(\.e(?P<epoch>\d+))?(\.r(?P<revision>\d+))?\.parquet"
)


class Partition(NamedTuple):
    """What the rows of one file have in common."""

    kind: SegmentSet
    tenant: str
    day: str
    """Of the records' creation, UTC."""
    route: str | None


class Stretch(NamedTuple):
    """Of the stream; both ends belong to it."""

    first: EntryId
    last: EntryId

    def has(self, other: Stretch) -> bool:
        """The whole of it."""
        return self.first <= other.first and other.last <= self.last

    def meets(self, other: Stretch) -> bool:
        return self.first <= other.last and other.first <= self.last


class FileName(NamedTuple):
    """Of a segment."""

    partition: Partition
    stretch: Stretch
    epoch: int
    """Of the writer; 0: one that was alone."""
    revision: int = 0
    """How often the rows were rewritten."""

    @property
    def path(self) -> str:
        kind, tenant, day, route = self.partition
        written = (f".e{self.epoch}" if self.epoch else "") + (f".r{self.revision}" if self.revision else "")
        file = f"segment-{self.stretch.first}-{self.stretch.last}{written}.parquet"
        return f"{kind}/tenant={tenant}/day={day}/route={route or NO_ROUTE}/{file}"

    @classmethod
    def parse(cls, path: str) -> Self | None:
        """None for what is no name of a segment."""
        if (found := _FILE.fullmatch(path)) is None:
            return None
        kind, tenant, day, route = found.group("kind", "tenant", "day", "route")
        partition = Partition(cast(SegmentSet, kind), tenant, day, None if route == NO_ROUTE else route)
        stretch = Stretch(EntryId.parse(found["first"]), EntryId.parse(found["last"]))
        return cls(partition, stretch, int(found["epoch"] or 0), int(found["revision"] or 0))

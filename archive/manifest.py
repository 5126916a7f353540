"""What the archive consists of, day by day: batches of the stream and the segments each became.

Owns: the manifest's form and its files. Does not own: segments. A day's file is replaced as a whole, so a batch is in
the archive with all its segments or with none. Only the process that holds the lease writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from pydantic import Field, ValidationError

from archive.storage import Storage
from archive.tables import SegmentSet
from bon_algos.contracts import SCHEMA_VERSION, Record
from bon_algos.ledger_entries import EntryId

DIRECTORY: Final = "_manifest"
NO_ROUTE: Final = "__HIVE_DEFAULT_PARTITION__"
"""How a path says null, for everybody who reads partitioned data."""


class Totals(Record):
    """What is known of a segment's groups when they are gone."""

    groups: int = 0
    candidates: int = 0
    scored: int = 0
    reward_sum: float = 0.0
    candidate_tokens: int = 0


class Segment(Record):
    """One file of a batch, or what is left of one."""

    kind: SegmentSet
    tenant: str
    day: str
    """Of the records' creation, UTC."""
    route: str | None
    path: str | None
    """None: its rows are gone, its totals are kept."""
    rows: int
    bytes: int
    sha256: str
    first_created: float
    last_created: float
    revision: int = 0
    """How often it was rewritten."""
    lacks: tuple[str, ...] = ()
    """Classes of content whose time was up."""
    totals: Totals = Totals()

    def is_of(self, tenant: str | None, route: str | None) -> bool:
        """None: of any."""
        return tenant in (None, self.tenant) and route in (None, self.route)


class Batch(Record):
    """A stretch of the stream."""

    first: EntryId
    last: EntryId
    entries: int
    groups: int
    segments: tuple[Segment, ...]

    @property
    def day(self) -> str:
        """Whose manifest it stands in."""
        return day_of(self.last.ms / 1000)


class DayManifest(Record):
    schema_version: int = SCHEMA_VERSION
    batches: tuple[Batch, ...] = Field(())
    """In the order of the stream."""


class DamagedManifest(OSError):
    """A manifest cannot be read: nothing is known of its day."""


def day_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def segment_path(kind: SegmentSet, tenant: str, day: str, route: str | None, batch: tuple[EntryId, EntryId]) -> str:
    first, last = batch
    return f"{kind}/tenant={tenant}/day={day}/route={route or NO_ROUTE}/segment-{first}-{last}.parquet"


def revised_path(path: str, revision: int) -> str:
    """Of a segment that is rewritten: the old file stays good until the manifest names the new one."""
    stem = path.removesuffix(".parquet").partition(".r")[0]
    return f"{stem}.r{revision}.parquet"


class Manifest:
    """The manifests of one archive."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def days(self) -> list[str]:
        """Those that have one, the oldest first."""
        names = (name.rpartition("/")[2] for name in self._storage.names(DIRECTORY))
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def read(self, day: str) -> DayManifest:
        """Raises DamagedManifest."""
        try:
            return DayManifest.model_validate_json(self._storage.get(_file(day)))
        except FileNotFoundError:
            return DayManifest()
        except ValidationError as error:
            raise DamagedManifest(f"the manifest of {day} cannot be read: {error.error_count()} errors") from None

    def write(self, day: str, manifest: DayManifest) -> None:
        self._storage.put(_file(day), manifest.model_dump_json().encode())

    def batches_newest_first(self) -> Iterator[Batch]:
        for day in reversed(self.days()):
            yield from reversed(self.read(day).batches)

    def position(self) -> EntryId:
        """The last entry that is in the archive; 0-0 for none."""
        return next((batch.last for batch in self.batches_newest_first()), EntryId(0, 0))

    def add(self, batch: Batch) -> None:
        """In its place, also when it stands there already."""
        known = self.read(batch.day).batches
        others = [one for one in known if one.first != batch.first]
        batches = sorted([*others, batch], key=lambda one: one.first)
        self.write(batch.day, DayManifest(batches=tuple(batches)))


def _file(day: str) -> str:
    return f"{DIRECTORY}/{day}.json"

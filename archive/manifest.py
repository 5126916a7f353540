"""What the archive consists of, day by day: batches of the stream and the segments each became.

Owns: the manifests' form and their files. Does not own: segments.

    _manifest/root.e7.json                   which file is the manifest of which day, by the writer of epoch 7
    _manifest/2026-11-22.e7-0c5d9e12.json    one day's, never changed: another takes its place

A change is there with the new root or not at all, so a batch is in the archive with all its segments or with none. Of
the roots that of the newest epoch counts. A writer begins with a root of its own, and whatever another one does that
was frozen and wakes, it does to a root that nobody reads.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import takewhile
from typing import Final

from pydantic import Field, ValidationError

from archive.fence import ALONE, Fence
from archive.names import Partition, Stretch
from archive.storage import Storage
from archive.tables import SegmentSet
from bon_algos.contracts import SCHEMA_VERSION, Record
from bon_algos.crash_points import crash_point
from bon_algos.ledger_entries import EntryId

DIRECTORY: Final = "_manifest"
READS: Final = 3
"""Of a file that the writer replaces in the meantime."""
_ROOT: Final = re.compile(r"root\.e(\d+)\.json")
_BEFORE_ROOTS: Final = re.compile(r"\d{4}-\d\d-\d\d\.json")
"""As archives have them that no writer of epochs has opened."""
log = logging.getLogger("bonsai.archive")


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

    @property
    def partition(self) -> Partition:
        return Partition(self.kind, self.tenant, self.day, self.route)

    def is_of(self, tenant: str | None, route: str | None) -> bool:
        """None: of any."""
        return tenant in (None, self.tenant) and route in (None, self.route)


class Part(Record):
    """A stretch of the stream that was a batch, before it was merged."""

    first: EntryId
    last: EntryId
    groups: int

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.first, self.last)


class Batch(Record):
    """A stretch of the stream."""

    first: EntryId
    last: EntryId
    entries: int
    groups: int
    segments: tuple[Segment, ...]
    merged: tuple[Part, ...] = ()
    """What it was made of, in the order of the stream; nothing: it was written as it is."""

    @property
    def day(self) -> str:
        """Whose manifest it stands in."""
        return day_of(self.last.ms / 1000)

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.first, self.last)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.merged or (Part(first=self.first, last=self.last, groups=self.groups),)


class Superseded(Record):
    """A file whose rows stand in another one by now. Who has its name from an earlier manifest may still read it."""

    path: str
    since: float
    """Seconds since the epoch."""


class DayManifest(Record):
    schema_version: int = SCHEMA_VERSION
    batches: tuple[Batch, ...] = Field(())
    """In the order of the stream."""
    superseded: tuple[Superseded, ...] = ()


class DamagedManifest(OSError):
    """A manifest cannot be read: nothing is known of its day."""


class StaleView(OSError):
    """The archive is not what a change was made for: look again, and decide anew."""


def day_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


class Root(Record):
    """Which file is the manifest of a day."""

    days: dict[str, str] = Field(default_factory=dict)


class Manifest:
    """The manifests of one archive."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def days(self) -> list[str]:
        """Those that have one, the oldest first."""
        return sorted(self._root().days)

    def newest_epoch(self) -> int:
        """Of whoever wrote last; 0 before the first."""
        return max(self._epochs(), default=0)

    def read(self, day: str, reads: int = READS) -> DayManifest:
        """Raises DamagedManifest, OSError."""
        name = self._root().days.get(day)
        if name is None:
            return DayManifest()
        try:
            return self._read_file(name)
        except FileNotFoundError:
            # Another was put in its place.
            if reads == 1:
                raise
            return self.read(day, reads - 1)

    def batches_newest_first(self) -> Iterator[Batch]:
        days = self._root().days
        for day in sorted(days, reverse=True):
            try:
                known = self._read_file(days[day])
            except FileNotFoundError:
                known = self.read(day)
            yield from reversed(known.batches)

    def position(self) -> EntryId:
        """The last entry that is in the archive; 0-0 for none."""
        return next((batch.last for batch in self.batches_newest_first()), EntryId(0, 0))

    def seal(self, fence: Fence) -> None:
        """What others wrote so far counts, and nothing that they write from here on. Raises Overtaken, OSError."""
        if fence.epoch in self._epochs():
            return
        known = self._root().days
        there = set(self._names())
        for day in (day for day, name in known.items() if name not in there):
            log.error("the manifest of %s is lost", day)
        root = Root(days={day: name for day, name in known.items() if name in there})
        fence.confirm()
        crash_point("root.asked")
        self._storage.put(_root_file(fence.epoch), root.model_dump_json().encode())
        crash_point("root.written")

    def add(self, batch: Batch, fence: Fence = ALONE) -> None:
        """In its place, and in that of what a writer left that was frozen in the middle of the same. Raises StaleView
        where the archive goes on behind it, Overtaken, OSError."""
        for one in takewhile(lambda one: one.last >= batch.first, self.batches_newest_first()):
            if one.day != batch.day or not batch.stretch.has(one.stretch):
                raise StaleView(f"the archive has {one.first} to {one.last} already")
        self.restore(batch, fence)

    def restore(self, batch: Batch, fence: Fence) -> None:
        """Wherever it stands in the stream. Raises Overtaken, OSError."""

        def put_in(known: DayManifest) -> DayManifest:
            others = [one for one in known.batches if not batch.stretch.has(one.stretch)]
            return known.model_copy(update={"batches": _in_order(*others, batch)})

        self.change(batch.day, put_in, fence)

    def replace(
        self, before: Sequence[Batch], after: Batch, fence: Fence, superseded: Sequence[Superseded] = ()
    ) -> None:
        """One batch for some of the same day. Raises StaleView where these are not there, Overtaken, OSError."""

        def exchange(known: DayManifest) -> DayManifest:
            others = [one for one in known.batches if one not in before]
            if len(others) + len(before) != len(known.batches):
                raise StaleView(f"the batch at {after.first} is not what it was")
            gone = (*known.superseded, *superseded)
            return known.model_copy(update={"batches": _in_order(*others, after), "superseded": gone})

        self.change(after.day, exchange, fence)

    def change(self, day: str, change: Callable[[DayManifest], DayManifest], fence: Fence) -> None:
        """Read, change, write, as the only one who does. Raises what the change raises, Overtaken, OSError."""
        known = self.read(day)
        changed = change(known)
        if changed == known:
            return
        root = self._root()
        name = f"{day}.e{fence.epoch}-{secrets.token_hex(4)}.json"
        self._storage.put(f"{DIRECTORY}/{name}", changed.model_dump_json().encode())
        crash_point("manifest.written")
        fence.confirm()
        self._storage.put(_root_file(fence.epoch), Root(days={**root.days, day: name}).model_dump_json().encode())
        crash_point("manifest.named")
        # Who took over while this was written has not seen it: nothing may be built on it then.
        fence.confirm()
        if day in root.days:
            self._storage.delete(f"{DIRECTORY}/{root.days[day]}")

    def remove_unnamed(self) -> None:
        """Files that no reader looks at: of writers that died, or that another has overtaken."""
        named = {_root_file(self.newest_epoch()), *(f"{DIRECTORY}/{name}" for name in self._root().days.values())}
        for name in self._storage.names(DIRECTORY):
            if name not in named:
                self._storage.delete(name)

    def _root(self, reads: int = READS) -> Root:
        epochs = self._epochs()
        if not epochs:
            return Root(days={name[:-5]: name for name in self._names() if _BEFORE_ROOTS.fullmatch(name)})
        try:
            return Root.model_validate_json(self._storage.get(_root_file(max(epochs))))
        except FileNotFoundError:
            # The next writer's is there by now.
            if reads == 1:
                raise
            return self._root(reads - 1)
        except ValidationError as error:
            raise DamagedManifest(f"the list of manifests cannot be read: {error.error_count()} errors") from None

    def _read_file(self, name: str) -> DayManifest:
        try:
            return DayManifest.model_validate_json(self._storage.get(f"{DIRECTORY}/{name}"))
        except ValidationError as error:
            raise DamagedManifest(f"the manifest {name} cannot be read: {error.error_count()} errors") from None

    def _epochs(self) -> list[int]:
        """Of those who wrote and whose list of manifests is still there."""
        return [int(match[1]) for name in self._names() if (match := _ROOT.fullmatch(name)) is not None]

    def _names(self) -> list[str]:
        return [name.rpartition("/")[2] for name in self._storage.names(DIRECTORY)]


def _in_order(*batches: Batch) -> tuple[Batch, ...]:
    return tuple(sorted(batches, key=lambda one: one.first))


def _root_file(epoch: int) -> str:
    return f"{DIRECTORY}/root.e{epoch}.json"

"""From the stream into the archive: read as a consumer group, write, acknowledge, trim.

Owns: the order of these steps and how much of the stream stays hot. Does not own: the archive's files
(`archive.writing`), the process and its lease (`worker.compactor`).

A crash between any two steps repeats the batch: what was read and not acknowledged is still pending, what the manifest
names is only acknowledged. The stream loses nothing that the manifest does not name: a batch has all that the group has
handed out, to whomever, for what stands before the archive's end counts as written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Final, cast

import redis

from archive.fence import ALONE, Fence, Overtaken
from archive.manifest import Batch
from archive.names import Stretch
from archive.reading import Archive
from archive.writing import Entry, write_batch
from bon_algos.contracts import COMPACTOR_EPOCH, LEDGER_CONSUMERS, LEDGER_STREAM
from bon_algos.crash_points import crash_point
from bon_algos.ledger_entries import EntryId
from worker.erasures import Erasures

CONSUMER: Final = "one"
"""There is one at a time: whoever holds the lease goes on where the last one was."""
PAGE_ENTRIES: Final = 200
IDS_IN_A_COMMAND: Final = 1000
SHORTEST_WAIT_MS: Final = 1
# KEYS: epoch, stream. ARGV: our epoch, a command, what it is told beside the stream. -> -1 where it is not ours.
_AS_WRITER: Final = """
if tonumber(redis.call('GET', KEYS[1]) or '0') ~= tonumber(ARGV[1]) then return -1 end
return redis.call(ARGV[2], KEYS[2], unpack(ARGV, 3))
"""
log = logging.getLogger("bonsai.compactor")


@dataclass(frozen=True)
class Limits:
    """When a batch is written, and what of the stream stays."""

    entries: int
    bytes: int
    """Of the entries as Redis has them."""
    seconds: float
    """That the first entry of a batch waits for the last."""
    hot_groups: int
    hot_seconds: float
    """What is among the newest groups, or younger, is not trimmed…"""
    longest_seconds: float | None = None
    """…unless it is older than this: the shortest time that some content may be kept."""


class Compaction:
    """Of one stream into one archive; for one thread, under the lease."""

    def __init__(self, client: redis.Redis, archive: Archive, limits: Limits, fence: Fence = ALONE) -> None:
        self._client = client
        self._archive = archive
        self._limits = limits
        self._fence = fence
        self._entries: list[Entry] = []
        self._bytes = 0
        self._since = 0.0

    def open(self) -> None:
        """Take up what the last holder left: the group, and what it had read and not finished."""
        position = self._archive.manifest.position()
        with suppress(redis.ResponseError):  # BUSYGROUP: it is there
            self._client.xgroup_create(LEDGER_STREAM, LEDGER_CONSUMERS, id=str(position), mkstream=True)
        self._entries, self._bytes = [], 0
        after = EntryId(0, 0)
        while page := self._read(str(after), block_ms=None):
            after = page[-1].id
            done = [entry.id for entry in page if entry.id <= position or not entry.fields]
            if done:
                self._acknowledge(done)
            self._take([entry for entry in page if entry.id > position and entry.fields])

    def step(self, wait_seconds: float = 1.0) -> Batch | None:
        """Read on for a moment, and write the batch when it is due. Raises OSError, RedisError: call `open` again."""
        limits = self._limits
        if not self._is_full:
            left = limits.seconds - (monotonic() - self._since) if self._entries else wait_seconds
            wait_ms = max(SHORTEST_WAIT_MS, round(1000 * min(wait_seconds, max(0.0, left))))
            self._take(self._read(">", block_ms=wait_ms))
        if not self._entries or not (self._is_full or monotonic() - self._since >= limits.seconds):
            return None
        return self.flush()

    def flush(self) -> Batch | None:
        """Write what was read, whether it is much or little."""
        if self._num_pending() != len(self._entries):
            # One that was frozen and woke has read on: nobody else writes that, and it may stand before what we read.
            self.open()
        if not self._entries:
            return None
        self._drop_erased()
        batch = write_batch(self._archive, self._entries, self._fence)
        self._acknowledge([entry.id for entry in self._entries])
        crash_point("batch.acknowledged")
        self._entries, self._bytes = [], 0
        self.trim()
        crash_point("stream.trimmed")
        return batch

    def _drop_erased(self) -> None:
        """What a spool brings late of somebody who is to be forgotten goes no further."""
        erasures = Erasures.read(self._client)
        if not erasures:
            return
        gone = [entry.id for entry in self._entries if erasures.cover_entry(entry.fields)]
        if gone:
            self._client.xdel(LEDGER_STREAM, *map(str, gone))
            self._entries = [entry._replace(fields={}) if entry.id in gone else entry for entry in self._entries]

    def trim(self) -> int:
        """Take off the stream what is in the archive and not hot; how many entries that were."""
        cut = self._cut()
        if cut is None:
            return 0
        return self._as_writer("XTRIM", "MINID", str(cut))

    def _cut(self) -> EntryId | None:
        """The first entry that stays; None before the first batch. Whole batches are hot or not."""
        limits, now_ms = self._limits, round(self._server_time() * 1000)
        young = EntryId(now_ms - round(limits.hot_seconds * 1000), 0)
        behind: EntryId | None = None
        cut, groups = EntryId(0, 0), 0
        for part in (part for batch in self._archive.manifest.batches_newest_first() for part in reversed(batch.parts)):
            if behind is None:
                cut = behind = EntryId(part.last.ms, part.last.seq + 1)
            if groups >= limits.hot_groups and part.last < young:
                break
            cut, groups = part.first, groups + part.groups
        if behind is None:
            return None
        if limits.longest_seconds is None:
            return cut
        return max(cut, min(behind, EntryId(max(0, now_ms - round(limits.longest_seconds * 1000)), 0)))

    def _acknowledge(self, entries: Sequence[EntryId]) -> None:
        for start in range(0, len(entries), IDS_IN_A_COMMAND):
            self._as_writer("XACK", LEDGER_CONSUMERS, *map(str, entries[start : start + IDS_IN_A_COMMAND]))

    def _num_pending(self) -> int:
        """Entries that were read and not acknowledged, by whomever."""
        return cast(int, self._client.xpending(LEDGER_STREAM, LEDGER_CONSUMERS)["pending"])

    def _as_writer(self, command: str, *arguments: str) -> int:
        """A command on the stream, if nobody has written into the archive since we did. Raises Overtaken."""
        keys = (COMPACTOR_EPOCH, LEDGER_STREAM)
        answer = cast(int, self._client.eval(_AS_WRITER, len(keys), *keys, self._fence.epoch, command, *arguments))
        if answer < 0:
            raise Overtaken("another process writes into the archive, or did")
        return answer

    @property
    def _is_full(self) -> bool:
        return len(self._entries) >= self._limits.entries or self._bytes >= self._limits.bytes

    def _take(self, entries: list[Entry]) -> None:
        if entries and not self._entries:
            self._since = monotonic()
        self._entries += entries
        self._bytes += sum(len(entry.fields.get(b"data", b"")) for entry in entries)

    def _read(self, after: str, *, block_ms: int | None) -> list[Entry]:
        count = max(1, min(PAGE_ENTRIES, self._limits.entries - len(self._entries))) if after == ">" else PAGE_ENTRIES
        reply = self._client.xreadgroup(LEDGER_CONSUMERS, CONSUMER, {LEDGER_STREAM: after}, count=count, block=block_ms)
        pages = cast("list[tuple[bytes, list[tuple[bytes, Mapping[bytes, bytes] | None]]]]", reply or [])
        return [Entry(EntryId.parse(name), fields or {}) for _, page in pages for name, fields in page]

    def _server_time(self) -> float:
        """By the clock that made the entries' ids."""
        seconds, microseconds = self._client.time()
        return seconds + microseconds / 1e6


def is_in_stream(client: redis.Redis, stretch: Stretch) -> bool:
    """Whether any entry of it is still there."""
    return bool(client.xrange(LEDGER_STREAM, str(stretch.first), str(stretch.last), count=1))

"""The process that moves the ledger into its archive: `python -m worker.compactor`.

Owns: its loop, and what it does when Redis or the store is away. Does not own: what a batch is (compaction.py), what
is merged (merging.py), what goes when (retaining.py), erasures (erasing.py). Started twice, one works and the other
waits for the lease.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final

import redis

from archive.fence import Overtaken
from archive.merging import Limits as MergeLimits
from archive.reading import Archive
from archive.repair import sweep
from archive.retention import Retention
from archive.storage import archive_url
from worker.archive_lease import ArchiveLease
from worker.compaction import Compaction, Limits, is_in_stream
from worker.erasing import Eraser
from worker.merging import Merging
from worker.merging import limits_of as merges_of
from worker.retaining import Retaining
from worker.settings import CompactorSettings

READY: Final = "the compactor works"
STANDBY: Final = "the compactor waits: another process writes into the archive"
"""What `bonsai up` looks for in the log, one or the other."""
STANDBY_SECONDS: Final = 5.0
ERASURE_SECONDS: Final = 2.0
MERGE_SECONDS: Final = 60.0
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
REDIS_TIMEOUT_SECONDS: Final = 10.0
log = logging.getLogger("bonsai.compactor")


class Compactor:
    """All that is done to one archive, by turns."""

    def __init__(
        self,
        client: redis.Redis,
        archive: Archive,
        artefacts: Path,
        limits: Limits,
        retention: Retention,
        merges: MergeLimits,
        *,
        lease_seconds: float,
        retention_seconds: float,
    ) -> None:
        """client: one that answers in bytes. retention_seconds: between two looks at what is to go."""
        self._client = client
        self._archive = archive
        self._artefacts = artefacts
        self._limits = limits
        self._retention = retention
        self._merges = merges
        self._lease_seconds = lease_seconds
        self._retention_seconds = retention_seconds

    def run(self, stopping: threading.Event) -> None:
        """Until told to stop. What fails is tried again, after a pause that grows while nothing succeeds."""
        pause = FIRST_PAUSE_SECONDS
        while not stopping.is_set():
            began = monotonic()
            try:
                self._hold(stopping)
            except Overtaken:
                log.info(STANDBY)
                stopping.wait(STANDBY_SECONDS)
            except (redis.RedisError, OSError) as error:
                pause = FIRST_PAUSE_SECONDS if monotonic() - began > LONGEST_PAUSE_SECONDS else pause
                # The text of an object store's error may hold a name of a file, and none holds what was said.
                log.error("compaction failed, tried again in %.1f s: %s: %s", pause, type(error).__name__, error)
                stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _hold(self, stopping: threading.Event) -> None:
        """Work while the lease is ours."""
        with ArchiveLease(self._client, self._archive, self._lease_seconds) as lease:
            sweep(self._archive, lease, partial(is_in_stream, self._client))
            compaction = Compaction(self._client, self._archive, self._limits, lease)
            eraser = Eraser(self._client, self._archive, self._artefacts, lease)
            merging = Merging(self._archive, self._merges, lease)
            compaction.open()
            log.info(READY)
            erase_at = retain_at = merge_at = monotonic()
            while not stopping.is_set():
                if (batch := compaction.step()) is not None:
                    log.info("%d entries up to %s are in the archive", batch.entries, batch.last)
                if monotonic() >= erase_at:
                    self._erase(eraser, compaction)
                    erase_at = monotonic() + ERASURE_SECONDS
                if monotonic() >= merge_at and not self._merge(merging):
                    merge_at = monotonic() + MERGE_SECONDS
                if monotonic() >= retain_at:
                    retaining = Retaining(self._client, self._archive, self._artefacts, self._retention)
                    for one in retaining.carry_out(lease):
                        log.info("%s lost %s", one.segment.path, ", ".join(one.classes))
                    compaction.trim()
                    retain_at = monotonic() + self._retention_seconds

    @staticmethod
    def _merge(merging: Merging) -> bool:
        """Make one batch of some; whether there may be more."""
        if (batch := merging.step()) is None:
            merging.tidy()
            return False
        log.info("%d batches up to %s are one", len(batch.merged), batch.last)
        return True

    @staticmethod
    def _erase(eraser: Eraser, compaction: Compaction) -> None:
        if not eraser.has_work():
            return
        compaction.flush()  # what was read is neither in the archive nor looked at in the stream's pending part
        for erasure in eraser.work():
            log.info("%s is %s", erasure.id, erasure.state)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = CompactorSettings()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with redis.Redis.from_url(settings.redis_url, socket_timeout=REDIS_TIMEOUT_SECONDS) as client:
        compactor = Compactor(
            client,
            Archive.at(archive_url(settings.archive, settings.artefacts)),
            settings.artefacts,
            limits_of(settings),
            settings.retention,
            merges_of(settings.merge_bytes, settings.retention.shortest_of_all),
            lease_seconds=settings.lease_seconds,
            retention_seconds=settings.retention_seconds,
        )
        compactor.run(stopping)
    return 0


def limits_of(settings: CompactorSettings) -> Limits:
    return Limits(
        entries=settings.compaction_entries,
        bytes=settings.compaction_bytes,
        seconds=settings.compaction_seconds,
        hot_groups=settings.hot_groups,
        hot_seconds=settings.hot_seconds,
        longest_seconds=settings.retention.shortest_of_all,
    )


if __name__ == "__main__":
    sys.exit(main())

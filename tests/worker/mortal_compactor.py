"""A compactor's turn in a process that may be killed on the way: `python -m tests.worker.mortal_compactor` reads lines
of JSON, [PLACE, REDIS_URL, DIRECTORY], and answers each with the exit code of a process forked for it, which has
everything loaded.

Owns: the turn. Does not own: at which place it dies, and what must be true then.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path

import redis

from archive.merging import Limits as MergeLimits
from archive.reading import Archive
from archive.retention import Retention
from bon_algos.crash_points import CRASH_AT
from worker.compaction import Limits
from worker.compactor import Compactor

LIMITS = Limits(entries=1000, bytes=2**20, seconds=0.0, hot_groups=2, hot_seconds=0.0)
TEXTS_GO = Retention(text=1, keep=("pinned",))


class Turns(threading.Event):
    """Tells a loop to stop after so many."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self._looks = turns + 1  # one before the lease is taken

    def is_set(self) -> bool:
        self._looks -= 1
        return self._looks < 0


def turn(redis_url: str, directory: Path) -> None:
    """A batch, erasures, a merge, what is too old: what there is to do of each."""
    with redis.Redis.from_url(redis_url) as client:
        archive, merges = Archive.at(str(directory / "ledger")), MergeLimits(2**20)
        Compactor(client, archive, directory, LIMITS, TEXTS_GO, merges, lease_seconds=60, retention_seconds=60).run(
            Turns(1)
        )


def fork(point: str, redis_url: str, directory: str) -> int:
    """A turn in a process that dies at this place; how it ended."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.environ[CRASH_AT] = point
    try:
        turn(redis_url, Path(directory))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    for asked in sys.stdin:
        print(fork(*json.loads(asked)), flush=True)

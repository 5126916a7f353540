"""Merging in a stack: a little at a time, between two batches.

Owns: what is looked at when. Does not own: what is merged and how (`archive.merging`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from time import time
from typing import Final

from archive.fence import Fence
from archive.manifest import Batch
from archive.merging import Limits, Run, Unmergeable, due, merge, remove_superseded
from archive.reading import Archive

SPAN_OF_RETENTION: Final = 1 / 24
"""Of the shortest time that something is kept: a file goes with its youngest row, so it may not span much of it."""
GRACE_SECONDS: Final = 3600.0
"""For which a file that was merged stays for those who have its name from before."""
log = logging.getLogger("bonsai.compactor")


def limits_of(target_bytes: int, shortest_seconds: float | None) -> Limits:
    """shortest_seconds: that some content is kept; None: all for good."""
    return Limits(target_bytes, None if shortest_seconds is None else shortest_seconds * SPAN_OF_RETENTION)


class Merging:
    """Of one archive, by the one that writes."""

    def __init__(self, archive: Archive, limits: Limits, fence: Fence, *, grace_seconds: float = GRACE_SECONDS) -> None:
        self._archive = archive
        self._limits = limits
        self._fence = fence
        self._grace_seconds = grace_seconds
        self._done: set[str] = set()
        """Days of which nothing is left to do."""
        self._unmergeable: frozenset[str] = frozenset()

    def plan(self) -> Iterator[Run]:
        """What can be merged, the newest day first. Raises OSError."""
        newest: Batch | None = None
        for day in reversed(self._archive.manifest.days()):
            if day in self._done:
                continue
            known = self._archive.manifest.read(day)
            newest = newest or next(reversed(known.batches), None)
            runs = due(known.batches, newest, self._limits, self._unmergeable) if newest is not None else []
            yield from runs
            if newest is not None and newest.day != day and not runs and not known.superseded:
                self._done.add(day)

    def step(self) -> Batch | None:
        """Merge what is first in the plan, if anything is. Raises Overtaken, OSError."""
        for run in self.plan():
            try:
                return merge(self._archive, run, self._fence, time())
            except Unmergeable as one:
                self._unmergeable |= {one.path or ""}
        return None

    def tidy(self) -> int:
        """Remove what was merged long enough ago; how many files. Raises Overtaken, OSError."""
        before = time() - self._grace_seconds
        days = [day for day in self._archive.manifest.days() if day not in self._done]
        return sum(len(remove_superseded(self._archive, day, before, self._fence)) for day in days)

"""Retention in a stack: which groups have feedback or are pinned, and what Redis holds of what went.

Owns: asking Redis, the archive and the frozen windows. Does not own: times and rows (`archive.retention`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import time
from typing import Any, cast

import redis

from archive.fence import Fence
from archive.manifest import Segment
from archive.reading import Archive, DamagedSegment
from archive.retention import Due, Retention, apply, due
from bon_algos.contracts import feedback_key, target_of
from bon_algos.crash_points import crash_point
from worker.sources import DamagedSources, pinned

log = logging.getLogger("bonsai.compactor")


@dataclass(frozen=True)
class Retaining:
    """One pass of the retention of one archive."""

    client: redis.Redis
    archive: Archive
    artefacts: Path
    retention: Retention

    def plan(self) -> list[Due]:
        """What would go now; nothing while it is not known what is pinned."""
        try:
            _ = self._pinned
        except DamagedSources as error:
            log.error("nothing is taken that is too old: %s", error)
            return []
        return due(self.archive, self.retention, time())

    @cached_property
    def _pinned(self) -> frozenset[str]:
        return pinned(self.artefacts) if "pinned" in self.retention.keep else frozenset()

    @cached_property
    def _said_of(self) -> frozenset[str]:
        """Groups that the archive has feedback on: a Redis that was lost has none of before."""
        found: set[str | None] = set()
        for batch in self.archive.manifest.batches_newest_first():
            for segment in (one for one in batch.segments if one.kind == "feedback" and one.path is not None):
                try:
                    found |= set(self.archive.load(segment, ("group_id",)).column("group_id").to_pylist())
                except (DamagedSegment, FileNotFoundError) as error:
                    log.error("whom %s speaks of only Redis knows: %s", segment.path, type(error).__name__)
        return frozenset(one for one in found if one is not None)

    def kept(self, segment: Segment, rows: Sequence[Mapping[str, Any]]) -> frozenset[str]:
        """Groups among the rows that are kept whatever their age."""
        ids = [group for row in rows if (group := row.get("group_id", row.get("id"))) is not None]
        found = set(ids) & self._pinned
        if "feedback" in self.retention.keep:
            found |= self._with_feedback(ids) | (set(ids) & self._said_of)
        return frozenset(found)

    def carry_out(self, fence: Fence) -> list[Due]:
        """What went. Raises Overtaken, OSError, RedisError; again is the same."""
        return apply(self.archive, self.plan(), self.retention, self.kept, forgotten=self._forget_answers, fence=fence)

    def _with_feedback(self, ids: Sequence[str]) -> set[str]:
        with self.client.pipeline(transaction=False) as pipe:
            for one in ids:
                pipe.exists(feedback_key(one))
            answers = cast("list[int]", pipe.execute())
        return {one for one, exists in zip(ids, answers, strict=True) if exists}

    def _forget_answers(self, segment: Segment, rows: Sequence[Mapping[str, Any]]) -> None:
        """Feedback goes from Redis with the first of its content."""
        if segment.kind == "feedback" and rows:
            targets = {target_of(row["group_id"], row["session"], segment.tenant) for row in rows}
            self.client.delete(*map(feedback_key, targets))
            crash_point("answers.forgotten")

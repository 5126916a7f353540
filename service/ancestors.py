"""What the ancestors of a policy were trained on, for whoever tells beforehand how a window would be split.

Owns reading the records and windows. Does not own the walk (`bon_algos.ancestors`): the worker takes the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from redis.asyncio import Redis

from bon_algos.acceptance import Unusable
from bon_algos.ancestors import Lineage, lineage, pools_path
from bon_algos.contracts import POLICIES_DELETED, PolicyId, PolicyRecord, policy_key
from service.record_reading import read_record
from service.store import translated


class Ancestors:
    """Of policies in one Redis, whose windows lie among one directory of artefacts."""

    def __init__(self, redis: Redis, artefacts: Path) -> None:
        """redis: one that answers in bytes."""
        self._redis, self._artefacts = redis, artefacts

    async def of(self, parents: Sequence[PolicyId]) -> Lineage | Unusable:
        """Of a policy that is made from these, or why nobody can know it. Raises StoreUnavailable."""
        records: dict[PolicyId, PolicyRecord | None] = {}
        deleted: set[PolicyId] = set()
        waiting = set(parents)
        while waiting:
            one = waiting.pop()
            with translated():
                row = cast("bytes | None", await self._redis.hget(policy_key(one), "record"))
                if row is None and await self._redis.zscore(POLICIES_DELETED, one) is not None:
                    deleted.add(one)
            record = records[one] = None if row is None else read_record(PolicyRecord, row)
            waiting |= frozenset[PolicyId]() if record is None else record.parents - records.keys()
        try:
            return await asyncio.to_thread(
                lineage,
                parents,
                records.get,
                deleted.__contains__,
                lambda job_id: pools_path(self._artefacts, job_id).open("rb"),
            )
        except Unusable as reason:
            return reason

"""What the ancestors of a job's policy were trained on, as Redis and the frozen windows among the artefacts tell.

Owns reading both. Does not own the walk (`bon_algos.ancestors`) nor the split (`dataset`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import redis

from bon_algos import ancestors
from bon_algos.acceptance import Unusable
from bon_algos.ancestors import Lineage, pools_path
from bon_algos.contracts import POLICIES_DELETED, PolicyId, PolicyRecord, policy_key
from worker.errors import JobFailed


def lineage(client: redis.Redis, artefacts: Path, parents: Sequence[PolicyId]) -> Lineage:
    """As `ancestors.lineage`. Raises JobFailed."""
    try:
        return ancestors.lineage(
            parents,
            partial(_record, client),
            lambda policy_id: client.zscore(POLICIES_DELETED, policy_id) is not None,
            lambda job_id: pools_path(artefacts, job_id).open("rb"),
        )
    except Unusable as reason:
        raise JobFailed(reason.code, reason.message) from reason


def _record(client: redis.Redis, policy_id: PolicyId) -> PolicyRecord | None:
    row = client.hget(policy_key(policy_id), "record")
    return None if row is None else PolicyRecord.model_validate_json(row)

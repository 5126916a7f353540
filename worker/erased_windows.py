"""From a dataset that is not what it was to the jobs and policies that learned from it.

Owns: ending jobs that read such a window, marking policies, which the audit tells. Does not own: finding the windows
(erasing.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final, cast

import redis

from bon_algos.audit_entries import GENESIS, chained
from bon_algos.contracts import (
    AUDIT_STREAM,
    JOB_LUA,
    OPEN_JOBS,
    POLICIES_INDEX,
    PolicyRecord,
    job_events_key,
    job_key,
    policy_key,
)

CODE: Final = "window_erased"
MESSAGE: Final = "rows of its window were erased at their owner's request: submit the job again"

# KEYS: job, its events, open jobs. ARGV: job id, code, message. One more epoch: what the worker that runs it still
# sends is refused.
_FAIL: Final = (
    JOB_LUA
    + """
local state = redis.call('HGET', KEYS[1], 'state')
if NEXT[state or ''] == '  ' or not state then return 0 end
if state == 'running' then spend(KEYS[1]) end
redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('HSET', KEYS[1], 'error_code', ARGV[2], 'error_message', ARGV[3])
move(KEYS[1], KEYS[2], 'failed')
redis.call('SREM', KEYS[3], ARGV[1])
return 1
"""
)


def fail_jobs(client: redis.Redis, jobs: Iterable[str]) -> None:
    """End those that are not over, with a code that says why."""
    for job_id in jobs:
        keys = (job_key(job_id), job_events_key(job_id), OPEN_JOBS)
        client.eval(_FAIL, len(keys), *keys, job_id, CODE, MESSAGE)


def taint(client: redis.Redis, jobs: frozenset[str]) -> tuple[str, ...]:
    """Mark the policies that these jobs made, and those that were made from them; all of these, marked or not.

    Again until nothing is new: what was registered while its parents were being marked is found by the next look, and
    once they are marked no job can register another (`lease.FINISH`).
    """
    marked: frozenset[str] = frozenset()
    while jobs and (more := _concerned(client, jobs) - marked):
        for name in sorted(more):
            _mark(client, name)
        marked |= more
    return tuple(sorted(marked))


def _concerned(client: redis.Redis, jobs: frozenset[str]) -> frozenset[str]:
    names = [name.decode() for name in cast("list[bytes]", client.zrange(POLICIES_INDEX, 0, -1))]
    records = {name: record for name in names if (record := _policy(client, name)) is not None}
    found = {name for name, one in records.items() if one.manifest is not None and one.manifest.job_id in jobs}
    while more := {name for name, one in records.items() if name not in found and found & one.parents}:
        found |= more
    return frozenset(found)


def _policy(client: redis.Redis, policy_id: str) -> PolicyRecord | None:
    found = cast("bytes | None", client.hget(policy_key(policy_id), "record"))
    return None if found is None else PolicyRecord.model_validate_json(found)


def _mark(client: redis.Redis, policy_id: str) -> None:
    key = policy_key(policy_id)

    def change(pipe: Any) -> None:
        row, newest = pipe.hget(key, "record"), pipe.xrevrange(AUDIT_STREAM, count=1)
        pipe.multi()
        if row is None:
            return  # deleted since
        record = PolicyRecord.model_validate_json(row)
        if record.tainted:
            return
        tainted = record.model_copy(update={"tainted": True, "version": record.version + 1})
        pipe.hset(key, mapping={"record": tainted.model_dump_json(), "version": str(tainted.version)})
        previous = newest[0][1].get(b"digest", b"").decode() if newest else GENESIS
        told = json.dumps({"state": record.state, "reason": CODE})
        entry = chained(
            "policy_tainted", tenant=record.tenant, by="worker", previous=previous, policy=policy_id, data=told
        )
        pipe.xadd(AUDIT_STREAM, entry)

    client.transaction(change, key, AUDIT_STREAM)

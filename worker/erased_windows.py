"""From a dataset that is not what it was to the jobs and policies that learned from it.

What was made from what is read from the registry and from the jobs, which outlive the policies that they made: what was
made from a policy that is deleted by now is found through the job that made that one.

Owns: ending jobs that read such a window, marking policies, which the audit tells. Does not own: finding the windows
(erasing.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any, Final, cast

import redis
from pydantic import ValidationError

from bon_algos.audit_entries import chained, newest_digest
from bon_algos.contracts import (
    AUDIT_STREAM,
    DEFAULT_TENANT,
    JOB_LUA,
    OPEN_JOBS,
    POLICIES_INDEX,
    JobSpec,
    PolicyRecord,
    job_events_key,
    job_key,
    jobs_index,
    policy_key,
)

CODE: Final = "window_erased"
MESSAGE: Final = "rows of its window were erased at their owner's request: submit the job again"

log = logging.getLogger("bonsai.compactor")

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


def taint(client: redis.Redis, jobs: frozenset[str], tenant: str = DEFAULT_TENANT) -> tuple[str, ...]:
    """Mark the policies that these jobs of a tenant made, and those that were made from them; all of these, marked or
    not, that are not deleted.

    Again until nothing is new: what was registered while its parents were being marked is found by the next look, and
    once they are marked no job can register another (`lease.FINISH`).
    """
    marked: frozenset[str] = frozenset()
    while jobs and (more := _concerned(client, jobs, tenant) - marked):
        for name in sorted(more):
            _mark(client, name)
        marked |= more
    return tuple(sorted(marked))


def _concerned(client: redis.Redis, jobs: frozenset[str], tenant: str) -> frozenset[str]:
    names = [name.decode() for name in cast("list[bytes]", client.zrange(POLICIES_INDEX, 0, -1))]
    records = {name: record for name in names if (record := _policy(client, name)) is not None}
    found = {name for name, one in records.items() if one.manifest is not None and one.manifest.job_id in jobs}
    parents = [(name, one.parents) for name, one in records.items()]
    for job_id, policy_id, made_from in _made(client, tenant):
        parents.append((policy_id, made_from))
        found |= {policy_id} if job_id in jobs else set()
    while more := {name for name, made_from in parents if name not in found and found & made_from}:
        found |= more
    return frozenset(found & records.keys())


def _made(client: redis.Redis, tenant: str) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Each job of a tenant that made a policy, the policy, and the policies that it was made from."""
    jobs = [name.decode() for name in cast("list[bytes]", client.zrange(jobs_index(tenant), 0, -1))]
    with client.pipeline(transaction=False) as pipe:
        for job_id in jobs:
            pipe.hmget(job_key(job_id), ["policy_id", "spec"])
        rows = cast("list[tuple[bytes | None, bytes | None]]", pipe.execute())
    for job_id, (policy_id, spec) in zip(jobs, rows, strict=True):
        if policy_id is not None:
            yield job_id, policy_id.decode(), _made_from(job_id, spec or b"")


def _made_from(job_id: str, spec: bytes) -> frozenset[str]:
    try:
        return frozenset(JobSpec.model_validate_json(spec).policies)
    except ValidationError:
        log.warning("what %s learned from is not known: its spec is of another version", job_id)
        return frozenset()


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
        told = json.dumps({"state": record.state, "reason": CODE})
        former = newest_digest(newest)
        pipe.xadd(
            AUDIT_STREAM,
            chained("policy_tainted", tenant=record.tenant, by="worker", previous=former, policy=policy_id, data=told),
        )

    client.transaction(change, key, AUDIT_STREAM)

"""Distillation jobs as their callers see them: submit, status, events, cancel.

Owns: the record of a job until a worker claims it, the idempotency of submission, cancellation. Does not own:
waking workers (dispatch.py), nor anything a worker writes under its lease (worker/lease.py).
A job's truth is its hash in Redis, written in one script before anybody is woken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import time
from typing import Any, Final, cast

from redis.asyncio import Redis
from uuid_utils import uuid7

from bon_algos.contracts import (
    DEFAULT_TENANT,
    FINAL_JOB_STATES,
    LEDGER_COUNTS,
    OPEN_JOBS,
    WEIGHING_METHODS,
    InterpolationSpec,
    JobSpec,
    LoggedSpec,
    PolicyRecord,
    job_events_key,
    job_key,
    jobs_index,
    of_tenant,
    policy_key,
)
from service.errors import Conflict, InvalidField, JobNotFound, PolicyNotFound
from service.idempotency import KEPT_SECONDS, Idempotency
from service.store import translated
from service.training_checks import check_parent, check_training, require_adapter

GROUPS_NEEDED: Final = 4
"""Two prompts to learn from and two held out: below that no split of the ledger can be trained and judged."""

_JOB_ID = re.compile(r"job_[0-9a-f]{32}")
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")

# KEYS: job, jobs index, open jobs, idempotency key. ARGV: job id, spec, tenant, digest of the body or "" without
# an idempotency key, its life in seconds. Returns "" for a new job, else "digest job" of the earlier request.
_SUBMIT: Final = """
if ARGV[4] ~= '' then
  local earlier = redis.call('GET', KEYS[4])
  if earlier then return earlier end
  redis.call('SET', KEYS[4], ARGV[4] .. ' ' .. ARGV[1], 'EX', ARGV[5])
end
local t = redis.call('TIME')
local now = string.format('%d.%06d', t[1], t[2])
redis.call('HSET', KEYS[1], 'spec', ARGV[2], 'tenant', ARGV[3], 'state', 'queued', 'phase', 'queued',
  'created_at', now, 'epoch', 0, 'attempts', 0)
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
return ''
"""

# KEYS: job, open jobs, events. ARGV: job id, tenant, then the final states. Returns 0 unknown to the tenant, -1 final
# already, 1 cancelled or asked for.
_CANCEL: Final = """
if redis.call('HGET', KEYS[1], 'tenant') ~= ARGV[2] then return 0 end
local state = redis.call('HGET', KEYS[1], 'state')
for i = 3, #ARGV do if state == ARGV[i] then return -1 end end
redis.call('HSET', KEYS[1], 'cancel', 1)
if state == 'queued' then
  local t = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'phase', 'done',
    'finished_at', string.format('%d.%06d', t[1], t[2]))
  redis.call('XADD', KEYS[3], '*', 'phase', 'done', 'state', 'cancelled')
  redis.call('SREM', KEYS[2], ARGV[1])
end
return 1
"""


@dataclass(frozen=True)
class Submitted:
    job_id: str
    is_replayed: bool
    """The idempotency key was seen before with this very body: nothing new was started."""


class Jobs:
    """The jobs of one Redis."""

    def __init__(self, redis: Redis, *, n_cap: int, max_lora_rank: int) -> None:
        self._redis = redis
        self._n_cap = n_cap
        self._max_lora_rank = max_lora_rank
        self._submit = redis.register_script(_SUBMIT)
        self._cancel = redis.register_script(_CANCEL)

    async def submit(
        self, spec: JobSpec, idempotency: Idempotency | None = None, tenant: str = DEFAULT_TENANT
    ) -> Submitted:
        """Record a job. Raises InvalidField for a spec this installation cannot run, an empty ledger, or an
        idempotency key that was used for another body; PolicyNotFound for a policy it names that is none."""
        check_spec(spec, n_cap=self._n_cap, max_lora_rank=self._max_lora_rank, now=time())
        job_id = f"job_{uuid7().hex}"
        key, digest = ("", "") if idempotency is None else (idempotency.key, idempotency.digest)
        with translated():
            if idempotency is None or not await self._redis.exists(key):
                await self._require_groups(spec, tenant)
                await self._require_policies(spec, tenant)
            kept = await self._submit(
                keys=[job_key(job_id), jobs_index(tenant), OPEN_JOBS, key],
                args=[job_id, spec.model_dump_json(), tenant, digest, KEPT_SECONDS],
            )
        if idempotency is None or not kept:
            return Submitted(job_id, is_replayed=False)
        return Submitted(idempotency.answer(cast(str, kept)), is_replayed=True)

    async def get(self, job_id: str, tenant: str = DEFAULT_TENANT) -> dict[str, Any]:
        """The job object of the API. Raises JobNotFound."""
        _require_job_id(job_id)
        with translated():
            fields = cast(dict[str, str], await self._redis.hgetall(job_key(job_id)))
        if fields.get("tenant") != tenant:
            raise JobNotFound("no such job")
        return job_object(job_id, fields)

    async def list(
        self, limit: int, after: str | None = None, tenant: str = DEFAULT_TENANT
    ) -> tuple[Sequence[dict[str, Any]], bool]:
        """Newest first, those after the job `after`; and whether there are more."""
        with translated():
            start = 0
            if after is not None:
                rank = await self._redis.zrevrank(jobs_index(tenant), after)
                if rank is None:
                    raise InvalidField("after is not a job", param="after")
                start = cast(int, rank) + 1
            ids = cast("list[str]", await self._redis.zrevrange(jobs_index(tenant), start, start + limit))
            async with self._redis.pipeline(transaction=True) as pipe:
                for job_id in ids[:limit]:
                    pipe.hgetall(job_key(job_id))
                rows = cast("list[dict[str, str]]", await pipe.execute())
        return [job_object(job, row) for job, row in zip(ids, rows, strict=False) if row], len(ids) > limit

    async def events(
        self, job_id: str, limit: int, after: str | None = None, tenant: str = DEFAULT_TENANT
    ) -> tuple[Sequence[dict[str, Any]], bool]:
        """Oldest first, those after the event `after`; and whether there are more. Raises JobNotFound."""
        _require_job_id(job_id)
        if after is not None and not _EVENT_ID.fullmatch(after):
            raise InvalidField("after is not the id of an event", param="after")
        start = "-" if after is None else f"({after}"
        with translated():
            if await self._redis.hget(job_key(job_id), "tenant") != tenant:
                raise JobNotFound("no such job")
            rows = cast(
                "list[tuple[str, dict[str, str]]]",
                await self._redis.xrange(job_events_key(job_id), start, "+", count=limit + 1),
            )
        return [_event_object(event, fields) for event, fields in rows[:limit]], len(rows) > limit

    async def cancel(self, job_id: str, tenant: str = DEFAULT_TENANT) -> dict[str, Any]:
        """Cancel a queued job now, ask a running one to stop at its next step. Raises JobNotFound, and Conflict
        (job_finished) when there is nothing left to stop."""
        _require_job_id(job_id)
        with translated():
            done = await self._cancel(
                keys=[job_key(job_id), OPEN_JOBS, job_events_key(job_id)], args=[job_id, tenant, *FINAL_JOB_STATES]
            )
        if done == 0:
            raise JobNotFound("no such job")
        if done == -1:
            raise Conflict("the job has finished; it cannot be cancelled any more", code="job_finished")
        return await self.get(job_id, tenant)

    async def _require_groups(self, spec: JobSpec, tenant: str) -> None:
        counted = cast("str | None", await self._redis.hget(LEDGER_COUNTS, of_tenant(tenant, spec.route)))
        found = int(counted or 0)
        if found < GROUPS_NEEDED:
            raise InvalidField(
                f"the ledger of this route holds {found} usable groups and a job needs {GROUPS_NEEDED}: serve "
                "requests with n of at least 2 first",
                param="route",
                code="empty_ledger",
                facts={"groups_found": found, "groups_needed": GROUPS_NEEDED},
            )

    async def _require_policies(self, spec: JobSpec, tenant: str) -> None:
        asked = [(policy, f"window.policies[{place}]") for place, policy in enumerate(spec.window.policies)]
        if spec.method.interpolation is not None:
            asked.append((spec.method.interpolation.policy, "method.interpolation.policy"))
        for policy, param in asked:
            require_adapter(await self._policy(policy, param, tenant), param)
        if spec.training.start_from != "base":
            parent = await self._policy(spec.training.start_from, "training.start_from", tenant)
            require_adapter(parent, "training.start_from")
            check_parent(spec, parent)

    async def _policy(self, policy: str, param: str, tenant: str) -> PolicyRecord:
        row = cast("str | None", await self._redis.hget(policy_key(policy), "record"))
        record = None if row is None else PolicyRecord.model_validate_json(row)
        if record is None or not _is_seen_by(tenant, record):
            raise PolicyNotFound(f"no such policy: {policy}", param=param)
        return record


def check_spec(spec: JobSpec, *, n_cap: int, max_lora_rank: int, now: float) -> None:
    """What the record cannot know: this installation's limits, and the clock. Raises InvalidField."""
    method, parameters = spec.method.type, spec.method.spec
    _at_most("n", spec.n, n_cap)
    if isinstance(parameters, LoggedSpec):
        _at_most(f"method.{method}.n", parameters.n, n_cap)
    if not isinstance(parameters, InterpolationSpec):
        _at_most(f"method.{method}.lora_rank", parameters.lora_rank, max_lora_rank)
    check_training(spec)
    since, until = spec.window.since, spec.window.until
    if spec.window.policies:
        _check_other_policies(spec)
    if since is not None and since > now:
        raise InvalidField("the window begins in the future", param="window.since")
    if since is not None and until is not None and until <= since:
        raise InvalidField("the window ends before it begins", param="window.until")


def _check_other_policies(spec: JobSpec) -> None:
    method, regression = spec.method.type, spec.method.bon_regression
    if method not in WEIGHING_METHODS:
        able = ", ".join(WEIGHING_METHODS)
        raise InvalidField(
            f"{method} learns from draws of the reference alone; leave window.policies empty, or take one of {able}",
            param="window.policies",
        )
    if regression is not None and regression.quantiles == "learned":
        raise InvalidField(
            "learned quantiles learn from draws of the reference alone; leave window.policies empty",
            param="window.policies",
        )
    if len(set(spec.window.policies)) < len(spec.window.policies):
        raise InvalidField("window.policies names a policy twice", param="window.policies")


def job_object(job_id: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The job of the API from the hash in Redis."""
    return {
        "id": job_id,
        "object": "bonsai.distillation",
        "status": fields["state"],
        "phase": fields.get("phase", "queued"),
        "step": int(fields.get("step", 0)),
        "steps": int(fields.get("steps", 0)),
        "metrics": _metrics(fields),
        "seconds_left": _number(fields, "seconds_left"),
        "created_at": _number(fields, "created_at"),
        "started_at": _number(fields, "started_at"),
        "finished_at": _number(fields, "finished_at"),
        "attempts": int(fields.get("attempts", 0)),
        "spec": json.loads(fields["spec"]),
        "policy": fields.get("policy_id") or None,
        "report": json.loads(fields["report"]) if fields.get("report") else None,
        "error": _error_object(fields),
    }


def _error_object(fields: Mapping[str, str]) -> dict[str, str] | None:
    if not fields.get("error_code"):
        return None
    return {"code": fields["error_code"], "message": fields.get("error_message", "")}


def _event_object(event_id: str, fields: Mapping[str, str]) -> dict[str, Any]:
    return {
        "id": event_id,
        "object": "bonsai.distillation.event",
        "created_at": int(event_id.split("-")[0]) / 1000,
        "phase": fields.get("phase"),
        "status": fields.get("state"),
        "step": int(fields["step"]) if "step" in fields else None,
        "metrics": _metrics(fields),
    }


def _metrics(fields: Mapping[str, str]) -> dict[str, float | None]:
    """A metric that is not a number is null: JSON has no NaN."""
    return cast("dict[str, float | None]", json.loads(fields.get("metrics") or "{}", parse_constant=lambda _: None))


def _number(fields: Mapping[str, str], name: str) -> float | None:
    return float(fields[name]) if fields.get(name) else None


def _at_most(param: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidField(f"{param} is more than this installation's limit of {limit}", param=param)


def _is_seen_by(tenant: str, policy: PolicyRecord) -> bool:
    return policy.kind == "base" or policy.tenant == tenant


def _require_job_id(job_id: str) -> None:
    if not _JOB_ID.fullmatch(job_id):
        raise JobNotFound("no such job")

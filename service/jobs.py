"""Distillation jobs as their callers see them: submit, status, events, checkpoints, pause, resume, cancel.

Owns: the record of a job until a worker claims it, the idempotency of submission, what an installation can run. Does
not own: the scripts (job_scripts.py), the form of what is shown (job_object.py), waking workers (dispatch.py), nor
anything a worker writes under its lease (worker/lease.py).
A job's truth is its hash in Redis, written in one script before anybody is woken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from time import time
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from uuid_utils import uuid7

from bon_algos.contracts import (
    DEFAULT_TENANT,
    FINAL_JOB_STATES,
    LEDGER_COUNTS,
    OPEN_JOBS,
    WEIGHING_METHODS,
    FileRecord,
    InterpolationSpec,
    JobSpec,
    LoggedSpec,
    PolicyRecord,
    Route,
    Window,
    files_key,
    job_checkpoints_key,
    job_events_key,
    job_key,
    jobs_index,
    of_tenant,
    policy_key,
    route_key,
)
from bon_algos.crash_points import crash_point
from service.access import GATEWAY, Caller
from service.audit import audited
from service.errors import FileNotFound, InvalidField, JobNotFound, PolicyNotFound
from service.idempotency import KEPT_SECONDS, Idempotency
from service.job_object import checkpoint_object, event_object, finished_object, job_object
from service.job_scripts import MOST_OPEN_JOBS, SCRIPTS, SUBMIT, Wish, queue_full, refusal
from service.record_reading import read_record
from service.store import translated
from service.training_checks import (
    check_parent,
    check_training,
    require_adapter,
    require_parent,
    require_untainted,
)

GROUPS_NEEDED: Final = 4
"""Two prompts to learn from and two held out: below that no split of the ledger can be trained and judged."""

_JOB_ID = re.compile(r"job_[0-9a-f]{32}")
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


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
        self._submit = redis.register_script(SUBMIT)
        self._wishes = {wish: redis.register_script(script) for wish, script in SCRIPTS.items()}

    async def submit(
        self,
        spec: JobSpec,
        idempotency: Idempotency | None = None,
        by: Caller = GATEWAY,
        *,
        model: str | None = None,
    ) -> Submitted:
        """Record a job of the caller's tenant. model: the policy that it begins with, None: its route's base.
        Raises InvalidField for a spec this installation cannot run, an empty ledger, or an idempotency key that was
        used for another body; PolicyNotFound for a policy it names that is none, Forbidden for one that the caller's
        key is not good for; QueueFull."""
        check_spec(spec, n_cap=self._n_cap, max_lora_rank=self._max_lora_rank, now=time())
        job_id, tenant = f"job_{uuid7().hex}", by.tenant
        key, digest = ("", "") if idempotency is None else (idempotency.key, idempotency.digest)
        keys = [job_key(job_id), job_events_key(job_id), jobs_index(tenant), OPEN_JOBS, key, files_key(tenant)]
        values = (
            *(job_id, spec.model_dump_json(), tenant, model or "", spec.priority, _steps(spec)),
            *(digest, KEPT_SECONDS, spec.training_file or "", MOST_OPEN_JOBS),
        )
        with translated():
            if idempotency is None or not await self._redis.exists(key):
                await self._require_groups(spec, tenant)
                await self._require_named(spec, by)
            crash_point("submit.asked")
            kept = await self._audited(self._submit, keys, values, "job_submit", by, job=job_id, route=spec.route)
            crash_point("submit.recorded")
        if kept == "no_file":
            raise _no_file()
        if kept == "full":
            raise queue_full()
        if idempotency is None or not kept:
            return Submitted(job_id, is_replayed=False)
        return Submitted(idempotency.answer(kept), is_replayed=True)

    async def submitted_as(self, idempotency: Idempotency) -> str | None:
        """The job of an earlier `submit` with this key; None: there was none. Raises InvalidField for a key that was
        used for another body."""
        with translated():
            kept = cast("str | None", await self._redis.get(idempotency.key))
        return None if kept is None else idempotency.answer(kept)

    async def check(self, spec: JobSpec, by: Caller = GATEWAY) -> None:
        """Raises what `submit` would of the spec itself, whatever the ledger holds."""
        check_spec(spec, n_cap=self._n_cap, max_lora_rank=self._max_lora_rank, now=time())
        with translated():
            await self._require_named(spec, by)

    async def get(self, job_id: str, tenant: str = DEFAULT_TENANT) -> dict[str, Any]:
        """The job object of the API. Raises JobNotFound."""
        return job_object(job_id, await self._fields(job_id, tenant))

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
        await self._fields(job_id, tenant)
        start = await self._cursor(job_id, after)
        with translated():
            rows = cast(
                "list[tuple[str, dict[str, str]]]",
                await self._redis.xrange(job_events_key(job_id), f"({start}", "+", count=limit + 1),
            )
        return [event_object(event, fields) for event, fields in rows[:limit]], len(rows) > limit

    async def stream_start(self, job_id: str, after: str | None, tenant: str = DEFAULT_TENANT) -> str | None:
        """The event behind which a stream begins; None when the job has ended and nothing follows. Raises JobNotFound,
        InvalidField for a cursor that is not of this job."""
        fields = await self._fields(job_id, tenant)
        start = await self._cursor(job_id, after)
        with translated():
            if fields["state"] in FINAL_JOB_STATES:
                rows = await self._redis.xrange(job_events_key(job_id), f"({start}", "+", count=1)
                return start if rows else None
        return start

    async def checkpoints(self, job_id: str, tenant: str = DEFAULT_TENANT) -> Sequence[dict[str, Any]]:
        """The states that are kept, newest first; of a job that has succeeded its policy alone. Raises JobNotFound."""
        fields = await self._fields(job_id, tenant)
        if fields["state"] == "succeeded":
            return [finished_object(job_id, fields)]
        with translated():
            kept = cast("dict[str, str]", await self._redis.hgetall(job_checkpoints_key(job_id)))
        return [checkpoint_object(job_id, step, kept[step]) for step in sorted(kept, key=int, reverse=True)]

    async def grant(
        self, wish: Wish, job_id: str, by: Caller = GATEWAY, idempotency: Idempotency | None = None
    ) -> dict[str, Any]:
        """Pause, resume or cancel: at once where no worker has the job, else its worker is asked to. The job, after.
        Raises JobNotFound, Conflict when the state of the job forbids it, QueueFull for one to resume where the tenant
        has as many jobs as it may, and InvalidField for an idempotency key that was used for another request."""
        _require_job_id(job_id)
        key, digest = ("", "") if idempotency is None else (idempotency.key, idempotency.digest)
        keys = [job_key(job_id), job_events_key(job_id), OPEN_JOBS, key]
        values = (job_id, by.tenant, digest, KEPT_SECONDS, MOST_OPEN_JOBS)
        with translated():
            crash_point("wish.asked")
            answer = await self._audited(self._wishes[wish], keys, values, f"job_{wish}", by, job=job_id)
            crash_point("wish.recorded")
        if idempotency is not None and " " in answer:
            answer = idempotency.answer(answer)
        if (refused := refusal(wish, answer)) is not None:
            raise refused
        return await self.get(job_id, by.tenant)

    async def _audited(
        self,
        script: AsyncScript,
        keys: Sequence[str],
        values: Sequence[str | int],
        event: str,
        by: Caller,
        **about: str,
    ) -> str:
        async def run(entry: tuple[str, str]) -> str:
            return cast(str, await script(keys=keys, args=(*values, *entry)))

        return await audited(self._redis, run, event, by, **about)

    async def _fields(self, job_id: str, tenant: str) -> dict[str, str]:
        _require_job_id(job_id)
        with translated():
            fields = cast(dict[str, str], await self._redis.hgetall(job_key(job_id)))
        if fields.get("tenant") != tenant:
            raise JobNotFound("no such job")
        return fields

    async def _cursor(self, job_id: str, after: str | None) -> str:
        """Where to begin. Raises InvalidField for what is no event's id, and for one from the future."""
        if after is None:
            return "0-0"
        with translated():
            newest = cast("list[tuple[str, object]]", await self._redis.xrevrange(job_events_key(job_id), count=1))
        if not _EVENT_ID.fullmatch(after) or _order(after) > _order(newest[0][0] if newest else "0-0"):
            raise InvalidField("after is not the id of an event of this job", param="after")
        return after

    async def _require_groups(self, spec: JobSpec, tenant: str) -> None:
        if spec.training_file is not None:
            return
        routes = [of_tenant(tenant, route) for route in spec.window.routes or (spec.route,)]
        counted = cast("list[str | None]", await self._redis.hmget(LEDGER_COUNTS, routes))
        found = sum(int(count or 0) for count in counted)
        if found < GROUPS_NEEDED:
            raise InvalidField(
                f"the ledger of this route holds {found} usable groups and a job needs {GROUPS_NEEDED}: serve "
                "requests with n of at least 2 first",
                param="route",
                code="empty_ledger",
                facts={"groups_found": found, "groups_needed": GROUPS_NEEDED},
            )

    async def _require_named(self, spec: JobSpec, by: Caller) -> None:
        if spec.training_file is not None:
            row = cast("str | None", await self._redis.hget(files_key(by.tenant), spec.training_file))
            if row is None:
                raise _no_file()
            _require_processed(FileRecord.model_validate_json(row))
        await self._require_policies(spec, by)

    async def _require_policies(self, spec: JobSpec, by: Caller) -> None:
        parents = []
        if spec.method.interpolation is not None:
            parents.append((spec.method.interpolation.policy, "method.interpolation.policy"))
        if spec.training.start_from != "base":
            parents.append((spec.training.start_from, "training.start_from"))
        for place, policy in enumerate(spec.window.policies):
            await self._usable(policy, f"window.policies[{place}]", by)
        for policy, param in parents:
            record = await self._usable(policy, param, by)
            require_parent(record, await self._base_of(spec.route, by.tenant), param)
            if param == "training.start_from":
                check_parent(spec, record)

    async def _usable(self, policy: str, param: str, by: Caller) -> PolicyRecord:
        record = await self._policy(policy, param, by.tenant)
        require_adapter(record, param)
        by.require_policy(record, param)
        require_untainted(record, param)
        return record

    async def _base_of(self, route: str, tenant: str) -> str | None:
        """None where there is no such route."""
        row = cast("str | None", await self._redis.get(route_key(route, tenant)))
        return None if row is None else read_record(Route, row).base_policy

    async def _policy(self, policy: str, param: str, tenant: str) -> PolicyRecord:
        row = cast("str | None", await self._redis.hget(policy_key(policy), "record"))
        record = None if row is None else read_record(PolicyRecord, row)
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
    if spec.training_file is not None:
        _check_window_of_file(spec.window)
    if since is not None and since > now:
        raise InvalidField("the window begins in the future", param="window.since")
    if since is not None and until is not None and until <= since:
        raise InvalidField("the window ends before it begins", param="window.until")


def _check_window_of_file(window: Window) -> None:
    """What a file's rows have not, no window can ask for."""
    for name in ("since", "until", "routes", "tags", "feedback"):
        if getattr(window, name) not in (None, ()):
            raise InvalidField(
                f"a file has no {name}: leave it out, or leave training_file out", param=f"window.{name}"
            )


def _require_processed(record: FileRecord) -> None:
    if record.status != "processed":
        raise InvalidField(
            "this file has faults, which GET /v1/files tells: upload it again without them",
            param="training_file",
            code="file_unusable",
            facts={"faults": [fault.model_dump() for fault in record.faults[:3]]},
        )


def _no_file() -> FileNotFound:
    return FileNotFound("no such file", param="training_file")


def _check_other_policies(spec: JobSpec) -> None:
    method, regression = spec.method.type, spec.method.bon_regression
    if method not in WEIGHING_METHODS:
        able = ", ".join(WEIGHING_METHODS)
        raise InvalidField(
            f"{method} learns from draws of the reference alone; leave window.policies empty, or take one of {able}",
            param="window.policies",
        )
    if regression is not None and regression.quantiles != "harmonic_mid":
        raise InvalidField(
            f"quantiles {regression.quantiles} are of draws of the reference alone; leave window.policies empty",
            param="window.policies",
        )
    if len(set(spec.window.policies)) < len(spec.window.policies):
        raise InvalidField("window.policies names a policy twice", param="window.policies")


def _steps(spec: JobSpec) -> int:
    return 0 if spec.method.interpolation is not None else spec.method.algorithm.steps


def _order(event_id: str) -> tuple[int, ...]:
    """Events' ids as Redis orders them."""
    return tuple(map(int, event_id.split("-")))


def _at_most(param: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidField(f"{param} is more than this installation's limit of {limit}", param=param)


def _is_seen_by(tenant: str, policy: PolicyRecord) -> bool:
    return policy.kind == "base" or policy.tenant == tenant


def _require_job_id(job_id: str) -> None:
    if not _JOB_ID.fullmatch(job_id):
        raise JobNotFound("no such job")

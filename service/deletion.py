"""The end of a policy: what forbids it, the tombstone, the files.

Owns: deletion from the registry, and removing the files of what was deleted. Does not own: unloading it from the
engines (publishing.py, which the snapshot tells).

The registry forgets first, in one transaction, and a tombstone keeps the name from ever being used again. Files go
after that, and whoever comes by again finds what a dead process left.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import shutil
from collections.abc import Awaitable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Final, cast

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import (
    FINAL_JOB_STATES,
    POLICIES_DELETED,
    POLICIES_INDEX,
    ROUTES_INDEX,
    TAGS,
    Experiment,
    JobSpec,
    Manifest,
    PolicyRecord,
    Route,
    experiment_key,
    job_key,
    jobs_index,
    own_names,
    policy_key,
    report_digest,
)
from bon_algos.crash_points import crash_point
from service.access import Caller
from service.artefacts import MANIFEST_FILE
from service.audit import AuditChain
from service.errors import Conflict, StoreFull, StoreUnavailable
from service.preconditions import ANY, Precondition
from service.record_reading import read_record
from service.registry import read_policy, watched_routes, write_move
from service.store import transact, translated

PROTECTED_HISTORY: Final = 3
"""So many roll-backs in a row find the policies that they lead to."""
SWEEP_SECONDS: Final = 30.0
RENAMED: Final = ".deleted-"
log = logging.getLogger("bonsai.deletion")

# KEYS: jobs of a tenant. ARGV: the prefix of a job's key, then the final states. Returns id and spec of each job that
# has not ended. Not of the open jobs alone: a paused one is none of them.
_UNFINISHED: Final = """
local is_final, found = {}, {}
for i = 2, #ARGV do is_final[ARGV[i]] = true end
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local job = redis.call('HMGET', ARGV[1] .. id, 'state', 'spec')
  if job[1] and job[2] and not is_final[job[1]] then
    found[#found + 1] = id
    found[#found + 1] = job[2]
  end
end
return found
"""


class Deletion:
    """Deletes policies of one Redis and one artefact directory."""

    def __init__(self, redis: Redis, artefacts: Path) -> None:
        self._redis = redis
        self._artefacts = artefacts

    async def delete(self, policy_id: str, by: Caller, *, precondition: Precondition = ANY) -> None:
        """Raises PolicyNotFound, PreconditionFailed, and Conflict with every reason why not."""

        async def change(pipe: Pipeline) -> None:
            routes = await watched_routes(pipe, by.tenant)
            policy = await read_policy(pipe, policy_id, by.tenant)
            precondition.require(policy.version)
            _require_none(
                [*_of_record(policy), *_of_routes(policy_id, routes), *await _elsewhere(pipe, policy, routes)]
            )
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.delete(policy_key(policy_id))
            pipe.zrem(POLICIES_INDEX, policy_id)
            pipe.zadd(POLICIES_DELETED, {policy_id: time()})
            for route in routes.values():
                if policy_id in route.previous_policies:
                    write_move(pipe, route, _without(route, policy_id), ())
            audit.append(pipe, "policy_delete", by, policy=policy_id, data=json.dumps({"before": policy.state}))

        await transact(self._redis, [ROUTES_INDEX, POLICIES_INDEX, policy_key(policy_id)], change)
        await self.sweep()

    async def sweep(self) -> None:
        """Remove the files of what was deleted, as far as the disk lets us. Raises StoreUnavailable."""
        with translated():
            deleted = cast("list[str]", await self._redis.zrange(POLICIES_DELETED, 0, -1))
        try:
            await asyncio.to_thread(remove_files, self._artefacts, frozenset(deleted))
        except OSError as error:
            log.error("files of a deleted policy could not be removed yet: %s", error.strerror)

    async def run(self) -> None:
        """Sweep until cancelled: a gateway may have died between a deletion and its files, and a job may have
        published once more what was deleted."""
        while True:
            try:
                await self.sweep()
            except (StoreUnavailable, StoreFull) as error:
                log.warning("files of deleted policies stay for now: %s", error.message)
            await asyncio.sleep(SWEEP_SECONDS)


def remove_files(artefacts: Path, deleted: Collection[str]) -> None:
    """Blocks. Each directory is renamed first, so that nobody finds half of one under its name; then its report goes,
    which its manifest names."""
    policies = artefacts / "policies"
    if not policies.is_dir():
        return
    for directory in list(policies.iterdir()):
        if directory.is_symlink() and f"pol-{directory.name[:16]}" in deleted:
            directory.unlink(missing_ok=True)
        elif f"pol-{directory.name[:16]}" in deleted:
            with suppress(FileNotFoundError):  # another gateway was here first
                directory.rename(policies / f"{RENAMED}{directory.name}.{secrets.token_hex(4)}")
                crash_point("deletion.renamed")
    for doomed in policies.glob(f"{RENAMED}*"):
        _remove_report(artefacts, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _remove_report(artefacts: Path, directory: Path) -> None:
    with suppress(OSError, ValidationError):
        files = Manifest.model_validate_json((directory / MANIFEST_FILE).read_bytes()).report_files
        if files:
            shutil.rmtree(artefacts / "reports" / report_digest(files), ignore_errors=True)


def _of_record(policy: PolicyRecord) -> list[str]:
    if policy.kind == "base":
        return ["it is a base policy"]
    return ["it is protected: PATCH it with is_protected false first"] if policy.is_protected else []


def _of_routes(policy_id: str, routes: Mapping[str, Route]) -> list[str]:
    found = []
    for route in routes.values():
        if (stage := route.stage_of(policy_id)) is not None:
            found.append(f"it is {stage} on route {route.name}")
        elif policy_id in route.previous_policies[-PROTECTED_HISTORY:]:
            found.append(f"a roll-back of route {route.name} would need it")
    return found


async def _elsewhere(pipe: Pipeline, policy: PolicyRecord, routes: Mapping[str, Route]) -> list[str]:
    """What tags, experiments and jobs have against it; all that was looked at is watched."""
    await pipe.watch(TAGS, jobs_index(policy.tenant))
    tags = cast("dict[str, str]", await pipe.hgetall(TAGS))
    own = own_names(policy.tenant, (name for name, named in tags.items() if named == policy.id))
    return [
        *(f"the tag {tag} names it" for tag in own),
        *[f"an experiment on route {name} shows it" for name in routes if await _is_shown(pipe, policy, name)],
        *[f"the job {job_id} needs it" for job_id in await _jobs_that_need(pipe, policy)],
    ]


async def _is_shown(pipe: Pipeline, policy: PolicyRecord, route: str) -> bool:
    key = experiment_key(route, policy.tenant)
    await pipe.watch(key)
    row = cast("str | None", await pipe.get(key))
    experiment = None if row is None else read_record(Experiment, row)
    if experiment is None or experiment.stopped_at is not None:
        return False
    return any(entry.arm.policy == policy.id for entry in experiment.arms)


async def _jobs_that_need(pipe: Pipeline, policy: PolicyRecord) -> list[str]:
    args = (job_key(""), *FINAL_JOB_STATES)
    found = await cast("Awaitable[list[str]]", pipe.eval(_UNFINISHED, 1, jobs_index(policy.tenant), *args))
    specs = zip(found[::2], found[1::2], strict=True)
    return [job_id for job_id, spec in specs if _may_need(spec, policy.id)]


def _may_need(spec: str, policy_id: str) -> bool:
    """Also where the spec is of another version and cannot be read: it may name the policy."""
    try:
        return policy_id in JobSpec.model_validate_json(spec).policies
    except ValidationError:
        return True


def _require_none(reasons: list[str]) -> None:
    if reasons:
        raise Conflict(f"the policy stays: {'; '.join(reasons)}", code="policy_in_use", facts={"reasons": reasons[:20]})


def _without(route: Route, policy_id: str) -> Route:
    kept = tuple(previous for previous in route.previous_policies if previous != policy_id)
    return route.model_copy(update={"previous_policies": kept})

"""`bonsai rebuild`: the registry and the jobs of a Redis that was lost, from what stands beside the artefacts.

Owns what is restored from what, what forbids it, and its one transaction. Does not own the files: manifests are the
worker's, the journal the gateway's (service/journal.py); of a job each has a record (service/job_records.py).

Restored: policies whose files are whole, with their states, tags and tombstones, routes, experiments, jobs; a job that
had not ended is queued again and goes on from its checkpoint. Lost with Redis: API keys but the file's, the audit's
entries, the sums of experiments, the ledger as far as it was in Redis alone, the events of jobs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any, Final, cast

import redis
from pydantic import ValidationError

from bon_algos.audit_entries import chained, newest_digest
from bon_algos.contracts import (
    AUDIT_STREAM,
    DEFAULT_TENANT,
    FINAL_JOB_STATES,
    OPEN_JOBS,
    POLICIES_DELETED,
    POLICIES_INDEX,
    REGISTRY,
    ROUTES_INDEX,
    TAGS,
    Experiment,
    Manifest,
    PolicyRecord,
    Route,
    experiment_key,
    job_key,
    jobs_index,
    of_tenant,
    policy_key,
    route_key,
)
from bon_algos.crash_points import crash_point
from service.artefacts import ArtefactRefused, checked_adapter, checked_files, read_manifest
from service.job_records import DIRECTORY, JobFile
from service.journal import Journal, read_journal
from service.registry import stages_of

ANY_RANK: Final = 512


class RegistryInUse(Exception):
    """Redis holds a registry that is no loss of this one; the text says what was found."""


@dataclass
class Restoration:
    """What is to be written, and what cannot be."""

    registry: str | None = None
    """None: there is no journal; the name that Redis has stays, or the gateway makes one."""
    policies: dict[str, PolicyRecord] = field(default_factory=dict)
    routes: dict[str, Route] = field(default_factory=dict)
    experiments: dict[str, Experiment] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    deleted: tuple[str, ...] = ()
    jobs: dict[str, dict[str, str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def read_artefacts(artefacts: Path) -> Restoration:
    """All that the files tell. Raises UnreadableJournal, OSError."""
    found, journal = Restoration(), read_journal(artefacts)
    known = {} if journal is None else {policy.id: policy for policy in journal.policies}
    if journal is None:
        found.remarks.append("there is no journal: what was live where, tags and experiments are not known")
    else:
        found.registry, found.deleted, found.tags = journal.registry, journal.deleted, dict(journal.tags)
        found.policies = {one.id: one for one in journal.policies if one.kind == "base"}
    for policy in _policies(artefacts, known, found):
        found.policies[policy.id] = policy
    for lost in sorted(known.keys() - found.policies.keys()):
        found.remarks.append(f"{lost} was in the registry and has no files that are whole")
    if journal is not None:
        _take_routes(found, journal)
    found.tags = {tag: policy for tag, policy in found.tags.items() if policy in found.policies}
    found.jobs = dict(_jobs(artefacts, found))
    return found


def _policies(artefacts: Path, known: Mapping[str, PolicyRecord], found: Restoration) -> Iterator[PolicyRecord]:
    root = artefacts / "policies"
    for directory in sorted(root.iterdir()) if root.is_dir() else ():
        if directory.name.startswith(".") or f"pol-{directory.name[:16]}" in found.deleted:
            continue
        try:
            manifest = _whole(artefacts, directory.name)
        except ArtefactRefused as error:
            found.remarks.append(f"policies/{directory.name[:16]}…: {error}")
            continue
        former = known.get(manifest.policy_id)
        yield manifest.as_candidate() if former is None else former.model_copy(update={"manifest": manifest})


def _whole(artefacts: Path, digest: str) -> Manifest:
    """Of a policy whose files are its own, be it an adapter or full weights. Raises ArtefactRefused."""
    manifest = read_manifest(artefacts, digest)
    if manifest.kind == "lora":
        checked_adapter(artefacts, manifest, max_rank=ANY_RANK)
    else:
        checked_files(artefacts, manifest)
    return manifest


def _take_routes(found: Restoration, journal: Journal) -> None:
    """What a route pointed to and what is gone is taken out of it."""
    for route in journal.routes:
        name = of_tenant(route.tenant, route.name)
        used = {one for one in stages_of(route).values() if one is not None}
        gone = used - found.policies.keys()
        kept = {
            "previous_policies": tuple(one for one in route.previous_policies if one is None or one in found.policies),
            "live_policy": None if route.live_policy in gone else route.live_policy,
            "canary": None if route.canary is None or route.canary.policy in gone else route.canary,
            "shadow": None if route.shadow is None or route.shadow.policy in gone else route.shadow,
            "collect_share": None,
        }
        if route.collect_share is not None:
            found.remarks.append(f"the circle of route {name} is not restored: begin it anew")
        found.remarks += [f"route {name} goes on without {policy}, whose files are gone" for policy in sorted(gone)]
        found.routes[name] = route.model_copy(update=kept)
    for experiment in journal.experiments:
        if all(entry.arm.policy in found.policies for entry in experiment.arms):
            found.experiments[of_tenant(experiment.tenant, experiment.route)] = experiment


def _jobs(artefacts: Path, found: Restoration) -> Iterator[tuple[str, dict[str, str]]]:
    """Each job by the newer of its worker's record and the gateway's, which is the newer one where both say the same
    of how far it is."""
    newest: dict[str, JobFile] = {}
    for file in (*sorted((artefacts / "jobs").glob("*/job.json")), *sorted((artefacts / DIRECTORY).glob("job_*.json"))):
        try:
            record = JobFile.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            found.remarks.append(f"{file.relative_to(artefacts)} is unreadable")
            continue
        if record.job_id not in newest or newest[record.job_id].rank <= record.rank:
            newest[record.job_id] = record
    for job_id in sorted(newest):
        fields = dict(newest[job_id].fields)
        if fields.get("state") == "running":
            fields |= {"state": "queued", "phase": "queued", "lease_until": "0"}
        yield job_id, fields


def missing_from(client: redis.Redis, found: Restoration) -> Restoration:
    """The part of it that Redis lacks. Raises RegistryInUse where Redis holds what contradicts it."""
    present = cast("str | None", client.get(REGISTRY))
    policies = set(cast("list[str]", client.zrange(POLICIES_INDEX, 0, -1)))
    is_same = found.registry is not None and present == found.registry
    if not is_same:
        _require_unused(client, policies - found.policies.keys())
    return Restoration(
        registry=None if is_same else found.registry,
        policies={one: record for one, record in found.policies.items() if one not in policies},
        routes={} if is_same else found.routes,
        experiments={} if is_same else found.experiments,
        tags={} if is_same else found.tags,
        deleted=() if is_same else found.deleted,
        jobs={one: fields for one, fields in found.jobs.items() if not client.exists(job_key(one))},
        remarks=found.remarks,
    )


def _require_unused(client: redis.Redis, unknown: set[str]) -> None:
    """A gateway that started on an empty Redis has made its base, its default route and a name; no more than that is
    overwritten."""
    rows = [cast("str | None", client.get(route_key(name))) for name in cast("set[str]", client.smembers(ROUTES_INDEX))]
    routes = [Route.model_validate_json(row) for row in rows if row is not None]
    if used := [route.name for route in routes if route.is_used or route.previous_policies]:
        raise RegistryInUse(f"Redis holds another registry, in use on {', '.join(sorted(used))}: nothing was changed")
    records = [cast("str | None", client.hget(policy_key(one), "record")) for one in unknown]
    kinds = [PolicyRecord.model_validate_json(row).kind for row in records if row is not None]
    if num_made := len(kinds) - kinds.count("base"):
        raise RegistryInUse(
            f"Redis holds another registry with {num_made} policies that these files lack: nothing was changed"
        )


def restore(client: redis.Redis, found: Restoration) -> Restoration:
    """What Redis lacked of it, written in one transaction; looks again where somebody writes in the meantime, as a
    gateway does that meets an empty Redis. Raises RegistryInUse."""
    written = Restoration()

    def ask(pipe: Any) -> None:
        nonlocal written
        written = missing_from(client, found)
        if is_nothing(written):
            return
        tail = cast("list[tuple[str, dict[str, str]]]", pipe.xrevrange(AUDIT_STREAM, count=1))
        pipe.multi()
        _write_registry(pipe, written)
        for job_id, fields in written.jobs.items():
            _write_job(pipe, job_id, fields)
        pipe.xadd(AUDIT_STREAM, _audit_entry(written, newest_digest(tail)))
        crash_point("rebuild.asked")

    client.transaction(ask, REGISTRY, POLICIES_INDEX, ROUTES_INDEX, AUDIT_STREAM)
    crash_point("rebuild.written")
    return written


def is_nothing(missing: Restoration) -> bool:
    return missing.registry is None and not any(count for _, count in counts(missing))


def _write_registry(pipe: Any, missing: Restoration) -> None:
    if missing.registry is not None:
        pipe.set(REGISTRY, missing.registry)
    for policy in missing.policies.values():
        pipe.hset(policy_key(policy.id), "record", policy.model_dump_json())
        pipe.hset(policy_key(policy.id), "version", str(policy.version))
        pipe.zadd(POLICIES_INDEX, {policy.id: policy.created_at})
    for name, route in missing.routes.items():
        pipe.set(route_key(name), route.model_dump_json())
        pipe.sadd(ROUTES_INDEX, name)
    for name, experiment in missing.experiments.items():
        pipe.set(experiment_key(name), experiment.model_dump_json())
    for tag, policy_id in missing.tags.items():
        pipe.hset(TAGS, tag, policy_id)
    for policy_id in missing.deleted:
        pipe.zadd(POLICIES_DELETED, {policy_id: time()}, nx=True)


def _write_job(pipe: Any, job_id: str, fields: Mapping[str, str]) -> None:
    pipe.hset(job_key(job_id), mapping=dict(fields))
    pipe.zadd(jobs_index(fields.get("tenant", DEFAULT_TENANT)), {job_id: float(fields.get("created_at") or 0)})
    if fields.get("state") not in FINAL_JOB_STATES:
        pipe.sadd(OPEN_JOBS, job_id)


def _audit_entry(missing: Restoration, previous: str) -> dict[str, str]:
    told = json.dumps(dict(counts(missing)))
    return chained("registry_rebuilt", tenant=DEFAULT_TENANT, by="command", previous=previous, data=told)


def counts(missing: Restoration) -> Sequence[tuple[str, int]]:
    """What there is of each kind."""
    return [
        ("policies", len(missing.policies)),
        ("routes", len(missing.routes)),
        ("experiments", len(missing.experiments)),
        ("tags", len(missing.tags)),
        ("tombstones", len(missing.deleted)),
        ("jobs", len(missing.jobs)),
    ]

"""The experiments of the routes: started, ramped up, stopped.

Owns: what a new experiment must satisfy, when a change keeps an experiment and when it makes another, the record
in Redis. Does not own: who meets which arm and what the arms have shown (experiments.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import sha256
from time import time
from typing import Any, Final, cast

from pydantic import Field
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from uuid_utils import uuid7

from bon_algos.contracts import (
    DEFAULT_TENANT,
    Arm,
    Experiment,
    ExperimentArm,
    PolicyRecord,
    Record,
    Route,
    experiment_key,
    experiment_stats_key,
    route_key,
)
from service.access import GATEWAY, Caller
from service.audit import AuditChain
from service.catalogue import Snapshot
from service.errors import Conflict, ExperimentNotFound, InvalidField, RouteNotFound
from service.experiments import BUCKETS, arm_object, policy_named, require_n
from service.preconditions import ANY, Precondition, version_of
from service.record_reading import read_record
from service.store import transact, translated

MIN_ARMS: Final = 2
MAX_ARMS: Final = 10
FORMER_STATISTICS_SECONDS: Final = 30 * 86_400
"""How long the sums of an experiment outlive the one that replaced it."""


class ArmRequest(Record):
    policy: str = Field(min_length=1, max_length=64)
    """A policy id, `base` or `live`; the names are resolved once, when the experiment starts."""
    n: int
    weight: int = Field(ge=1, le=BUCKETS)


class ExperimentRequest(Record):
    """Body of `PUT /experiments/{route}`."""

    arms: tuple[ArmRequest, ...] = Field(fail_fast=True, min_length=MIN_ARMS, max_length=MAX_ARMS)


def checked_arms(
    request: ExperimentRequest, route: Route, snapshot: Snapshot, by: Caller = GATEWAY
) -> tuple[ExperimentArm, ...]:
    """The arms, every rule checked. Raises InvalidField, or Forbidden, with the field at fault."""
    arms: list[ExperimentArm] = []
    for index, asked in enumerate(request.arms):
        param = f"arms[{index}]"
        require_n(asked.n, route.n_cap, f"{param}.n")
        policy = policy_named(asked.policy, route, snapshot, f"{param}.policy")
        by.require_servable(snapshot.policies[policy], f"{param}.policy")
        _require_testable(snapshot.policies[policy], route, snapshot, f"{param}.policy")
        arm = Arm(policy=policy, n=asked.n)
        if any(arm == earlier.arm for earlier in arms):
            raise InvalidField("the same arm twice", param=param)
        arms.append(ExperimentArm(arm=arm, weight=asked.weight))
    if (total := sum(entry.weight for entry in arms)) != BUCKETS:
        raise InvalidField(f"the weights sum to {total} and must sum to {BUCKETS}", param="arms")
    return tuple(arms)


def _require_testable(policy: PolicyRecord, route: Route, snapshot: Snapshot, param: str) -> None:
    if policy.state in ("retired", "failed") or policy.tainted:
        raise InvalidField(
            f"the policy is {'tainted' if policy.tainted else policy.state}", param=param, code="policy_unusable"
        )
    if policy.kind == "full":
        raise InvalidField(
            "the policy has full weights, for export: no engine serves it", param=param, code="export_only"
        )
    base = policy.id if policy.manifest is None else policy.manifest.base_policy_id
    if base != route.base_policy:
        raise InvalidField("the policy stands on another base than the route", param=param)
    if policy.id not in snapshot.served:
        raise InvalidField(
            "the engine does not serve the policy (yet): wait until GET /policies shows it as served",
            param=param,
            code="policy_not_served",
        )


def ramped_up(running: Sequence[ExperimentArm], asked: Sequence[ExperimentArm]) -> tuple[ExperimentArm, ...] | None:
    """The running arms, in their order, with the weights asked for: when the arms are the same and at most one
    weight rises. None: this is another experiment."""
    weights = {entry.arm: entry.weight for entry in asked}
    if set(weights) != {entry.arm for entry in running}:
        return None
    if sum(weights[entry.arm] > entry.weight for entry in running) > 1:
        return None
    return tuple(ExperimentArm(arm=entry.arm, weight=weights[entry.arm]) for entry in running)


class Experiments:
    """The experiments of one Redis, at most one running on a route."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def put(
        self,
        route_name: str,
        request: ExperimentRequest,
        snapshot: Snapshot,
        by: Caller = GATEWAY,
        *,
        precondition: Precondition = ANY,
    ) -> Experiment:
        """Start an experiment, or raise one weight of the running one. snapshot: what the caller's tenant sees.
        Raises InvalidField, Forbidden, RouteNotFound, Conflict, PreconditionFailed."""
        keys = (route_key(route_name, by.tenant), experiment_key(route_name, by.tenant))

        async def change(pipe: Pipeline) -> Experiment:
            route_row, row = cast("list[str | None]", await pipe.mget(keys))
            if route_row is None:
                raise RouteNotFound("no such route")
            former, route = None if row is None else read_record(Experiment, row), _free_route(route_row)
            precondition.require(version_of(former))
            arms = checked_arms(request, route, snapshot, by)
            experiment = _successor(route_name, by.tenant, former, arms)
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.set(keys[1], experiment.model_dump_json())
            audit.append(pipe, "experiment_put", by, route=route_name, data=_told(experiment))
            if former is not None and former.id != experiment.id:
                pipe.expire(experiment_stats_key(former.id), FORMER_STATISTICS_SECONDS)
            return experiment

        return await transact(self._redis, keys, change)

    async def get(self, route_name: str, tenant: str = DEFAULT_TENANT) -> Experiment:
        """The latest experiment of the route, running or stopped. Raises ExperimentNotFound."""
        with translated():
            row = cast("str | None", await self._redis.get(experiment_key(route_name, tenant)))
        if row is None:
            raise ExperimentNotFound("the route has no experiment")
        return read_record(Experiment, row)

    async def stop(self, route_name: str, by: Caller = GATEWAY, *, precondition: Precondition = ANY) -> Experiment:
        """Raises ExperimentNotFound, PreconditionFailed, and Conflict when it stopped before."""
        key = experiment_key(route_name, by.tenant)

        async def change(pipe: Pipeline) -> Experiment:
            row = cast("str | None", await pipe.get(key))
            if row is None:
                raise ExperimentNotFound("the route has no experiment")
            experiment = read_record(Experiment, row)
            precondition.require(version_of(experiment))
            if experiment.stopped_at is not None:
                raise Conflict("the experiment has stopped already", code="experiment_stopped")
            stopped = experiment.model_copy(update={"stopped_at": time()})
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.set(key, stopped.model_dump_json())
            audit.append(pipe, "experiment_stop", by, route=route_name, data=_told(stopped))
            return stopped

        return await transact(self._redis, (key,), change)

    async def describe(self, experiment: Experiment) -> dict[str, Any]:
        """The object of the API, with what each arm has shown so far."""
        with translated():
            sums = cast(dict[str, str], await self._redis.hgetall(experiment_stats_key(experiment.id)))
        return {
            "id": experiment.id,
            "object": "bonsai.experiment",
            "route": experiment.route,
            "status": "running" if experiment.stopped_at is None else "stopped",
            "salt_digest": sha256(experiment.salt.encode()).hexdigest()[:16],
            "created_at": experiment.created_at,
            "stopped_at": experiment.stopped_at,
            "arms": [arm_object(entry, sums) for entry in experiment.arms],
        }


def _successor(route: str, tenant: str, former: Experiment | None, arms: tuple[ExperimentArm, ...]) -> Experiment:
    if former is not None and former.stopped_at is None:
        raised = ramped_up(former.arms, arms)
        if raised is not None:
            return former.model_copy(update={"arms": raised})
    return Experiment(
        id=f"exp_{uuid7().hex}",
        route=route,
        tenant=tenant,
        salt=secrets.token_hex(16),
        arms=arms,
        created_at=time(),
    )


def _free_route(row: str) -> Route:
    """Raises Conflict where a canary decides who answers."""
    route = read_record(Route, row)
    if route.canary is not None:
        raise Conflict("a canary is tried on the route: withdraw or promote it first", code="route_in_use")
    return route


def _told(experiment: Experiment) -> str:
    # Without the salt: who knows it can choose the arm of a unit.
    return experiment.model_copy(update={"salt": ""}).model_dump_json()

"""The circles of one Redis: kept, changed, started and stopped.

Owns: the record of each and its audit; every change is one transaction that compares versions. Does not own: the rules
(circle_rules.py), what a circle does by itself (circle_driver.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from time import time
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import (
    CIRCLES_INDEX,
    LEDGER_COUNTS,
    Circle,
    CircleSpec,
    Route,
    circle_key,
    of_tenant,
    own_names,
    route_key,
)
from service.access import Caller
from service.audit import AuditChain
from service.circle_rules import foreseen_kl, of_last_day
from service.errors import CircleNotFound, Conflict, InvalidField, RouteNotFound, Unavailable
from service.idempotency import Idempotency, once
from service.preconditions import ANY, Precondition, version_of
from service.record_reading import read_record
from service.registry import read_policy
from service.store import transact, translated
from service.trials import CANARY_MOST

log = logging.getLogger("bonsai.circle")


def require_sense(spec: CircleSpec) -> None:
    """What one field's type cannot say. Raises InvalidField."""
    if spec.canary.share > CANARY_MOST:
        raise InvalidField(f"canary.share must be at most {CANARY_MOST}", param="canary.share")
    if spec.method.interpolation is not None:
        raise InvalidField("interpolation trains nothing: a circle needs a method that does", param="method")


class Circles:
    """Whatever changes a circle goes through here."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def put(
        self, name: str, spec: CircleSpec, by: Caller, *, precondition: Precondition = ANY
    ) -> tuple[Circle, bool]:
        """Begin a route's circle, or give it other rules, which hold at once, but for a job that was asked for already;
        and whether it is new. One that has stopped stays so. Raises RouteNotFound, PreconditionFailed."""
        key, of_route = circle_key(name, by.tenant), route_key(name, by.tenant)

        async def change(pipe: Pipeline) -> tuple[Circle, bool]:
            former, row = await _read(pipe, key), cast("str | None", await pipe.get(of_route))
            if row is None:
                raise RouteNotFound("no such route", param="route")
            precondition.require(circle_version(former))
            route = read_record(Route, row)
            circle = (
                Circle(route=name, tenant=by.tenant, spec=spec, since=0.0, **await _stands_at(pipe, route))
                if former is None
                else former.model_copy(update={"spec": spec, "version": former.version + 1})
            )
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.set(of_route, route.model_copy(update={"collect_share": spec.collect_share}).model_dump_json())
            _write(pipe, circle)
            before = None if former is None else former.spec.model_dump(mode="json")
            told = {"before": before, "after": spec.model_dump(mode="json")}
            audit.append(pipe, "circle_put", by, route=name, data=json.dumps(told))
            return circle, former is None

        return await transact(self._redis, (key, of_route), change)

    async def get(self, name: str, tenant: str) -> Circle:
        """Raises CircleNotFound, Unavailable for one of another version."""
        with translated():
            row = cast("str | None", await self._redis.get(circle_key(name, tenant)))
        if row is None:
            raise _no_circle()
        return read_record(Circle, row)

    async def list(self) -> Sequence[Circle]:
        """Those of all tenants, without those of another version: one of them must not hold up all the others."""
        with translated():
            names = sorted(cast("set[str]", await self._redis.smembers(CIRCLES_INDEX)))
            rows = cast("list[str | None]", await self._redis.mget(map(circle_key, names))) if names else []
        return [circle for name, row in zip(names, rows, strict=True) if (circle := _readable(name, row)) is not None]

    async def routes(self, tenant: str) -> Sequence[str]:
        """The tenant's routes that have a circle, of whatever version."""
        with translated():
            names = cast("set[str]", await self._redis.smembers(CIRCLES_INDEX))
        return own_names(tenant, names)

    async def start(
        self, name: str, by: Caller, *, idempotency: Idempotency | None = None, precondition: Precondition = ANY
    ) -> Circle:
        """Go on after a stop, from the policy that is live now. Raises CircleNotFound, PreconditionFailed, Conflict
        while it runs."""

        async def change(pipe: Pipeline) -> Circle:
            circle, route = await _read_both(pipe, name, by.tenant)
            precondition.require(circle_version(circle))
            if circle.status == "running":
                raise Conflict("the circle runs already", code="circle_runs")
            fresh: dict[str, object] = {"status": "running", "reason": "", "refusals": 0}
            if route.live_policy != circle.live_policy:
                fresh |= {"since": time(), "counted": await _counted(pipe, route), **await _stands_at(pipe, route)}
            return await _changed(pipe, circle, "circle_start", by, fresh)

        keys = (circle_key(name, by.tenant), route_key(name, by.tenant))
        return await transact(self._redis, keys, once(idempotency, Circle, change))

    async def stop(self, name: str, reason: str, by: Caller, *, precondition: Precondition = ANY) -> Circle:
        """No step is taken from here on; a turn under way is ended by whoever drives circles. The live policy stays.
        Raises CircleNotFound, PreconditionFailed; one that has stopped stays as it is."""

        async def change(pipe: Pipeline) -> Circle:
            circle = await _read(pipe, circle_key(name, by.tenant))
            if circle is None:
                raise _no_circle()
            precondition.require(circle_version(circle))
            if circle.status == "stopped":
                return circle
            return await _changed(pipe, circle, "circle_stop", by, {"status": "stopped", "reason": reason})

        return await transact(self._redis, (circle_key(name, by.tenant),), change)

    async def delete(self, name: str, by: Caller, *, precondition: Precondition = ANY) -> None:
        """Raises CircleNotFound, PreconditionFailed, Conflict while it runs or its last turn is being ended."""

        async def change(pipe: Pipeline) -> None:
            circle, route = await _read_both(pipe, name, by.tenant)
            precondition.require(circle_version(circle))
            if circle.status == "running":
                raise Conflict("the circle runs: stop it first", code="circle_runs")
            if circle.turn is not None:  # whoever ends it cancels its job and its trial
                raise Conflict("the circle's last turn is being ended: try again in some seconds", code="circle_ends")
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.delete(circle_key(name, by.tenant))
            pipe.srem(CIRCLES_INDEX, of_tenant(by.tenant, name))
            pipe.set(route_key(name, by.tenant), route.model_copy(update={"collect_share": None}).model_dump_json())
            audit.append(pipe, "circle_delete", by, route=name, data=circle.model_dump_json())

        await transact(self._redis, (circle_key(name, by.tenant), route_key(name, by.tenant)), change)

    async def step(self, circle: Circle, event: str, by: Caller, update: Mapping[str, object]) -> Circle | None:
        """What the circle has done by itself, written down; None where it was changed meanwhile: look again."""

        async def change(pipe: Pipeline) -> Circle | None:
            current = await _read(pipe, circle_key(circle.route, circle.tenant))
            if current is None or current.version != circle.version:
                return None
            return await _changed(pipe, current, event, by, update)

        return await transact(self._redis, (circle_key(circle.route, circle.tenant),), change)

    async def note(self, circle: Circle, update: Mapping[str, object]) -> None:
        """What it waits for, and what its job has cost so far: not in the audit, and lost where it was changed
        meanwhile."""

        async def change(pipe: Pipeline) -> None:
            current = await _read(pipe, circle_key(circle.route, circle.tenant))
            if current is not None and current.version == circle.version:
                pipe.multi()  # type: ignore[no-untyped-call]
                _write(pipe, current.model_copy(update={**update, "version": current.version + 1}))

        await transact(self._redis, (circle_key(circle.route, circle.tenant),), change)


def circle_version(circle: Circle | None) -> str | None:
    """Another one with other rules, another status, another live policy and each turn; not with every note of what it
    waits for, which nobody decided."""
    return version_of(circle, "spec", "status", "live_policy", "num_turns")


def circle_object(circle: Circle, now: float) -> dict[str, Any]:
    """The circle of the API."""
    under_way = () if circle.turn is None else (circle.turn,)
    today = of_last_day((*circle.turns, *under_way), now)
    return {
        "id": circle.route,
        "object": "bonsai.circle",
        "route": circle.route,
        "status": circle.status,
        "reason": circle.reason,
        "live_policy": circle.live_policy,
        "turn": None if circle.turn is None else circle.turn.model_dump(mode="json"),
        "turns": [turn.model_dump(mode="json") for turn in circle.turns],
        "spent": {
            "jobs": len(today),
            "gpu_seconds": sum(turn.seconds for turn in today),
            "kl_base": circle.kl_base,
            "kl_base_foreseen": foreseen_kl(circle),
        },
        "spec": circle.spec.model_dump(mode="json"),
    }


async def require_as_decided(pipe: Pipeline, circle: Circle) -> None:
    """For a change of something else that a circle decided on: watch it. Raises Conflict where it was stopped, deleted
    or otherwise changed since."""
    current = await _read(pipe, circle_key(circle.route, circle.tenant))
    if current is None or current.version != circle.version:
        raise Conflict("the circle was changed since it decided: it looks again", code="circle_changed")


async def _read(pipe: Pipeline, key: str) -> Circle | None:
    await pipe.watch(key)
    row = cast("str | None", await pipe.get(key))
    return None if row is None else read_record(Circle, row)


def _no_circle() -> CircleNotFound:
    return CircleNotFound("the route has no circle: PUT /routes/{route}/circle begins one")


def _readable(name: str, row: str | None) -> Circle | None:
    try:
        return None if row is None else read_record(Circle, row)
    except Unavailable:
        log.error("the circle of %s is of another version: it is passed over", name)
        return None


async def _read_both(pipe: Pipeline, name: str, tenant: str) -> tuple[Circle, Route]:
    circle = await _read(pipe, circle_key(name, tenant))
    row = cast("str | None", await pipe.get(route_key(name, tenant)))
    if circle is None or row is None:
        raise _no_circle()
    return circle, read_record(Route, row)


async def _stands_at(pipe: Pipeline, route: Route) -> dict[str, Any]:
    """The circle's fields of the live policy; of one without a report nobody knows how far it has drifted: 0."""
    live = route.live_policy
    if live is None:
        return {"live_policy": None, "kl_base": 0.0}
    written = (await read_policy(pipe, live, route.tenant)).manifest
    report = None if written is None else written.report
    kl = 0.0 if report is None else (report.kl_policy_base or report.kl_policy_reference).mean
    return {"live_policy": live, "kl_base": max(0.0, kl)}


async def _counted(pipe: Pipeline, route: Route) -> int:
    return int(cast("str | None", await pipe.hget(LEDGER_COUNTS, of_tenant(route.tenant, route.name))) or 0)


async def _changed(pipe: Pipeline, circle: Circle, event: str, by: Caller, update: Mapping[str, object]) -> Circle:
    changed = circle.model_copy(update={**update, "version": circle.version + 1})
    audit = await AuditChain.open(pipe)
    pipe.multi()  # type: ignore[no-untyped-call]
    _write(pipe, changed)
    turn = changed.turn or next(iter(changed.turns[-1:]), None)
    told = {"status": changed.status, "reason": changed.reason, "turn": None if turn is None else turn.model_dump()}
    about = {} if turn is None or turn.policy is None else {"policy": turn.policy}
    audit.append(pipe, event, by, route=circle.route, data=json.dumps(told), **about)
    return changed


def _write(pipe: Pipeline, circle: Circle) -> None:
    name = of_tenant(circle.tenant, circle.route)
    pipe.set(circle_key(name), circle.model_dump_json())
    pipe.sadd(CIRCLES_INDEX, name)

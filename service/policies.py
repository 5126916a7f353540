"""The registry of policies: what an engine proved about one, and which one stands in on a route.

Owns: the states candidate -> live -> retired (failed: its fingerprint was wrong), promotion and roll-back, the
audit of both. Does not own: registering candidates (the worker's last script does), loading and probing
(publishing.py). Every change is one transaction over all the keys it reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import (
    AUDIT_STREAM,
    ROUTES_INDEX,
    FingerprintResult,
    PolicyRecord,
    PolicyState,
    Route,
    of_tenant,
    policy_key,
    route_key,
)
from service.access import GATEWAY, Caller
from service.audit import audit_entry
from service.errors import Conflict, InvalidField, PolicyNotFound, RouteNotFound
from service.idempotency import Idempotency
from service.store import transact

PREVIOUS_KEPT: Final = 100
"""How far a route can be rolled back."""


class Policies:
    """The policies of one Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def record_fingerprint(self, policy_id: str, result: FingerprintResult) -> PolicyRecord:
        """Keep what the engine answered; a policy that did not pass is failed from now on."""

        async def change(pipe: Pipeline) -> PolicyRecord:
            policy = await _read_policy(pipe, policy_id)
            state: PolicyState = policy.state if result.passed else "failed"
            probed = policy.model_copy(update={"fingerprint": result, "state": state})
            pipe.multi()  # type: ignore[no-untyped-call]
            _write_policy(pipe, probed)
            if not result.passed:
                pipe.xadd(AUDIT_STREAM, _audit("policy_failed", policy_id, GATEWAY, {"reason": result.reason}))
            return probed

        return await transact(self._redis, [policy_key(policy_id)], change)

    async def promote(
        self,
        policy_id: str,
        route_name: str,
        reason: str,
        served: frozenset[str],
        idempotency: Idempotency | None = None,
        by: Caller = GATEWAY,
    ) -> Route:
        """Let a policy stand in for best-of-n on a route; the one before goes where roll-back finds it.

        reason: why without an experiment's verdict; goes into the audit. served: what the engine serves now.
        Raises Conflict with what to do about it, PolicyNotFound, RouteNotFound.
        """

        async def change(pipe: Pipeline) -> Route:
            if idempotency is not None and (earlier := await idempotency.recall(pipe)) is not None:
                return Route.model_validate_json(earlier)
            routes = await self._watched_routes(pipe, by.tenant)
            route = _named(routes, route_name)
            policy = await _read_policy(pipe, policy_id)
            if policy.kind != "base" and policy.tenant != by.tenant:
                raise PolicyNotFound("no such policy")
            _require_promotable(policy, route, served)
            if not reason.strip():
                raise Conflict(
                    "straight to live needs an override_reason that says why no experiment decided",
                    param="override_reason",
                    code="override_reason_required",
                )
            former = await _former(pipe, routes, route)
            promoted = route.model_copy(
                update={
                    "live_policy": policy_id,
                    "previous_policies": (*route.previous_policies, route.live_policy)[-PREVIOUS_KEPT:],
                }
            )
            pipe.multi()  # type: ignore[no-untyped-call]
            _write_route(pipe, promoted, idempotency)
            _write_policy(pipe, policy.model_copy(update={"state": "live"}))
            _retire(pipe, former)
            told = {"route": route_name, "before": route.live_policy, "reason": reason}
            pipe.xadd(AUDIT_STREAM, _audit("promote", policy_id, by, told))
            return promoted

        return await transact(self._redis, [ROUTES_INDEX, policy_key(policy_id)], change)

    async def roll_back(self, route_name: str, idempotency: Idempotency | None = None, by: Caller = GATEWAY) -> Route:
        """Let the policy before stand in again, or best-of-n where there was none. One that has failed or was
        tainted since is passed over. Raises Conflict when there is nothing to go back to."""

        async def change(pipe: Pipeline) -> Route:
            if idempotency is not None and (earlier := await idempotency.recall(pipe)) is not None:
                return Route.model_validate_json(earlier)
            routes = await self._watched_routes(pipe, by.tenant)
            route = _named(routes, route_name)
            target, rest, skipped = await _predecessor(pipe, route)
            former = await _former(pipe, routes, route)
            restored = route.model_copy(
                update={"live_policy": None if target is None else target.id, "previous_policies": rest}
            )
            pipe.multi()  # type: ignore[no-untyped-call]
            _write_route(pipe, restored, idempotency)
            if target is not None:
                _write_policy(pipe, target.model_copy(update={"state": "live"}))
            _retire(pipe, former)
            told = {"route": route_name, "before": route.live_policy, "skipped": skipped}
            pipe.xadd(AUDIT_STREAM, _audit("roll_back", restored.live_policy, by, told))
            return restored

        return await transact(self._redis, [ROUTES_INDEX], change)

    async def _watched_routes(self, pipe: Pipeline, tenant: str) -> dict[str, Route]:
        """All routes of a tenant: whether a policy is still live somewhere else depends on every one of them."""
        names = cast(set[str], await pipe.smembers(ROUTES_INDEX))
        own = sorted(bare for name in names if of_tenant(tenant, bare := name.rpartition("/")[2]) == name)
        if not own:
            return {}
        keys = [route_key(name, tenant) for name in own]
        await pipe.watch(*keys)
        rows = cast("list[str | None]", await pipe.mget(keys))
        return {name: Route.model_validate_json(row) for name, row in zip(own, rows, strict=True) if row is not None}


def policy_object(policy: PolicyRecord, routes: Iterable[Route], served: frozenset[str]) -> dict[str, Any]:
    """The policy of the API."""
    manifest = policy.manifest
    return {
        "id": policy.id,
        "object": "bonsai.policy",
        "kind": policy.kind,
        "state": policy.state,
        "served": policy.id in served,
        "created_at": policy.created_at,
        "n_equivalent": policy.n_equivalent,
        "live_on": [route.name for route in routes if route.live_policy == policy.id],
        "tainted": policy.tainted,
        "fingerprint": None if policy.fingerprint is None else policy.fingerprint.model_dump(mode="json"),
        "base_policy": policy.id if manifest is None else manifest.base_policy_id,
        "job": None if manifest is None else manifest.job_id,
        "report": None if manifest is None or manifest.report is None else manifest.report.model_dump(mode="json"),
        "manifest": None if manifest is None else manifest.model_dump(mode="json"),
    }


def _named(routes: dict[str, Route], name: str) -> Route:
    if name not in routes:
        raise RouteNotFound("no such route", param="route")
    return routes[name]


def _require_promotable(policy: PolicyRecord, route: Route, served: frozenset[str]) -> None:
    if policy.kind == "base":
        raise Conflict("a base policy answers by best-of-n: roll the route back instead", code="policy_is_base")
    if policy.kind == "full":
        raise InvalidField(
            "engines serve adapters beside their model: full weights are for export, and a job with training.weights "
            "lora makes what can be promoted",
            param="policy",
            code="export_only",
        )
    if route.live_policy == policy.id:
        raise Conflict("the policy is live on this route already", code="already_live")
    if policy.state == "failed" or policy.tainted:
        raise Conflict("the policy failed its fingerprint or is tainted: distil another one", code="policy_unusable")
    if policy.manifest is None or policy.manifest.base_policy_id != route.base_policy:
        raise Conflict("the policy stands on another base than the route", code="other_base")
    if policy.fingerprint is None or not policy.fingerprint.passed:
        raise Conflict(
            "the policy has not passed its fingerprint yet: wait until GET /policies/{id} shows it passed",
            code="fingerprint_missing",
        )
    if policy.id not in served:
        raise Conflict(
            "the engine does not serve the policy now: wait until GET /policies/{id} shows it as served, "
            "or stop experiments that hold the engine's adapter slots",
            code="policy_not_served",
        )


async def _former(pipe: Pipeline, routes: dict[str, Route], route: Route) -> PolicyRecord | None:
    """The policy that stops being live anywhere when it stops being live on `route`."""
    if route.live_policy is None:
        return None
    if any(other.live_policy == route.live_policy for other in routes.values() if other.name != route.name):
        return None
    await pipe.watch(policy_key(route.live_policy))
    return await _read_policy(pipe, route.live_policy)


async def _predecessor(pipe: Pipeline, route: Route) -> tuple[PolicyRecord | None, tuple[str | None, ...], list[str]]:
    """(the newest earlier policy that can still serve or None for best-of-n, those before it, those passed over)."""
    skipped: list[str] = []
    for index in reversed(range(len(route.previous_policies))):
        candidate, rest = route.previous_policies[index], route.previous_policies[:index]
        if candidate is None:
            return None, rest, skipped
        await pipe.watch(policy_key(candidate))
        policy = await _read_policy(pipe, candidate)
        if policy.state != "failed" and not policy.tainted and candidate != route.live_policy:
            return policy, rest, skipped
        skipped.append(candidate)
    raise Conflict("the route has no earlier policy to go back to", code="nothing_to_roll_back")


async def _read_policy(pipe: Pipeline, policy_id: str) -> PolicyRecord:
    row = cast("str | None", await pipe.hget(policy_key(policy_id), "record"))
    if row is None:
        raise PolicyNotFound("no such policy")
    return PolicyRecord.model_validate_json(row)


def _write_route(pipe: Pipeline, route: Route, idempotency: Idempotency | None) -> None:
    text = route.model_dump_json()
    pipe.set(route_key(route.name, route.tenant), text)
    if idempotency is not None:
        idempotency.remember(pipe, text)


def _write_policy(pipe: Pipeline, policy: PolicyRecord) -> None:
    pipe.hset(policy_key(policy.id), "record", policy.model_dump_json())
    pipe.hincrby(policy_key(policy.id), "version", 1)


def _retire(pipe: Pipeline, former: PolicyRecord | None) -> None:
    if former is not None and former.state != "failed":
        _write_policy(pipe, former.model_copy(update={"state": "retired"}))


def _audit(event: str, policy_id: str | None, by: Caller, told: Mapping[str, object]) -> dict[Any, Any]:
    return audit_entry(event, by, policy=policy_id or "", data=json.dumps(told))

"""The registry of policies: what an engine proved about one, which one stands in on a route, and what it is called.

Owns: promotion and roll-back, retirement, descriptions and protection, the audit of all. Does not own: registering
candidates (the worker's last script does), shadow and canary (trials.py), deletion (deletion.py), loading and probing
(publishing.py). Every change is one transaction over all the keys it reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import Field
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import (
    MOST_DESCRIPTION,
    ROUTES_INDEX,
    Circle,
    FingerprintResult,
    PolicyId,
    PolicyRecord,
    PolicyState,
    Record,
    Route,
    policy_key,
)
from service.access import GATEWAY, Caller
from service.audit import AuditChain
from service.circles import require_as_decided
from service.errors import Conflict, PolicyNotFound
from service.idempotency import Idempotency, once
from service.preconditions import ANY, Precondition, version_of
from service.registry import moved, named, read_policy, require_fit, settled, watched_routes, write_move, write_policy
from service.store import transact

PREVIOUS_KEPT: Final = 100
"""How far a route can be rolled back."""


class Replaces(Record):
    """What a promotion takes for live now: another caller who was faster has changed that."""

    policy: PolicyId | None


class PolicyChange(Record):
    """Body of `PATCH /policies/{id}`; what is left out stays."""

    description: str | None = Field(None, max_length=MOST_DESCRIPTION)
    is_protected: bool | None = None


class Policies:
    """The policies of one Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def record_fingerprint(self, policy_id: str, result: FingerprintResult) -> PolicyRecord:
        """Keep what the engine answered; a policy that did not pass is failed from now on."""

        async def change(pipe: Pipeline) -> PolicyRecord:
            policy = await read_policy(pipe, policy_id)
            state: PolicyState = policy.state if result.passed else "failed"
            probed = policy.become(state).model_copy(update={"fingerprint": result})
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            probed = write_policy(pipe, probed)
            if not result.passed:
                told = {"before": policy.state, "after": state, "reason": result.reason}
                by = GATEWAY._replace(tenant=policy.tenant)
                audit.append(pipe, "policy_failed", by, policy=policy_id, data=json.dumps(told))
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
        *,
        precondition: Precondition = ANY,
        replaces: Replaces | None = None,
        circle: Circle | None = None,
    ) -> Route:
        """Let a policy stand in for best-of-n on a route; the one before goes where roll-back finds it.

        reason: why without an experiment's verdict; goes into the audit. served: what the engine serves now. circle:
        which decided it, as it was then; one that has been stopped since promotes nothing.
        Raises Conflict with what to do about it, PreconditionFailed, PolicyNotFound, RouteNotFound.
        """

        async def change(pipe: Pipeline) -> Route:
            if circle is not None:
                await require_as_decided(pipe, circle)
            routes = await watched_routes(pipe, by.tenant)
            route = named(routes, route_name)
            policy = await read_policy(pipe, policy_id, by.tenant)
            precondition.require(policy.version)
            _require_replaced(route, replaces)
            if route.live_policy == policy.id:
                raise Conflict("the policy is live on this route already", code="already_live")
            require_fit(policy, route, served)
            _require_reason(reason)
            promoted = _promoted(route, policy_id)
            states = await settled(pipe, routes, [promoted])
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            write_move(pipe, route, promoted, states)
            audit.append(pipe, "promote", by, policy=policy_id, data=moved(route, promoted, states, reason=reason))
            return promoted

        return await transact(self._redis, [ROUTES_INDEX, policy_key(policy_id)], once(idempotency, Route, change))

    async def roll_back(
        self,
        route_name: str,
        idempotency: Idempotency | None = None,
        by: Caller = GATEWAY,
        *,
        precondition: Precondition = ANY,
    ) -> Route:
        """Let the policy before stand in again, or best-of-n where there was none. One that has failed or was
        tainted since is passed over.

        precondition: on the route, so that two who roll back the same policy go one step.
        Raises Conflict when there is nothing to go back to, PreconditionFailed.
        """

        async def change(pipe: Pipeline) -> Route:
            routes = await watched_routes(pipe, by.tenant)
            route = named(routes, route_name)
            precondition.require(version_of(route))
            target, rest, skipped = await _predecessor(pipe, route)
            restored = _without_trial(route, target).model_copy(
                update={"live_policy": target, "previous_policies": rest}
            )
            states = await settled(pipe, routes, [restored])
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            write_move(pipe, route, restored, states)
            told = moved(route, restored, states, skipped=skipped)
            audit.append(pipe, "roll_back", by, policy=target or "", data=told)
            return restored

        return await transact(self._redis, [ROUTES_INDEX], once(idempotency, Route, change))

    async def retire(
        self,
        policy_id: str,
        by: Caller = GATEWAY,
        *,
        idempotency: Idempotency | None = None,
        precondition: Precondition = ANY,
    ) -> PolicyRecord:
        """Take a candidate out of use for good. Raises Conflict for one that is anything to a route."""

        async def change(pipe: Pipeline) -> PolicyRecord:
            routes = await watched_routes(pipe, by.tenant)
            policy = await read_policy(pipe, policy_id, by.tenant)
            precondition.require(policy.version)
            if policy.kind == "base":
                raise Conflict("a base policy does not retire", code="policy_is_base")
            used = [route.name for route in routes.values() if route.stage_of(policy_id) is not None]
            if used:
                raise Conflict(
                    f"the policy is {policy.state} on {', '.join(used)}: roll back or withdraw it there first",
                    code="policy_in_use",
                )
            if policy.state != "candidate":
                raise Conflict(f"the policy is {policy.state} already", code=f"policy_{policy.state}")
            return await self._written(pipe, policy, policy.become("retired"), "retire", by)

        keys = [ROUTES_INDEX, policy_key(policy_id)]
        return await transact(self._redis, keys, once(idempotency, PolicyRecord, change))

    async def amend(
        self, policy_id: str, asked: PolicyChange, by: Caller = GATEWAY, *, precondition: Precondition = ANY
    ) -> PolicyRecord:
        """Describe or protect a policy. Raises PolicyNotFound, PreconditionFailed."""

        async def change(pipe: Pipeline) -> PolicyRecord:
            policy = await read_policy(pipe, policy_id, by.tenant)
            if policy.tenant != by.tenant:
                raise PolicyNotFound("no such policy")
            precondition.require(policy.version)
            amended = policy.model_copy(update=asked.model_dump(exclude_none=True))
            return await self._written(pipe, policy, amended, "policy_change", by)

        return await transact(self._redis, [policy_key(policy_id)], change)

    async def _written(
        self, pipe: Pipeline, before: PolicyRecord, after: PolicyRecord, event: str, by: Caller
    ) -> PolicyRecord:
        audit = await AuditChain.open(pipe)
        pipe.multi()  # type: ignore[no-untyped-call]
        kept = {"state", "description", "is_protected"}
        told = {"before": before.model_dump(include=kept), "after": after.model_dump(include=kept)}
        audit.append(pipe, event, by, policy=before.id, data=json.dumps(told))
        return write_policy(pipe, after)


def policy_object(
    policy: PolicyRecord, routes: Iterable[Route], served: frozenset[str], tags: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The policy of the API. tags: all of its tenant's."""
    manifest = policy.manifest
    stages = [(route.name, route.stage_of(policy.id)) for route in routes]
    return {
        "id": policy.id,
        "object": "bonsai.policy",
        "kind": policy.kind,
        "state": policy.state,
        "version": policy.version,
        "served": policy.id in served,
        "created_at": policy.created_at,
        "n_equivalent": policy.n_equivalent,
        "live_on": [name for name, stage in stages if stage == "live"],
        "canary_on": [name for name, stage in stages if stage == "canary"],
        "shadow_on": [name for name, stage in stages if stage == "shadow"],
        "tags": sorted(tag for tag, named_policy in (tags or {}).items() if named_policy == policy.id),
        "description": policy.description,
        "is_protected": policy.is_protected,
        "tainted": policy.tainted,
        "fingerprint": None if policy.fingerprint is None else policy.fingerprint.model_dump(mode="json"),
        "base_policy": policy.id if manifest is None else manifest.base_policy_id,
        "parents": sorted(policy.parents),
        "job": None if manifest is None else manifest.job_id,
        "report": None if manifest is None or manifest.report is None else manifest.report.model_dump(mode="json"),
        "manifest": None if manifest is None else manifest.model_dump(mode="json"),
    }


def _require_replaced(route: Route, replaces: Replaces | None) -> None:
    if replaces is not None and route.live_policy != replaces.policy:
        raise Conflict(
            "another policy is live on the route than the one to be replaced: look again and decide again",
            param="replaces",
            code="route_moved",
            facts={"live_policy": route.live_policy},
        )


def _require_reason(reason: str) -> None:
    if not reason.strip():
        raise Conflict(
            "straight to live needs an override_reason that says why no experiment decided",
            param="override_reason",
            code="override_reason_required",
        )


def _promoted(route: Route, policy_id: str) -> Route:
    former = (*route.previous_policies, route.live_policy)[-PREVIOUS_KEPT:]
    return _without_trial(route, policy_id).model_copy(update={"live_policy": policy_id, "previous_policies": former})


def _without_trial(route: Route, policy_id: str | None) -> Route:
    """The route where the policy is on trial no more, if it was."""
    held = {"canary": route.canary, "shadow": route.shadow}
    over = [stage for stage, trial in held.items() if trial is not None and trial.policy == policy_id]
    return route.model_copy(update=dict.fromkeys(over))


async def _predecessor(pipe: Pipeline, route: Route) -> tuple[str | None, tuple[str | None, ...], list[str]]:
    """(the newest earlier policy that can still serve or None for best-of-n, those before it, those passed over)."""
    skipped: list[str] = []
    for index in reversed(range(len(route.previous_policies))):
        candidate, rest = route.previous_policies[index], route.previous_policies[:index]
        if candidate is None:
            return None, rest, skipped
        await pipe.watch(policy_key(candidate))
        policy = await read_policy(pipe, candidate)
        if policy.is_usable and candidate != route.live_policy:
            return policy.id, rest, skipped
        skipped.append(candidate)
    raise Conflict("the route has no earlier policy to go back to", code="nothing_to_roll_back")

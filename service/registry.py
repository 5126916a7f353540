"""Records of policies and routes inside one transaction: read, watched, written, and what follows for states.

Owns: how both are kept in Redis, and that a policy's state is what its routes say it is. Does not own: which change is
allowed (policies.py, trials.py, deletion.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

from redis.asyncio.client import Pipeline

from bon_algos.contracts import (
    ROUTES_INDEX,
    PolicyRecord,
    PolicyState,
    Route,
    experiment_stats_key,
    own_names,
    policy_key,
    route_key,
)
from service.errors import Conflict, InvalidField, PolicyNotFound, RouteNotFound
from service.experiment_store import FORMER_STATISTICS_SECONDS
from service.record_reading import read_record


class Settled(NamedTuple):
    """A policy whose state is another one for what happened to its routes."""

    policy: PolicyRecord
    former: PolicyState


async def read_policy(pipe: Pipeline, policy_id: str, tenant: str | None = None) -> PolicyRecord:
    """tenant: whose it must be unless it is a base; None: anybody's. Raises PolicyNotFound."""
    row = cast("str | None", await pipe.hget(policy_key(policy_id), "record"))
    policy = None if row is None else read_record(PolicyRecord, row)
    if policy is None or (tenant is not None and policy.kind != "base" and policy.tenant != tenant):
        raise PolicyNotFound("no such policy")
    return policy


def write_policy(pipe: Pipeline, policy: PolicyRecord) -> PolicyRecord:
    """Queue it as its next version, which is returned."""
    written = policy.model_copy(update={"version": policy.version + 1})
    pipe.hset(policy_key(policy.id), "record", written.model_dump_json())
    pipe.hset(policy_key(policy.id), "version", str(written.version))
    return written


async def watched_routes(pipe: Pipeline, tenant: str) -> dict[str, Route]:
    """All routes of a tenant: what a policy is depends on every one of them."""
    names = cast(set[str], await pipe.smembers(ROUTES_INDEX))
    own = own_names(tenant, names)
    if not own:
        return {}
    keys = [route_key(name, tenant) for name in own]
    await pipe.watch(*keys)
    rows = cast("list[str | None]", await pipe.mget(keys))
    return {name: read_record(Route, row) for name, row in zip(own, rows, strict=True) if row is not None}


def named(routes: Mapping[str, Route], name: str) -> Route:
    """Raises RouteNotFound."""
    if name not in routes:
        raise RouteNotFound("no such route", param="route")
    return routes[name]


async def settled(pipe: Pipeline, routes: Mapping[str, Route], changed: Iterable[Route]) -> list[Settled]:
    """The policies whose state is another one when these routes are as they are given; before `multi()`."""
    after = {**routes, **{route.name: route for route in changed}}
    found: list[Settled] = []
    for policy_id in sorted(_in_use(routes.values()) | _in_use(after.values())):
        await pipe.watch(policy_key(policy_id))
        policy = await read_policy(pipe, policy_id)
        if (state := policy.state_on(after.values())) != policy.state:
            found.append(Settled(policy.become(state), policy.state))
    return found


def write_move(pipe: Pipeline, before: Route, after: Route, states: Iterable[Settled]) -> None:
    """Queue a route as it is now, and the policies that are something else for it."""
    pipe.set(route_key(after.name, after.tenant), after.model_dump_json())
    for one in states:
        write_policy(pipe, one.policy)
    left = {trial.id for trial in (after.canary, after.shadow) if trial is not None}
    for trial in (before.canary, before.shadow):
        if trial is not None and trial.id not in left:
            pipe.expire(experiment_stats_key(trial.id), FORMER_STATISTICS_SECONDS)


def _in_use(routes: Iterable[Route]) -> set[str]:
    return {policy_id for route in routes for policy_id in stages_of(route).values() if policy_id is not None}


def stages_of(route: Route) -> dict[str, str | None]:
    """What the audit tells of a route."""
    return {
        "live": route.live_policy,
        "canary": None if route.canary is None else route.canary.policy,
        "shadow": None if route.shadow is None else route.shadow.policy,
    }


def moved(before: Route, after: Route, states: Iterable[Settled], **more: Any) -> str:
    """The audit's data of a move on a route."""
    changed = {one.policy.id: [one.former, one.policy.state] for one in states}
    stages = {"before": stages_of(before), "after": stages_of(after)}
    return json.dumps({"route": before.name, **stages, "states": changed, **more})


def require_fit(policy: PolicyRecord, route: Route, served: frozenset[str]) -> None:
    """Whether a policy may be anything to a route. served: what the engines serve now. Raises Conflict with what to
    do about it."""
    if policy.kind == "base":
        raise Conflict("a base policy answers by best-of-n: roll the route back instead", code="policy_is_base")
    if policy.kind == "full":
        raise InvalidField(
            "engines serve adapters beside their model: full weights are for export, and a job with training.weights "
            "lora makes what can be promoted",
            param="policy",
            code="export_only",
        )
    if policy.state == "failed" or policy.tainted:
        raise Conflict("the policy failed its fingerprint or is tainted: distil another one", code="policy_unusable")
    if policy.state == "retired":
        raise Conflict("the policy is retired: only a roll-back brings it back", code="policy_retired")
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

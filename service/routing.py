"""The routes: what a caller's request runs into when it names one.

Owns: creating, changing and deleting them. Does not own: which policy is live on one (policies.py) nor its
experiment (experiment_store.py); a change here leaves both as they are.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal, cast

from pydantic import Field
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import (
    ROUTES_INDEX,
    Experiment,
    PolicyId,
    Record,
    Route,
    Strategy,
    experiment_key,
    experiment_stats_key,
    of_tenant,
    own_names,
    route_key,
)
from service.access import GATEWAY, Caller
from service.audit import AuditChain
from service.catalogue import Snapshot
from service.errors import Conflict, InvalidField, RouteNotFound
from service.experiment_store import FORMER_STATISTICS_SECONDS
from service.preconditions import ANY, Precondition, version_of
from service.record_reading import read_record
from service.store import transact

MAX_ROUTES: Final = 100
"""Of a tenant."""


class RouteRequest(Record):
    """Body of `PUT /routes/{route}`; what is left out takes this installation's default."""

    base_policy: PolicyId | Literal["base"] = "base"
    reward_model: str | None = Field(None, max_length=64)
    default_n: int = Field(16, ge=1)
    n_cap: int | None = Field(None, ge=1)
    quorum: int | None = Field(None, ge=1)
    deadline_ms: int = Field(60_000, ge=1, le=3_600_000)
    strategy: Strategy = "fixed"
    softness: float | None = Field(None, gt=0, le=1e9)
    kept_gain: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)


class Routes:
    """The routes of one Redis."""

    def __init__(self, redis: Redis, *, reward_model: str, n_cap: int, max_tokens: int) -> None:
        self._redis = redis
        self._reward_model = reward_model
        self._n_cap = n_cap
        self._max_tokens = max_tokens

    async def put(
        self,
        name: str,
        request: RouteRequest,
        base_policy: str,
        by: Caller = GATEWAY,
        *,
        precondition: Precondition = ANY,
    ) -> tuple[Route, bool]:
        """The route as it is now, and whether it is new. Raises InvalidField, PreconditionFailed."""
        settled, key = self._settled(request, base_policy), route_key(name, by.tenant)

        async def change(pipe: Pipeline) -> tuple[Route, bool]:
            row = cast("str | None", await pipe.get(key))
            former = None if row is None else read_record(Route, row)
            precondition.require(version_of(former))
            if former is None and await _count(pipe, by.tenant) >= MAX_ROUTES:
                raise Conflict(f"there are {MAX_ROUTES} routes already: delete one", code="too_many_routes")
            if former is not None and former.is_used and former.base_policy != settled["base_policy"]:
                raise Conflict(
                    "a policy of the present base is live, canary or shadow here: roll back or withdraw it first",
                    code="route_in_use",
                )
            route = (
                Route(name=name, tenant=by.tenant, **settled) if former is None else former.model_copy(update=settled)
            )
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.set(key, route.model_dump_json())
            pipe.sadd(ROUTES_INDEX, of_tenant(by.tenant, name))
            audit.append(pipe, "route_put", by, route=name, data=_told(row, route.model_dump_json()))
            return route, former is None

        return await transact(self._redis, (key, ROUTES_INDEX), change)

    async def delete(self, name: str, by: Caller = GATEWAY, *, precondition: Precondition = ANY) -> None:
        """Raises RouteNotFound, PreconditionFailed, and Conflict while anything still depends on the route."""
        keys = (route_key(name, by.tenant), experiment_key(name, by.tenant), ROUTES_INDEX)

        async def change(pipe: Pipeline) -> None:
            row, experiment_row = cast("list[str | None]", await pipe.mget(keys[:2]))
            if row is None:
                raise RouteNotFound("no such route", param="route")
            route = read_record(Route, row)
            precondition.require(version_of(route))
            experiment = None if experiment_row is None else read_record(Experiment, experiment_row)
            if experiment is not None and experiment.stopped_at is None:
                raise Conflict("an experiment runs on the route: stop it first", code="route_in_use")
            if route.collect_share is not None:
                raise Conflict("the route has a circle: stop and delete it first", code="route_in_use")
            if route.is_used:
                raise Conflict(
                    "a policy is live, canary or shadow on the route: roll back or withdraw it first",
                    code="route_in_use",
                )
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.delete(*keys[:2])
            pipe.srem(ROUTES_INDEX, of_tenant(by.tenant, name))
            if experiment is not None:
                pipe.expire(experiment_stats_key(experiment.id), FORMER_STATISTICS_SECONDS)
            audit.append(pipe, "route_delete", by, route=name, data=_told(row, None))

        await transact(self._redis, keys, change)

    def _settled(self, request: RouteRequest, base_policy: str) -> dict[str, Any]:
        """The fields a PUT decides. Raises InvalidField where they do not agree with this installation."""
        n_cap = self._n_cap if request.n_cap is None else request.n_cap
        if n_cap > self._n_cap:
            raise InvalidField(f"n_cap is more than this installation's limit of {self._n_cap}", param="n_cap")
        if request.default_n > n_cap:
            raise InvalidField(f"default_n is more than the route's n_cap of {n_cap}", param="default_n")
        if request.quorum is not None and request.quorum > n_cap:
            raise InvalidField(f"quorum is more than the route's n_cap of {n_cap}", param="quorum")
        if request.base_policy not in ("base", base_policy):
            raise InvalidField("the engine does not serve this base policy", param="base_policy")
        if request.reward_model not in (None, self._reward_model):
            raise InvalidField("this installation does not serve this reward model", param="reward_model")
        if (request.strategy == "soft") != (request.softness is not None):
            raise InvalidField("softness belongs to strategy soft, which needs it", param="softness")
        if request.kept_gain is not None and request.strategy != "distilled_first":
            raise InvalidField("kept_gain belongs to strategy distilled_first", param="kept_gain")
        return {
            "base_policy": base_policy,
            "reward_model": self._reward_model,
            "default_n": request.default_n,
            "n_cap": n_cap,
            "quorum": request.quorum,
            "deadline_ms": request.deadline_ms,
            "strategy": request.strategy,
            "softness": request.softness,
            "kept_gain": request.kept_gain,
            "max_tokens": self._max_tokens if request.max_tokens is None else request.max_tokens,
        }


def route_object(route: Route, snapshot: Snapshot) -> dict[str, Any]:
    """The route of the API."""
    experiment = snapshot.running(route.name)
    return {
        "id": route.name,
        "object": "bonsai.route",
        **route.model_dump(mode="json", exclude={"tenant": True, "canary": {"salt"}, "shadow": {"salt"}}),
        "live_is_served": route.live_policy in snapshot.served if route.live_policy is not None else None,
        "experiment": None if experiment is None else experiment.id,
    }


def _told(before: str | None, after: str | None) -> str:
    return json.dumps({"before": json.loads(before or "null"), "after": json.loads(after or "null")})


async def _count(pipe: Pipeline, tenant: str) -> int:
    """Routes of a tenant."""
    names = cast("set[str]", await pipe.smembers(ROUTES_INDEX))
    return len(own_names(tenant, names))

"""What the hot path knows about routes, experiments and policies: a frozen snapshot, read without I/O.

Owns: the snapshot, its refreshing every second, and the objects a gateway cannot start without (the base policy
and the route `default`), what of it each tenant sees. Does not own: changing any of it (routing.py, policies.py,
experiments.py) nor what the engine serves (publishing.py tells it by `set_served`).
With Redis away the last snapshot keeps serving, and its age says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from time import time
from typing import Any, Final, TypeVar, cast

from pydantic import BaseModel, ValidationError
from redis.asyncio import Redis
from uuid_utils import uuid7

from bon_algos.contracts import (
    DEFAULT_TENANT,
    POLICIES_DELETED,
    POLICIES_INDEX,
    REGISTRY,
    ROUTES_INDEX,
    TAGS,
    Experiment,
    PolicyRecord,
    Route,
    experiment_key,
    of_tenant,
    own_name,
    policy_key,
    route_key,
)
from bon_algos.crash_points import crash_point
from service.errors import PolicyNotFound, RouteNotFound, StoreFull, StoreUnavailable
from service.record_reading import read_record
from service.store import translated

REFRESH_SECONDS: Final = 1.0
DELETED_SECONDS: Final = 86_400
"""An engine that was not told of a deletion for longer has been started anew, and has forgotten."""
log = logging.getLogger("bonsai.catalogue")
RecordT = TypeVar("RecordT", bound=BaseModel)


@dataclass(frozen=True)
class Snapshot:
    """The catalogue at one moment; a reader that keeps one sees no change."""

    routes: Mapping[str, Route]
    """By name; of all tenants by `of_tenant`."""
    policies: Mapping[str, PolicyRecord]
    experiments: Mapping[str, Experiment] = field(default_factory=dict)
    """The latest of each route by route, stopped ones too: see `running`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Policy by tag; of all tenants by `of_tenant`."""
    deleted: frozenset[str] = frozenset()
    """Policies that were deleted of late, which an engine may still have."""
    registry: str = ""
    """Which registry this is; "" while Redis has none."""
    served: frozenset[str] = frozenset()
    """Policies the engine proved to serve since its last start; the base by its name in the engine's list."""
    read_at: float = 0.0
    """When Redis last answered; 0: not yet."""

    def route(self, name: str) -> Route:
        """Raises RouteNotFound."""
        if (route := self.routes.get(name)) is None:
            raise RouteNotFound("no such route", param="route")
        return route

    def policy(self, policy_id: str) -> PolicyRecord:
        """Raises PolicyNotFound."""
        if (policy := self.policies.get(policy_id)) is None:
            raise PolicyNotFound("no such policy")
        return policy

    def running(self, route: str) -> Experiment | None:
        experiment = self.experiments.get(route)
        return experiment if experiment is not None and experiment.stopped_at is None else None

    def live(self, route: Route) -> PolicyRecord | None:
        """The distilled policy promoted on the route."""
        return None if route.live_policy is None else self.policies.get(route.live_policy)

    def canary(self, route: Route) -> PolicyRecord | None:
        """The policy that is tried on a share of the route."""
        return None if route.canary is None else self.policies.get(route.canary.policy)

    def of(self, tenant: str) -> Snapshot:
        """What a tenant sees, by its own names: what is its own, and the base."""
        names = {name: route.name for name, route in self.routes.items() if route.tenant == tenant}
        return replace(
            self,
            routes={own: self.routes[name] for name, own in names.items()},
            experiments={own: self.experiments[name] for name, own in names.items() if name in self.experiments},
            policies={own: one for own, one in self.policies.items() if one.kind == "base" or one.tenant == tenant},
            tags={own: policy for tag, policy in self.tags.items() if (own := own_name(tenant, tag)) is not None},
        )

    def age(self, now: float) -> float:
        """Seconds since Redis last answered."""
        return now - self.read_at


class Catalogue:
    """Keeps the snapshot of one gateway process fresh."""

    def __init__(self, redis: Redis, base: PolicyRecord, default_route: Route) -> None:
        """Serves `base` and `default_route` before Redis has answered, and writes them where Redis lacks them."""
        self._redis = redis
        self._base = base
        self._default_route = default_route
        self._is_seeded = False
        self._parsed: dict[str, tuple[str, BaseModel]] = {}
        self._refreshing = asyncio.Lock()
        self._snapshot = Snapshot(routes={default_route.name: default_route}, policies={base.id: base})
        self._views: dict[str, Snapshot] = {}

    @property
    def snapshot(self) -> Snapshot:
        """Of all tenants: for what serves them all, and for nobody who asks."""
        return self._snapshot

    def of(self, tenant: str) -> Snapshot:
        """What a tenant sees."""
        if tenant not in self._views:
            self._views[tenant] = self._snapshot.of(tenant)
        return self._views[tenant]

    @property
    def base_policy(self) -> str:
        """The policy whose weights the engine was started with."""
        return self._base.id

    def set_served(self, policies: Iterable[str]) -> None:
        self._change(served=frozenset(policies))

    def _change(self, **fields: Any) -> None:
        self._snapshot, self._views = replace(self._snapshot, **fields), {}

    async def refresh(self) -> Snapshot:
        """Read Redis now. Raises StoreUnavailable and leaves the snapshot as it was."""
        async with self._refreshing:
            with translated():
                if not self._is_seeded:
                    await self._seed()
                    self._is_seeded = True
                found = await self._read()
                if not found["registry"]:
                    # Redis was lost under this process: best-of-n goes on, and `bonsai rebuild` brings the rest.
                    await self._seed()
                    found = await self._read()
            self._change(**found, read_at=time())
            return self._snapshot

    async def policy(self, policy_id: str, tenant: str = DEFAULT_TENANT) -> PolicyRecord:
        """One policy; Redis is asked when the snapshot does not have it yet. Raises PolicyNotFound, Unavailable for one
        of another version."""
        if policy_id not in self._snapshot.policies:
            await self.refresh()
        if policy_id not in self._snapshot.policies:
            await self._require_known_version(policy_id)
        return self.of(tenant).policy(policy_id)

    async def _require_known_version(self, policy_id: str) -> None:
        """A snapshot passes over records of another version, which are there all the same."""
        with translated():
            row = cast("str | None", await self._redis.hget(policy_key(policy_id), "record"))
        if row is not None:
            read_record(PolicyRecord, row)

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            try:
                await self.refresh()
            except (StoreUnavailable, StoreFull) as error:
                log.warning("catalogue is %.0f s old: %s", self._snapshot.age(time()), error.message)
            await asyncio.sleep(REFRESH_SECONDS)

    async def _seed(self) -> None:
        """Only where absent: what an operator has changed stays."""
        base, route = self._base, self._default_route
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hsetnx(policy_key(base.id), "record", base.model_dump_json())
            pipe.hsetnx(policy_key(base.id), "version", "1")
            pipe.zadd(POLICIES_INDEX, {base.id: base.created_at}, nx=True)
            pipe.set(route_key(route.name), route.model_dump_json(), nx=True)
            pipe.sadd(ROUTES_INDEX, of_tenant(route.tenant, route.name))
            pipe.set(REGISTRY, f"reg_{uuid7().hex}", nx=True)
            crash_point("seed.asked")
            await pipe.execute()
            crash_point("seed.committed")

    async def _read(self) -> dict[str, Any]:
        """The snapshot's fields that Redis tells."""
        routes = sorted(cast(set[str], await self._redis.smembers(ROUTES_INDEX)))
        policies = cast(list[str], await self._redis.zrange(POLICIES_INDEX, 0, -1))
        async with self._redis.pipeline(transaction=True) as pipe:
            for name in routes:
                pipe.get(route_key(name))
                pipe.get(experiment_key(name))
            for policy_id in policies:
                pipe.hget(policy_key(policy_id), "record")
            pipe.hgetall(TAGS)
            pipe.zrangebyscore(POLICIES_DELETED, time() - DELETED_SECONDS, "+inf")
            pipe.get(REGISTRY)
            *rows, tags, deleted, registry = await pipe.execute()
        split = 2 * len(routes)
        return {
            "routes": self._parse(Route, routes, rows[0:split:2]),
            "experiments": self._parse(Experiment, routes, rows[1:split:2]),
            "policies": self._parse(PolicyRecord, policies, rows[split:]),
            "tags": tags,
            "deleted": frozenset(deleted),
            "registry": registry or "",
        }

    def _parse(self, kind: type[RecordT], names: Iterable[str], rows: Iterable[str | None]) -> dict[str, RecordT]:
        """A record is parsed again only when its text changed: a refresh must not hold up the event loop."""
        records: dict[str, RecordT] = {}
        for name, row in zip(names, rows, strict=True):
            if row is None:
                continue
            known = self._parsed.get(f"{kind.__name__}:{name}")
            if known is None or known[0] != row:
                try:
                    known = (row, kind.model_validate_json(row))
                except ValidationError as error:
                    # One record of another version must not stop the refresh of all the others.
                    log.error("%s %s is unreadable: %d faults", kind.__name__, name, error.error_count())
                    continue
                self._parsed[f"{kind.__name__}:{name}"] = known
            records[name] = cast(RecordT, known[1])
        return records

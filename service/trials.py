"""Shadow and canary: a policy tries itself on a share of a route's requests before it is live.

Owns: starting, widening and ending a trial, which requests are among its share, what its sums and the alarm say. Does
not own: promotion to live (policies.py), drawing and logging what a shadow says (shadows.py), the sums themselves (the
ledger's drainer, as those of an experiment).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from time import time
from typing import Any, Final, Literal, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from uuid_utils import uuid7

from bon_algos.contracts import (
    ROUTES_INDEX,
    Arm,
    Experiment,
    ExperimentArm,
    Route,
    Trial,
    experiment_key,
    experiment_stats_key,
    policy_key,
)
from service.access import GATEWAY, Caller
from service.audit import AuditChain
from service.errors import Conflict, InvalidField
from service.experiments import arm_object
from service.idempotency import Idempotency, once
from service.preconditions import ANY, Precondition
from service.record_reading import read_record
from service.registry import moved, named, read_policy, require_fit, settled, watched_routes, write_move
from service.store import transact, translated

TrialStage = Literal["shadow", "canary"]
CANARY_MOST: Final = 0.5
"""Of a route's requests: whoever wants more wants it live, or an experiment."""


class Trials:
    """The trials of one Redis, at most one of each stage on a route."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def start(
        self,
        policy_id: str,
        route_name: str,
        stage: TrialStage,
        share: float,
        served: frozenset[str],
        idempotency: Idempotency | None = None,
        by: Caller = GATEWAY,
        *,
        precondition: Precondition = ANY,
    ) -> Route:
        """Try a policy on a route, or on another share than before. Raises Conflict with what to do about it."""
        if stage == "canary" and share > CANARY_MOST:
            raise InvalidField(f"share must be at most {CANARY_MOST} for a canary", param="share")

        async def change(pipe: Pipeline) -> Route:
            routes = await watched_routes(pipe, by.tenant)
            route = named(routes, route_name)
            policy = await read_policy(pipe, policy_id, by.tenant)
            precondition.require(policy.version)
            require_fit(policy, route, served)
            await _require_free(pipe, route, stage, policy_id)
            started = _started(route, stage, policy_id, share)
            return await _moved(pipe, routes, route, started, f"{stage}_start", policy_id, by)

        return await transact(self._redis, [ROUTES_INDEX, policy_key(policy_id)], once(idempotency, Route, change))

    async def stop(
        self,
        policy_id: str,
        route_name: str,
        by: Caller = GATEWAY,
        *,
        idempotency: Idempotency | None = None,
        precondition: Precondition = ANY,
    ) -> Route:
        """End a policy's trial on a route. Raises Conflict where it has none."""

        async def change(pipe: Pipeline) -> Route:
            routes = await watched_routes(pipe, by.tenant)
            route = named(routes, route_name)
            precondition.require((await read_policy(pipe, policy_id, by.tenant)).version)
            stage = route.stage_of(policy_id)
            if stage == "live":
                raise Conflict("the policy is live on this route: roll the route back instead", code="policy_is_live")
            if stage is None:
                raise Conflict("the policy is neither shadow nor canary of this route", code="no_trial")
            stopped = route.model_copy(update={stage: None})
            return await _moved(pipe, routes, route, stopped, f"{stage}_stop", policy_id, by)

        return await transact(self._redis, [ROUTES_INDEX, policy_key(policy_id)], once(idempotency, Route, change))

    async def describe(self, route: Route, told: Mapping[str, int]) -> dict[str, Any]:
        """What the trials of a route have shown so far, as an experiment's arms. told: what became of the shadow's
        requests in this process."""
        shadow = await self._shown(route.shadow)
        return {
            "object": "bonsai.trials",
            "route": route.name,
            "canary": await self._shown(route.canary),
            "shadow": None if shadow is None else {**shadow, "here": told},
        }

    async def _shown(self, trial: Trial | None) -> dict[str, Any] | None:
        if trial is None:
            return None
        with translated():
            sums = cast("dict[str, str]", await self._redis.hgetall(experiment_stats_key(trial.id)))
        return trial_object(trial, sums)


def trial_object(trial: Trial, sums: Mapping[str, str]) -> dict[str, Any]:
    """A trial with its sums, and whether it is one in name only: it was given requests and answered none."""
    entry = ExperimentArm(arm=Arm(policy=trial.policy, n=1), weight=max(1, round(10_000 * trial.share)))
    shown = {name: value for name, value in arm_object(entry, sums).items() if name not in ("forced", "weight", "n")}
    return {
        "id": trial.id,
        "share": trial.share,
        "since": trial.since,
        **shown,
        "is_silent": shown["exposures"] >= SILENT_AFTER and shown["answers"] == 0,
    }


SILENT_AFTER: Final = 10
"""Requests that were given to a trial, none of which it answered: something is broken that no error shows."""


async def _require_free(pipe: Pipeline, route: Route, stage: TrialStage, policy_id: str) -> None:
    held = route.canary if stage == "canary" else route.shadow
    if held is not None and held.policy != policy_id:
        raise Conflict(
            f"another policy is the {stage} of this route: withdraw it first",
            code="stage_taken",
            facts={"policy": held.policy},
        )
    if route.live_policy == policy_id:
        raise Conflict("the policy is live on this route already", code="already_live")
    key = experiment_key(route.name, route.tenant)
    await pipe.watch(key)
    row = cast("str | None", await pipe.get(key))
    if stage == "canary" and row is not None and read_record(Experiment, row).stopped_at is None:
        raise Conflict("an experiment runs on the route, which decides who answers: stop it first", code="route_in_use")


def _started(route: Route, stage: TrialStage, policy_id: str, share: float) -> Route:
    """With a share that grows or shrinks the trial stays the same one: who was among it before stays."""
    held = route.canary if stage == "canary" else route.shadow
    other: TrialStage = "shadow" if stage == "canary" else "canary"
    trial = Trial(
        id=f"trial_{uuid7().hex}" if held is None else held.id,
        policy=policy_id,
        share=share,
        salt=secrets.token_hex(16) if held is None else held.salt,
        since=time() if held is None else held.since,
    )
    update: dict[str, Trial | None] = {stage: trial}
    if route.stage_of(policy_id) == other:
        update[other] = None
    return route.model_copy(update=update)


async def _moved(
    pipe: Pipeline,
    routes: Mapping[str, Route],
    before: Route,
    after: Route,
    event: str,
    policy_id: str,
    by: Caller,
) -> Route:
    states = await settled(pipe, routes, [after])
    audit = await AuditChain.open(pipe)
    pipe.multi()  # type: ignore[no-untyped-call]
    write_move(pipe, before, after, states)
    shares = {"canary": _share(after.canary), "shadow": _share(after.shadow)}
    audit.append(pipe, event, by, policy=policy_id, data=moved(before, after, states, shares=shares))
    return after


def _share(trial: Trial | None) -> float | None:
    return None if trial is None else trial.share

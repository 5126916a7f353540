"""`/policies`: what the registry knows, and promotion."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from bon_algos.contracts import Record, RouteName
from service.access import caller_of, needs
from service.json_body import read_model
from service.policies import policy_object
from service.routes.admin import control_of, cut, idempotency_of, page_of, snapshot_of
from service.routing import route_object

router = APIRouter(prefix="/policies")


class PromoteRequest(Record):
    """Body of `POST /policies/{id}/promote`."""

    route: RouteName = "default"
    override_reason: str = Field("", max_length=500)
    """Why the policy goes live without an experiment's verdict; stands in the audit. Without one: 409."""


@router.get("", dependencies=[needs("read")])
async def policies(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    snapshot = snapshot_of(request)
    newest_first = sorted(snapshot.policies.values(), key=lambda policy: (policy.created_at, policy.id), reverse=True)
    rows = [policy_object(policy, snapshot.routes.values(), snapshot.served) for policy in newest_first]
    return cut(rows, limit, after)


@router.get("/{policy_id}", dependencies=[needs("read")])
async def policy(request: Request, policy_id: str) -> JSONResponse:
    found = await control_of(request).catalogue.policy(policy_id, caller_of(request).tenant)
    snapshot = snapshot_of(request)
    return JSONResponse(policy_object(found, snapshot.routes.values(), snapshot.served))


@router.post("/{policy_id}/promote", dependencies=[needs("move_traffic")])
async def promote(request: Request, policy_id: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    asked = await read_model(request, PromoteRequest, control.max_body_bytes)
    caller.require_route(asked.route)
    route = await control.policies.promote(
        policy_id,
        asked.route,
        asked.override_reason,
        control.catalogue.snapshot.served,
        idempotency_of(request, asked.model_dump_json()),
        caller,
    )
    await control.catalogue.refresh()
    return JSONResponse(route_object(route, snapshot_of(request)))

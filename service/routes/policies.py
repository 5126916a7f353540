"""`/policies`: what the registry knows, and what may become of a policy. A tag may stand for any policy's id."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, get_args

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import Field

from bon_algos.contracts import PolicyId, PolicyRecord, PolicyState, Record, Route, RouteName, Stage
from service.access import caller_of, needs
from service.catalogue import Snapshot
from service.errors import InvalidField
from service.export import archive_of
from service.json_body import query_parameters, read_model
from service.lineage import FORMS, MEDIA_TYPES, dot, lineage_object, lineage_of, mermaid
from service.policies import PolicyChange, Replaces, policy_object
from service.preconditions import Precondition, etag
from service.registration import RegistrationRequest
from service.routes.admin import DEFAULT_LIMIT, MAX_LIMIT, control_of, count_of, cut, idempotency_of, snapshot_of
from service.routing import route_object
from service.tags import named_policy

BASE_PATTERN: Final = r"^[A-Za-z0-9/][A-Za-z0-9._/-]{0,254}$"
"""What names a base model: an id of the Hugging Face hub, or a directory."""
router = APIRouter(prefix="/policies")


class PromoteRequest(Record):
    """Body of `POST /policies/{id}/promote`."""

    route: RouteName = "default"
    stage: Stage = "live"
    share: float | None = Field(None, gt=0, le=1)
    """Of the route's requests, for a shadow or a canary (at most a half)."""
    override_reason: str = Field("", max_length=500)
    """Why the policy goes live without an experiment's verdict; stands in the audit. Without one: 409."""
    replaces: PolicyId | None = None
    """The policy that is live now, null for none: 409 where another one is. Left out: whichever it is."""


class WithdrawRequest(Record):
    """Body of `POST /policies/{id}/withdraw`."""

    route: RouteName = "default"


@router.get("", dependencies=[needs("read")])
async def policies(request: Request) -> JSONResponse:
    query = query_parameters(request, ("limit", "after", "state", "tag", "route", "parent"))
    limit = count_of(query, "limit", DEFAULT_LIMIT, at_most=MAX_LIMIT)
    snapshot = snapshot_of(request)
    newest_first = sorted(_chosen(snapshot, query), key=lambda policy: (policy.created_at, policy.id), reverse=True)
    return cut([_object(policy, snapshot) for policy in newest_first], limit, query.get("after"))


@router.post("", dependencies=[needs("move_traffic")])
async def register(request: Request) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    asked = await read_model(request, RegistrationRequest, control.max_body_bytes)
    once = idempotency_of(request, asked.model_dump_json())
    registered = await control.registration.register(asked.digest, caller, idempotency=once)
    await control.catalogue.refresh()
    headers = {"Location": f"/policies/{registered.id}", "ETag": etag(registered.version)}
    return JSONResponse(_object(registered, snapshot_of(request)), 201, headers=headers)


@router.get("/{policy_id}", dependencies=[needs("read")])
async def policy(request: Request, policy_id: str) -> JSONResponse:
    found = await _found(request, policy_id)
    return _shown(request, found)


@router.patch("/{policy_id}", dependencies=[needs("move_traffic")])
async def amend(request: Request, policy_id: str) -> JSONResponse:
    control = control_of(request)
    asked = await read_model(request, PolicyChange, control.max_body_bytes)
    named = (await own_policy(request, policy_id)).id
    amended = await control.policies.amend(named, asked, caller_of(request), precondition=Precondition.of(request))
    await control.catalogue.refresh()
    return _shown(request, amended)


@router.delete("/{policy_id}", dependencies=[needs("move_traffic")])
async def delete(request: Request, policy_id: str) -> Response:
    control = control_of(request)
    named = (await own_policy(request, policy_id)).id
    await control.deletion.delete(named, caller_of(request), precondition=Precondition.of(request))
    await control.catalogue.refresh()
    return Response(status_code=204)


@router.post("/{policy_id}/promote", dependencies=[needs("move_traffic")])
async def promote(request: Request, policy_id: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    asked = await read_model(request, PromoteRequest, control.max_body_bytes)
    _require_share(asked)
    caller.require_route(asked.route)
    caller.require_servable(await _found(request, policy_id))
    named = named_policy(policy_id, snapshot_of(request))
    served, precondition = control.catalogue.snapshot.served, Precondition.of(request)
    once = idempotency_of(request, asked.model_dump_json(exclude_unset=True))
    if asked.stage == "live":
        replaces = Replaces(policy=asked.replaces) if "replaces" in asked.model_fields_set else None
        reason = asked.override_reason
        route = await control.policies.promote(
            named, asked.route, reason, served, once, caller, precondition=precondition, replaces=replaces
        )
    else:
        route = await control.trials.start(
            named, asked.route, asked.stage, asked.share or 0.0, served, once, caller, precondition=precondition
        )
    return await _moved(request, route)


@router.post("/{policy_id}/withdraw", dependencies=[needs("move_traffic")])
async def withdraw(request: Request, policy_id: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    asked = await read_model(request, WithdrawRequest, control.max_body_bytes)
    caller.require_route(asked.route)
    named = named_policy(policy_id, snapshot_of(request))
    once, precondition = idempotency_of(request, asked.model_dump_json()), Precondition.of(request)
    route = await control.trials.stop(named, asked.route, caller, idempotency=once, precondition=precondition)
    return await _moved(request, route)


@router.post("/{policy_id}/retire", dependencies=[needs("move_traffic")])
async def retire(request: Request, policy_id: str) -> JSONResponse:
    control, once, precondition = control_of(request), idempotency_of(request), Precondition.of(request)
    named = (await own_policy(request, policy_id)).id
    retired = await control.policies.retire(named, caller_of(request), idempotency=once, precondition=precondition)
    await control.catalogue.refresh()
    return _shown(request, retired)


@router.get("/{policy_id}/lineage", dependencies=[needs("read")])
async def lineage(request: Request, policy_id: str) -> Response:
    form = query_parameters(request, ("format",)).get("format", "json")
    if form not in FORMS:
        raise InvalidField(f"format must be one of {', '.join(FORMS)}", param="format")
    found = await _found(request, policy_id)
    graph = lineage_of(found.id, snapshot_of(request).policies)
    if form == "json":
        return JSONResponse(lineage_object(graph))
    is_mermaid = form == "mermaid"
    text = mermaid(graph) if is_mermaid else dot(graph)
    return PlainTextResponse(text, media_type=MEDIA_TYPES["mermaid" if is_mermaid else "dot"])


@router.get("/{policy_id}/export", dependencies=[needs("read_content")])
async def export(request: Request, policy_id: str) -> Response:
    base = query_parameters(request, ("base",)).get("base")
    if base is not None and not re.fullmatch(BASE_PATTERN, base):
        raise InvalidField("base must be an id of the Hugging Face hub or a directory", param="base")
    found = await own_policy(request, policy_id)
    manifest, directory = await control_of(request).registration.checked(found)
    archive = archive_of(found, directory, base or manifest.base_policy_id)
    headers = {"Content-Length": str(archive.num_bytes), "ETag": etag(manifest.digest)}
    headers["Content-Disposition"] = f'attachment; filename="{found.id}.tar"'
    return StreamingResponse(archive.chunks(), media_type="application/x-tar", headers=headers)


async def own_policy(request: Request, name: str) -> PolicyRecord:
    """That the key may do anything with. Raises PolicyNotFound, Forbidden."""
    found = await _found(request, name)
    caller_of(request).require_policy(found)
    return found


async def _found(request: Request, name: str) -> PolicyRecord:
    named = named_policy(name, snapshot_of(request))
    return await control_of(request).catalogue.policy(named, caller_of(request).tenant)


def _shown(request: Request, policy: PolicyRecord) -> JSONResponse:
    return JSONResponse(_object(policy, snapshot_of(request)), headers={"ETag": etag(policy.version)})


def _object(policy: PolicyRecord, snapshot: Snapshot) -> dict[str, object]:
    return policy_object(policy, snapshot.routes.values(), snapshot.served, snapshot.tags)


async def _moved(request: Request, route: Route) -> JSONResponse:
    await control_of(request).catalogue.refresh()
    return JSONResponse(route_object(route, snapshot_of(request)))


def _require_share(asked: PromoteRequest) -> None:
    if (asked.stage == "live") != (asked.share is None):
        raise InvalidField("share belongs to the stages shadow and canary, which need it", param="share")


def _chosen(snapshot: Snapshot, query: Mapping[str, str]) -> Iterator[PolicyRecord]:
    """The policies that pass every filter. Raises InvalidField."""
    state, tag, route, parent = (query.get(name) for name in ("state", "tag", "route", "parent"))
    if state is not None and state not in get_args(PolicyState):
        raise InvalidField(f"state must be one of {', '.join(get_args(PolicyState))}", param="state")
    tagged = None if tag is None else snapshot.tags.get(tag)
    of_route = None if route is None else snapshot.route(route)
    made_from = None if parent is None else named_policy(parent, snapshot)
    for policy in snapshot.policies.values():
        if (
            (state is None or policy.state == state)
            and (tag is None or policy.id == tagged)
            and (of_route is None or policy.id in (of_route.base_policy, *of_route.previous_policies)
                 or of_route.stage_of(policy.id) is not None)
            and (made_from is None or made_from in policy.parents)
        ):  # fmt: skip
            yield policy

"""`/routes`: create, change, read, delete, roll back, the n-curve of what they served and what was learned from it."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from bon_algos.contracts import Route
from service.access import caller_of, needs
from service.curve import DEFAULT_GROUPS, DEFAULT_LOSS, MOST_GROUPS, curve_object
from service.json_body import query_parameters, read_model
from service.learned import learned_object
from service.preconditions import Precondition, etag, version_of
from service.routes.admin import (
    checked_name,
    control_of,
    count_of,
    cut,
    idempotency_of,
    page_of,
    share_of,
    snapshot_of,
)
from service.routing import RouteRequest, route_object
from service.serving import Serving

router = APIRouter(prefix="/routes")


@router.get("", dependencies=[needs("read")])
async def routes(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    snapshot, caller = snapshot_of(request), caller_of(request)
    names = sorted(name for name in snapshot.routes if caller.may_use(name))
    return cut([route_object(snapshot.routes[name], snapshot) for name in names], limit, after)


@router.get("/{route}", dependencies=[needs("read")])
async def route(request: Request, route: str) -> JSONResponse:
    return _shown(request, _seen(request, route))


@router.get("/{route}/curve", dependencies=[needs("read")])
async def curve(request: Request, route: str) -> JSONResponse:
    control, query = control_of(request), query_parameters(request, ("groups", "n", "loss"))
    found = _seen(request, route)
    num_groups = count_of(query, "groups", DEFAULT_GROUPS, at_most=MOST_GROUPS)
    n = count_of(query, "n", 2, at_least=2, at_most=found.n_cap) if "n" in query else None
    loss = share_of(query, "loss", DEFAULT_LOSS)
    return JSONResponse(curve_object(found, await control.curves.of(found, num_groups=num_groups, n=n), loss))


@router.get("/{route}/strategy", dependencies=[needs("read")])
async def strategy(request: Request, route: str) -> JSONResponse:
    found = _seen(request, route)
    return JSONResponse(learned_object(found, control_of(request).learned.of(found)))


@router.get("/{route}/trials", dependencies=[needs("read")])
async def trials(request: Request, route: str) -> JSONResponse:
    found = _seen(request, route)
    told = {} if found.shadow is None else cast(Serving, request.app.state.serving).shadows.told(found.shadow.id)
    return JSONResponse(await control_of(request).trials.describe(found, told))


@router.put("/{route}", dependencies=[needs("move_traffic")])
async def put(request: Request, route: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    asked = await read_model(request, RouteRequest, control.max_body_bytes)
    caller.require_route(checked_name(route))
    settled, is_new = await control.routes.put(
        route, asked, control.catalogue.base_policy, caller, precondition=Precondition.of(request)
    )
    await control.catalogue.refresh()
    return _shown(request, settled, 201 if is_new else 200)


@router.delete("/{route}", dependencies=[needs("move_traffic")])
async def delete(request: Request, route: str) -> Response:
    control, caller = control_of(request), caller_of(request)
    caller.require_route(route)
    await control.routes.delete(route, caller, precondition=Precondition.of(request))
    await control.catalogue.refresh()
    return Response(status_code=204)


@router.post("/{route}/rollback", dependencies=[needs("move_traffic")])
async def roll_back(request: Request, route: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    caller.require_route(route)
    precondition = Precondition.of(request)
    restored = await control.policies.roll_back(route, idempotency_of(request), caller, precondition=precondition)
    await control.catalogue.refresh()
    return _shown(request, restored)


def _shown(request: Request, route: Route, status: int = 200) -> JSONResponse:
    shown = route_object(route, snapshot_of(request))
    return JSONResponse(shown, status, headers={"ETag": etag(version_of(route))})


def _seen(request: Request, name: str) -> Route:
    """The route. Raises RouteNotFound, Forbidden."""
    found = snapshot_of(request).route(name)
    caller_of(request).require_route(found.name)
    return found

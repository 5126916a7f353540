"""`/routes`: create, change, read, delete, roll back, the n-curve of what they served and what was learned from it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.curve import DEFAULT_GROUPS, DEFAULT_LOSS, MOST_GROUPS, curve_object
from service.json_body import query_parameters, read_model
from service.learned import learned_object
from service.routes.admin import checked_name, control_of, count_of, cut, idempotency_of, page_of, share_of
from service.routing import RouteRequest, route_object

router = APIRouter(prefix="/routes")


@router.get("")
async def routes(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    snapshot = control_of(request).catalogue.snapshot
    return cut([route_object(snapshot.routes[name], snapshot) for name in sorted(snapshot.routes)], limit, after)


@router.get("/{route}")
async def route(request: Request, route: str) -> JSONResponse:
    snapshot = control_of(request).catalogue.snapshot
    return JSONResponse(route_object(snapshot.route(route), snapshot))


@router.get("/{route}/curve")
async def curve(request: Request, route: str) -> JSONResponse:
    control, query = control_of(request), query_parameters(request, ("groups", "n", "loss"))
    found = control.catalogue.snapshot.route(route)
    num_groups = count_of(query, "groups", DEFAULT_GROUPS, at_most=MOST_GROUPS)
    n = count_of(query, "n", 2, at_least=2, at_most=found.n_cap) if "n" in query else None
    loss = share_of(query, "loss", DEFAULT_LOSS)
    return JSONResponse(curve_object(found, await control.curves.of(found, num_groups=num_groups, n=n), loss))


@router.get("/{route}/strategy")
async def strategy(request: Request, route: str) -> JSONResponse:
    control = control_of(request)
    found = control.catalogue.snapshot.route(route)
    return JSONResponse(learned_object(found, control.learned.of(route)))


@router.put("/{route}")
async def put(request: Request, route: str) -> JSONResponse:
    control = control_of(request)
    asked = await read_model(request, RouteRequest, control.max_body_bytes)
    settled, is_new = await control.routes.put(checked_name(route), asked, control.catalogue.base_policy)
    return JSONResponse(route_object(settled, await control.catalogue.refresh()), 201 if is_new else 200)


@router.delete("/{route}")
async def delete(request: Request, route: str) -> Response:
    control = control_of(request)
    await control.routes.delete(route)
    await control.catalogue.refresh()
    return Response(status_code=204)


@router.post("/{route}/rollback")
async def roll_back(request: Request, route: str) -> JSONResponse:
    control = control_of(request)
    restored = await control.policies.roll_back(route, idempotency_of(request))
    return JSONResponse(route_object(restored, await control.catalogue.refresh()))

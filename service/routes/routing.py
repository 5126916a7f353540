"""`/routes`: create, change, read, delete, roll back."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.json_body import read_model
from service.routes.admin import checked_name, control_of, cut, idempotency_of, page_of
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

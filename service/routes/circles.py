"""`/routes/{route}/circle` and `/circles`: what turns by itself, and the switch that stops it."""

from __future__ import annotations

from time import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from bon_algos.contracts import Circle, CircleSpec
from service.access import caller_of, needs
from service.circles import circle_object, circle_version, require_sense
from service.json_body import read_model
from service.preconditions import ANY, Precondition, etag
from service.routes.admin import control_of, cut, page_of, snapshot_of

router = APIRouter()


@router.get("/circles", dependencies=[needs("read")])
async def circles(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    return cut([circle_object(one, time()) for one in await _own(request)], limit, after)


@router.post("/circles/stop", dependencies=[needs("move_traffic")])
async def stop_all(request: Request) -> JSONResponse:
    """Every circle that the key is good for."""
    stopped = [await _stopped(request, one.route) for one in await _own(request)]
    return cut([circle_object(one, time()) for one in stopped], max(1, len(stopped)), None)


@router.put("/routes/{route}/circle", dependencies=[needs("move_traffic")])
async def put(request: Request, route: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    spec = await read_model(request, CircleSpec, control.max_body_bytes)
    found = snapshot_of(request).route(route)
    caller.require_route(found.name)
    require_sense(spec)
    await control.jobs.check(spec.job(found.name, 1, found.live_policy), caller.tenant)
    precondition = Precondition.of(request)
    circle, is_new = await control.circle_driver.circles.put(found.name, spec, caller, precondition=precondition)
    await control.catalogue.refresh()
    return _shown(circle, 201 if is_new else 200)


@router.get("/routes/{route}/circle", dependencies=[needs("read")])
async def circle(request: Request, route: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    caller.require_route(snapshot_of(request).route(route).name)
    return _shown(await control.circle_driver.circles.get(route, caller.tenant))


@router.post("/routes/{route}/circle/start", dependencies=[needs("move_traffic")])
async def start(request: Request, route: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    caller.require_route(snapshot_of(request).route(route).name)
    return _shown(await control.circle_driver.circles.start(route, caller, precondition=Precondition.of(request)))


@router.post("/routes/{route}/circle/stop", dependencies=[needs("move_traffic")])
async def stop(request: Request, route: str) -> JSONResponse:
    caller_of(request).require_route(snapshot_of(request).route(route).name)
    return _shown(await _stopped(request, route, Precondition.of(request)))


@router.delete("/routes/{route}/circle", dependencies=[needs("move_traffic")])
async def delete(request: Request, route: str) -> Response:
    control, caller = control_of(request), caller_of(request)
    caller.require_route(snapshot_of(request).route(route).name)
    await control.circle_driver.circles.delete(route, caller, precondition=Precondition.of(request))
    await control.catalogue.refresh()
    return Response(status_code=204)


async def _own(request: Request) -> list[Circle]:
    caller = caller_of(request)
    found = await control_of(request).circle_driver.circles.list()
    return [one for one in found if one.tenant == caller.tenant and caller.may_use(one.route)]


def _shown(circle: Circle, status: int = 200) -> JSONResponse:
    return JSONResponse(circle_object(circle, time()), status, headers={"ETag": etag(circle_version(circle))})


async def _stopped(request: Request, route: str, precondition: Precondition = ANY) -> Circle:
    """Stopped, and the turn under way ended at once: nobody waits for the next look."""
    control, caller = control_of(request), caller_of(request)
    stopped = await control.circle_driver.circles.stop(
        route, f"stopped by {caller.key_id}", caller, precondition=precondition
    )
    await control.circle_driver.step(stopped)
    await control.catalogue.refresh()
    return await control.circle_driver.circles.get(route, caller.tenant)

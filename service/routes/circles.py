"""`/routes/{route}/circle` and `/circles`: what turns by itself, and the switch that stops it."""

from __future__ import annotations

import logging
from time import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from bon_algos.contracts import Circle, CircleSpec
from service.access import caller_of, needs
from service.circles import circle_object, circle_version, require_sense
from service.errors import CircleNotFound, Unavailable
from service.json_body import read_model
from service.preconditions import Precondition, etag
from service.routes.admin import control_of, cut, idempotency_of, page_of, snapshot_of

log = logging.getLogger("bonsai.circle")
router = APIRouter()


@router.get("/circles", dependencies=[needs("read")])
async def circles(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    return cut([circle_object(one, time()) for one in await _own(request)], limit, after)


@router.post("/circles/stop", dependencies=[needs("move_traffic")])
async def stop_all(request: Request) -> JSONResponse:
    """Every circle that the key is good for."""
    control, caller = control_of(request), caller_of(request)
    routes = [one for one in await control.circle_driver.circles.routes(caller.tenant) if caller.may_use(one)]
    _require_stopped(await control.circle_driver.stop(routes, _by(request), caller))
    await control.catalogue.refresh()
    stopped = [one for one in await _own(request) if one.route in routes]
    return cut([circle_object(one, time()) for one in stopped], max(1, len(stopped)), None)


@router.put("/routes/{route}/circle", dependencies=[needs("move_traffic")])
async def put(request: Request, route: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    spec = await read_model(request, CircleSpec, control.max_body_bytes)
    found = snapshot_of(request).route(route)
    caller.require_route(found.name)
    require_sense(spec)
    await control.jobs.check(spec.job(found.name, 1, found.live_policy), caller)
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
    once, precondition = idempotency_of(request), Precondition.of(request)
    kept = control.circle_driver.circles
    return _shown(await kept.start(route, caller, idempotency=once, precondition=precondition))


@router.post("/routes/{route}/circle/stop", dependencies=[needs("move_traffic")])
async def stop(request: Request, route: str) -> JSONResponse:
    # A circle is stopped whatever has become of its route: also one that a gateway of another version wrote.
    control, caller, precondition = control_of(request), caller_of(request), Precondition.of(request)
    caller.require_route(route)
    failures = await control.circle_driver.stop([route], _by(request), caller, precondition=precondition)
    for failure in failures.values():
        raise failure
    await control.catalogue.refresh()
    return _shown(await control.circle_driver.circles.get(route, caller.tenant))


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


def _by(request: Request) -> str:
    return f"stopped by {caller_of(request).key_id}"


def _require_stopped(failures: dict[str, BaseException]) -> None:
    """Raises Unavailable where a circle could not be stopped; one that was deleted meanwhile is none."""
    left = {route: failure for route, failure in failures.items() if not isinstance(failure, CircleNotFound)}
    for route, failure in left.items():
        log.error("ALERT the circle of %s was not stopped", route, exc_info=failure)
    if left:
        raise Unavailable(
            f"not stopped: {', '.join(left)}; all others are. Ask again; one of another version, a gateway of that",
            code="circles_not_stopped",
            facts={"not_stopped": list(left)},
        )


def _shown(circle: Circle, status: int = 200) -> JSONResponse:
    return JSONResponse(circle_object(circle, time()), status, headers={"ETag": etag(circle_version(circle))})

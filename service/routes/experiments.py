"""`/experiments/{route}`: start or ramp up, watch, stop."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from bon_algos.contracts import Experiment
from service.access import caller_of, needs
from service.experiment_store import ExperimentRequest
from service.json_body import read_model
from service.preconditions import Precondition, etag, version_of
from service.routes.admin import control_of, snapshot_of

router = APIRouter(prefix="/experiments")


@router.put("/{route}", dependencies=[needs("move_traffic")])
async def put(request: Request, route: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    asked = await read_model(request, ExperimentRequest, control.max_body_bytes)
    caller.require_route(route)
    # Read now: an arm may have been registered and proven since the last refresh.
    await control.catalogue.refresh()
    experiment = await control.experiments.put(
        route, asked, snapshot_of(request), caller, precondition=Precondition.of(request)
    )
    await control.catalogue.refresh()
    return await _shown(request, experiment)


@router.get("/{route}", dependencies=[needs("read")])
async def experiment(request: Request, route: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    found = await control.experiments.get(route, caller.tenant)
    caller.require_route(route)
    return await _shown(request, found)


@router.delete("/{route}", dependencies=[needs("move_traffic")])
async def stop(request: Request, route: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    caller.require_route(route)
    stopped = await control.experiments.stop(route, caller, precondition=Precondition.of(request))
    await control.catalogue.refresh()
    return await _shown(request, stopped)


async def _shown(request: Request, experiment: Experiment) -> JSONResponse:
    shown = await control_of(request).experiments.describe(experiment)
    return JSONResponse(shown, headers={"ETag": etag(version_of(experiment))})

"""`/experiments/{route}`: start or ramp up, watch, stop."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service.experiment_store import ExperimentRequest
from service.json_body import read_model
from service.routes.admin import control_of

router = APIRouter(prefix="/experiments")


@router.put("/{route}")
async def put(request: Request, route: str) -> JSONResponse:
    control = control_of(request)
    asked = await read_model(request, ExperimentRequest, control.max_body_bytes)
    # Read now: an arm may have been registered and proven since the last refresh.
    experiment = await control.experiments.put(route, asked, await control.catalogue.refresh())
    await control.catalogue.refresh()
    return JSONResponse(await control.experiments.describe(experiment))


@router.get("/{route}")
async def experiment(request: Request, route: str) -> JSONResponse:
    control = control_of(request)
    return JSONResponse(await control.experiments.describe(await control.experiments.get(route)))


@router.delete("/{route}")
async def stop(request: Request, route: str) -> JSONResponse:
    control = control_of(request)
    stopped = await control.experiments.stop(route)
    await control.catalogue.refresh()
    return JSONResponse(await control.experiments.describe(stopped))

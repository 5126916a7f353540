"""`/distill`: submit, status, events, cancel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask

from bon_algos.contracts import JobSpec
from service.access import caller_of, needs
from service.errors import InvalidField
from service.json_body import query_parameters, read_model
from service.routes.admin import control_of, idempotency_of, list_of, page_of, snapshot_of

router = APIRouter(prefix="/distill")


@router.post("", dependencies=[needs("train")])
async def submit(request: Request) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    is_dry_run = _is_dry_run(query_parameters(request, ("dry_run",)))
    spec = await read_model(request, JobSpec, control.max_body_bytes)
    snapshot = snapshot_of(request)
    for route in (spec.route, *spec.window.routes):
        caller.require_route(snapshot.route(route).name)
    if is_dry_run:
        await control.jobs.check(spec, caller.tenant)
        return JSONResponse(await control.training.dry_runs.of(spec, caller.tenant))
    submitted = await control.jobs.submit(spec, idempotency_of(request, spec.model_dump_json()), caller.tenant)
    headers = {"Location": f"/distill/{submitted.job_id}"}
    if submitted.is_replayed:
        headers["Idempotent-Replayed"] = "true"
    # The broker is asked after the reply: it may be slow or away, and the job is recorded already.
    wake = None if submitted.is_replayed else BackgroundTask(control.dispatcher.wake, submitted.job_id)
    return JSONResponse(await _seen(request, submitted.job_id), 202, headers=headers, background=wake)


@router.get("", dependencies=[needs("read")])
async def jobs(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    caller = caller_of(request)
    rows, has_more = await control_of(request).jobs.list(limit, after, caller.tenant)
    return list_of([row for row in rows if caller.may_use(row["spec"]["route"])], has_more=has_more)


@router.get("/{job_id}", dependencies=[needs("read")])
async def job(request: Request, job_id: str) -> JSONResponse:
    return JSONResponse(await _seen(request, job_id))


@router.get("/{job_id}/events", dependencies=[needs("read")])
async def events(request: Request, job_id: str) -> JSONResponse:
    limit, after = page_of(request)
    rows, has_more = await control_of(request).jobs.events(job_id, limit, after, caller_of(request).tenant)
    await _seen(request, job_id)
    return list_of(rows, has_more=has_more)


@router.post("/{job_id}/cancel", dependencies=[needs("train")])
async def cancel(request: Request, job_id: str) -> JSONResponse:
    await _seen(request, job_id)
    return JSONResponse(await control_of(request).jobs.cancel(job_id, caller_of(request).tenant))


def _is_dry_run(query: Mapping[str, str]) -> bool:
    said = query.get("dry_run", "false")
    if said not in ("true", "false"):
        raise InvalidField("dry_run must be true or false", param="dry_run")
    return said == "true"


async def _seen(request: Request, job_id: str) -> dict[str, Any]:
    """The job. Raises JobNotFound for another tenant's, Forbidden for one of a route that the key is not good for."""
    caller = caller_of(request)
    job = await control_of(request).jobs.get(job_id, caller.tenant)
    caller.require_route(job["spec"]["route"])
    return job

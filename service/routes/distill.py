"""`/distill`: submit, status, events, cancel."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask

from bon_algos.contracts import JobSpec
from service.json_body import query_parameters, read_model
from service.routes.admin import control_of, idempotency_of, list_of, page_of

router = APIRouter(prefix="/distill")


@router.post("")
async def submit(request: Request) -> JSONResponse:
    control = control_of(request)
    query_parameters(request, ())
    spec = await read_model(request, JobSpec, control.max_body_bytes)
    control.catalogue.snapshot.route(spec.route)
    submitted = await control.jobs.submit(spec, idempotency_of(request, spec.model_dump_json()))
    headers = {"Location": f"/distill/{submitted.job_id}"}
    if submitted.is_replayed:
        headers["Idempotent-Replayed"] = "true"
    # The broker is asked after the reply: it may be slow or away, and the job is recorded already.
    wake = None if submitted.is_replayed else BackgroundTask(control.dispatcher.wake, submitted.job_id)
    return JSONResponse(await control.jobs.get(submitted.job_id), 202, headers=headers, background=wake)


@router.get("")
async def jobs(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    rows, has_more = await control_of(request).jobs.list(limit, after)
    return list_of(rows, has_more=has_more)


@router.get("/{job_id}")
async def job(request: Request, job_id: str) -> JSONResponse:
    return JSONResponse(await control_of(request).jobs.get(job_id))


@router.get("/{job_id}/events")
async def events(request: Request, job_id: str) -> JSONResponse:
    limit, after = page_of(request)
    rows, has_more = await control_of(request).jobs.events(job_id, limit, after)
    return list_of(rows, has_more=has_more)


@router.post("/{job_id}/cancel")
async def cancel(request: Request, job_id: str) -> JSONResponse:
    return JSONResponse(await control_of(request).jobs.cancel(job_id))

"""`/distill` and `/v1/fine_tuning/jobs`: one list of jobs under two names, the second one OpenAI's.

Owns: which path has which body and which reply. Does not own: jobs (jobs.py), their form (job_object.py), streams
(job_stream.py), OpenAI's body (fine_tuning_body.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask
from starlette.responses import Response

from bon_algos.contracts import JobSpec, Route
from service.access import caller_of, needs
from service.errors import InvalidField
from service.fine_tuning_body import OBJECTS, FineTuningRequest
from service.headers import LAST_EVENT_ID, REPLAYED
from service.job_scripts import Wish
from service.job_stream import EventStream
from service.json_body import parse_aside, query_parameters, read_body, read_model
from service.routes.admin import (
    DEFAULT_LIMIT,
    MAX_LIMIT,
    control_of,
    count_of,
    cut,
    idempotency_of,
    list_of,
    page_of,
    snapshot_of,
)

JOBS: Final = "/v1/fine_tuning/jobs"
EVENT_STREAM: Final = "text/event-stream"
router = APIRouter()


@router.post("/distill", dependencies=[needs("train")])
async def submit(request: Request) -> JSONResponse:
    is_dry_run = _is_dry_run(query_parameters(request, ("dry_run",)))
    spec = await read_model(request, JobSpec, control_of(request).max_body_bytes)
    return await (_told(request, spec) if is_dry_run else _submitted(request, spec, 202))


@router.post(JOBS, dependencies=[needs("train")])
async def create(request: Request) -> JSONResponse:
    """As OpenAI's clients ask, who write null for what was not said."""
    is_dry_run = _is_dry_run(query_parameters(request, ("dry_run",)))
    body = await read_body(request, control_of(request).max_body_bytes)
    asked = await parse_aside(body, FineTuningRequest, null_means_itself_in=OBJECTS)
    spec = asked.spec(snapshot_of(request))
    return await (_told(request, spec) if is_dry_run else _submitted(request, spec, 200))


async def _told(request: Request, spec: JobSpec) -> JSONResponse:
    """What a job would learn from, which is not submitted: a key is looked at and not used up."""
    idempotency_of(request, "")
    control, caller = control_of(request), caller_of(request)
    _route_for(request, spec)
    await control.jobs.check(spec, caller)
    return JSONResponse(await control.training.dry_runs.of(spec, caller.tenant))


async def _submitted(request: Request, spec: JobSpec, status: int) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    route = _route_for(request, spec)
    idempotency = idempotency_of(request, spec.model_dump_json())
    submitted = await control.jobs.submit(spec, idempotency, caller, model=route.base_policy)
    await control.job_records.write_promptly(submitted.job_id)
    headers = {"Location": f"{JOBS}/{submitted.job_id}"}
    if submitted.is_replayed:
        headers[REPLAYED] = "true"
    # The broker is asked after the reply: it may be slow or away, and the job is recorded already.
    wake = None if submitted.is_replayed else BackgroundTask(control.dispatcher.wake, submitted.job_id)
    return JSONResponse(await _seen(request, submitted.job_id), status, headers=headers, background=wake)


@router.get("/distill", dependencies=[needs("read")])
@router.get(JOBS, dependencies=[needs("read")])
async def jobs(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    caller = caller_of(request)
    rows, has_more = await control_of(request).jobs.list(limit, after, caller.tenant)
    return list_of([row for row in rows if caller.may_use(_route_of(row))], has_more=has_more)


@router.get("/distill/{job_id}", dependencies=[needs("read")])
@router.get(JOBS + "/{job_id}", dependencies=[needs("read")])
async def job(request: Request, job_id: str) -> JSONResponse:
    query_parameters(request, ())
    return JSONResponse(await _seen(request, job_id))


@router.get("/distill/{job_id}/events", dependencies=[needs("read")])
@router.get(JOBS + "/{job_id}/events", dependencies=[needs("read")])
async def events(request: Request, job_id: str) -> Response:
    """A page, or all that there is and will be as a stream."""
    query = query_parameters(request, ("limit", "after", "stream"))
    await _seen(request, job_id)
    if _wants_stream(request, query.get("stream")):
        if "limit" in query:
            raise InvalidField("a stream has no limit: leave limit out", param="limit")
        return await _stream(request, job_id, request.headers.get(LAST_EVENT_ID) or query.get("after"))
    limit = count_of(query, "limit", DEFAULT_LIMIT, at_most=MAX_LIMIT)
    tenant = caller_of(request).tenant
    rows, has_more = await control_of(request).jobs.events(job_id, limit, query.get("after"), tenant)
    return list_of(rows, has_more=has_more)


def _wants_stream(request: Request, said: str | None) -> bool:
    if said not in (None, "true", "false"):
        raise InvalidField("stream must be true or false", param="stream")
    return said == "true" or (said is None and EVENT_STREAM in request.headers.get("accept", ""))


async def _stream(request: Request, job_id: str, after: str | None) -> Response:
    control, caller = control_of(request), caller_of(request)
    start = await control.jobs.stream_start(job_id, after, caller.tenant)
    if start is None:
        return Response(status_code=204)  # At which a browser's EventSource stops coming again.
    with ExitStack() as place:
        place.enter_context(control.streams.place(caller.key_id))
        draining = request.app.state.draining
        told = control.streams.follow(job_id, start, lambda: draining.has_begun, request.state.request_id)
        return EventStream(told, place.pop_all().close)


@router.get("/distill/{job_id}/checkpoints", dependencies=[needs("read")])
@router.get(JOBS + "/{job_id}/checkpoints", dependencies=[needs("read")])
async def checkpoints(request: Request, job_id: str) -> JSONResponse:
    limit, after = page_of(request)
    await _seen(request, job_id)
    return cut(await control_of(request).jobs.checkpoints(job_id, caller_of(request).tenant), limit, after)


@router.post("/distill/{job_id}/pause", dependencies=[needs("train")])
@router.post(JOBS + "/{job_id}/pause", dependencies=[needs("train")])
async def pause(request: Request, job_id: str) -> JSONResponse:
    return await _granted(request, "pause", job_id)


@router.post("/distill/{job_id}/resume", dependencies=[needs("train")])
@router.post(JOBS + "/{job_id}/resume", dependencies=[needs("train")])
async def resume(request: Request, job_id: str) -> JSONResponse:
    return await _granted(request, "resume", job_id)


@router.post("/distill/{job_id}/cancel", dependencies=[needs("train")])
@router.post(JOBS + "/{job_id}/cancel", dependencies=[needs("train")])
async def cancel(request: Request, job_id: str) -> JSONResponse:
    return await _granted(request, "cancel", job_id)


async def _granted(request: Request, wish: Wish, job_id: str) -> JSONResponse:
    control = control_of(request)
    query_parameters(request, ())
    await _seen(request, job_id)
    granted = await control.jobs.grant(wish, job_id, caller_of(request), idempotency_of(request))
    await control.job_records.write_promptly(job_id)
    wake = BackgroundTask(control.dispatcher.wake, job_id) if granted["status"] == "queued" else None
    return JSONResponse(granted, background=wake)


def _route_for(request: Request, spec: JobSpec) -> Route:
    """Where the policy is to serve. Raises RouteNotFound, or Forbidden for one that the key is not good for; so for
    those that the window reads."""
    caller, snapshot = caller_of(request), snapshot_of(request)
    routes = [snapshot.route(name) for name in (spec.route, *spec.window.routes)]
    for route in routes:
        caller.require_route(route.name)
    return routes[0]


def _is_dry_run(query: Mapping[str, str]) -> bool:
    said = query.get("dry_run", "false")
    if said not in ("true", "false"):
        raise InvalidField("dry_run must be true or false", param="dry_run")
    return said == "true"


async def _seen(request: Request, job_id: str) -> dict[str, Any]:
    """The job. Raises JobNotFound for another tenant's, Forbidden for one of a route that the key is not good for."""
    caller = caller_of(request)
    job = await control_of(request).jobs.get(job_id, caller.tenant)
    caller.require_route(_route_of(job))
    return job


def _route_of(job: dict[str, Any]) -> str:
    return str(job["bonsai"]["spec"]["route"])

"""`/v1/webhooks`: make, list, change, try, rotate the secret of, delete; and what became of the attempts."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from service.access import Caller, caller_of, needs
from service.errors import Forbidden, InvalidField
from service.idempotency import HEADER
from service.json_body import query_parameters, read_model
from service.routes.admin import control_of, cut, list_of, page_of
from service.webhook_record import WebhookChange, WebhookRequest

PREFIX = "/v1/webhooks"
router = APIRouter(prefix=PREFIX, dependencies=[needs("manage_webhooks")])


@router.post("")
async def create(request: Request) -> JSONResponse:
    """With `rotate` the one reply that holds a secret."""
    control, caller = control_of(request), _caller(request)
    query_parameters(request, ())
    _require_no_replay(request)
    asked = await read_model(request, WebhookRequest, control.max_body_bytes)
    webhook, secret = await control.webhooks.create(asked, caller)
    return JSONResponse({**webhook, "secret": secret}, 201, headers={"Location": f"{PREFIX}/{webhook['id']}"})


@router.get("")
async def webhooks(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    return cut(await control_of(request).webhooks.all(_caller(request).tenant), limit, after)


@router.get("/{webhook_id}")
async def webhook(request: Request, webhook_id: str) -> JSONResponse:
    query_parameters(request, ())
    return JSONResponse(await control_of(request).webhooks.get(webhook_id, _caller(request).tenant))


@router.patch("/{webhook_id}")
async def change(request: Request, webhook_id: str) -> JSONResponse:
    control, caller = control_of(request), _caller(request)
    query_parameters(request, ())
    asked = await read_model(request, WebhookChange, control.max_body_bytes)
    return JSONResponse(await control.webhooks.change(webhook_id, asked, caller))


@router.delete("/{webhook_id}")
async def delete(request: Request, webhook_id: str) -> Response:
    query_parameters(request, ())
    await control_of(request).webhooks.delete(webhook_id, _caller(request))
    return Response(status_code=204)


@router.post("/{webhook_id}/test")
async def test(request: Request, webhook_id: str) -> JSONResponse:
    query_parameters(request, ())
    event_id = await control_of(request).webhooks.test(webhook_id, _caller(request))
    return JSONResponse({"object": "bonsai.webhook.test", "webhook": webhook_id, "event": event_id}, 202)


@router.post("/{webhook_id}/rotate")
async def rotate(request: Request, webhook_id: str) -> JSONResponse:
    query_parameters(request, ())
    _require_no_replay(request)
    webhook, secret = await control_of(request).webhooks.rotate(webhook_id, _caller(request))
    return JSONResponse({**webhook, "secret": secret})


@router.get("/{webhook_id}/deliveries")
async def deliveries(request: Request, webhook_id: str) -> JSONResponse:
    """Attempts, the newest first."""
    limit, after = page_of(request)
    rows, has_more = await control_of(request).webhooks.attempts(webhook_id, _caller(request).tenant, limit, after)
    return list_of(rows, has_more=has_more)


def _caller(request: Request) -> Caller:
    """Raises Forbidden for a key that is good for some routes alone: events are of all."""
    caller = caller_of(request)
    if caller.routes is not None:
        raise Forbidden("a webhook tells of all routes: this needs a key that is good for all", code="route_forbidden")
    return caller


def _require_no_replay(request: Request) -> None:
    if HEADER in request.headers:
        raise InvalidField(f"a secret is shown once and cannot be replayed: leave {HEADER} out", param=HEADER)

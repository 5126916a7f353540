"""`/v1/webhook_endpoints`: make, list, change, test, rotate the secret of, delete, as OpenAI's clients have it; and
what became of the attempts."""

from __future__ import annotations

from typing import Final, get_args

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service.access import Caller, caller_of, needs
from service.errors import Forbidden, InvalidField
from service.headers import IDEMPOTENCY_KEY
from service.json_body import query_parameters, read_model
from service.routes.admin import control_of, cut, list_of, page_of
from service.webhook_events import EventType
from service.webhook_record import WebhookChange, WebhookRequest, WebhookRotation, WebhookTest

PREFIX: Final = "/v1/webhook_endpoints"
router = APIRouter(dependencies=[needs("manage_webhooks")])


@router.get("/v1/webhook_event_types")
async def event_types(request: Request) -> JSONResponse:
    query_parameters(request, ())
    return JSONResponse({"object": "list", "data": get_args(EventType)})


@router.post(PREFIX)
async def create(request: Request) -> JSONResponse:
    """With `rotate_secret` the one reply that holds a secret."""
    control, caller = control_of(request), _caller(request)
    query_parameters(request, ())
    _require_no_replay(request)
    asked = await read_model(request, WebhookRequest, control.max_body_bytes)
    webhook, secret = await control.webhooks.create(asked, caller)
    return JSONResponse({**webhook, "signing_secret": secret})


@router.get(PREFIX)
async def webhooks(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    return cut(await control_of(request).webhooks.all(_caller(request).tenant), limit, after)


@router.get(f"{PREFIX}/{{webhook_id}}")
async def webhook(request: Request, webhook_id: str) -> JSONResponse:
    query_parameters(request, ())
    return JSONResponse(await control_of(request).webhooks.get(webhook_id, _caller(request).tenant))


@router.post(f"{PREFIX}/{{webhook_id}}")
async def change(request: Request, webhook_id: str) -> JSONResponse:
    control, caller = control_of(request), _caller(request)
    query_parameters(request, ())
    asked = await read_model(request, WebhookChange, control.max_body_bytes)
    return JSONResponse(await control.webhooks.change(webhook_id, asked, caller))


@router.delete(f"{PREFIX}/{{webhook_id}}")
async def delete(request: Request, webhook_id: str) -> JSONResponse:
    query_parameters(request, ())
    await control_of(request).webhooks.delete(webhook_id, _caller(request))
    return JSONResponse({"id": webhook_id, "object": "webhook_endpoint.deleted", "deleted": True})


@router.post(f"{PREFIX}/{{webhook_id}}/test")
async def test(request: Request, webhook_id: str) -> JSONResponse:
    control, caller = control_of(request), _caller(request)
    query_parameters(request, ())
    asked = await read_model(request, WebhookTest, control.max_body_bytes)
    return JSONResponse(await control.webhook_samples.send(webhook_id, caller.tenant, asked.event_type))


@router.post(f"{PREFIX}/{{webhook_id}}/rotate_secret")
async def rotate_secret(request: Request, webhook_id: str) -> JSONResponse:
    control, caller = control_of(request), _caller(request)
    query_parameters(request, ())
    _require_no_replay(request)
    asked = await read_model(request, WebhookRotation, control.max_body_bytes)
    keeps_former = asked.keep_old_secret_active_for_24_hours
    webhook, secret = await control.webhooks.rotate(webhook_id, caller, keeps_former=keeps_former)
    return JSONResponse({**webhook, "signing_secret": secret})


@router.get(f"{PREFIX}/{{webhook_id}}/deliveries")
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
    if IDEMPOTENCY_KEY in request.headers:
        raise InvalidField(
            f"a secret is shown once and cannot be replayed: leave {IDEMPOTENCY_KEY} out", param=IDEMPOTENCY_KEY
        )

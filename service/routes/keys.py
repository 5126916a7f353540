"""`/keys`: make, list, revoke."""

from __future__ import annotations

from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service.access import caller_of, needs
from service.errors import InvalidField, StoreUnavailable
from service.headers import IDEMPOTENCY_KEY
from service.json_body import query_parameters, read_model
from service.keys import KeyRequest, key_object
from service.routes.admin import control_of, cut, page_of

router = APIRouter(prefix="/keys", dependencies=[needs("manage_keys")])


@router.post("")
async def create(request: Request) -> JSONResponse:
    """The one reply that holds the key."""
    control = control_of(request)
    query_parameters(request, ())
    if IDEMPOTENCY_KEY in request.headers:
        raise InvalidField(
            f"a key is shown once and cannot be replayed: leave {IDEMPOTENCY_KEY} out", param=IDEMPOTENCY_KEY
        )
    asked = await read_model(request, KeyRequest, control.max_body_bytes)
    record, key = await control.keys.create(asked, caller_of(request))
    with suppress(StoreUnavailable):
        await control.catalogue.refresh()
    shown = {**key_object(record, None, record.created_at), "key": key}
    return JSONResponse(shown, 201, headers={"Location": f"/keys/{record.id}"})


@router.get("")
async def keys(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    return cut(await control_of(request).keys.all(caller_of(request)), limit, after)


@router.get("/{key_id}")
async def key(request: Request, key_id: str) -> JSONResponse:
    return JSONResponse(await control_of(request).keys.get(key_id, caller_of(request)))


@router.delete("/{key_id}")
async def revoke(request: Request, key_id: str) -> JSONResponse:
    return JSONResponse(await control_of(request).keys.revoke(key_id, caller_of(request)))

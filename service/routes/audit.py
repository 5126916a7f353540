"""`/audit`: who did what."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service.access import caller_of, needs
from service.routes.admin import control_of, list_of, page_of

router = APIRouter(prefix="/audit")


@router.get("", dependencies=[needs("read_audit")])
async def entries(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    rows, has_more = await control_of(request).audit.page(caller_of(request).tenant, limit, after)
    return list_of(rows, has_more=has_more)

"""`/openapi.json`: what the gateway accepts and answers, for programs. There are no pages to read it with."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service.access import needs
from service.openapi import document

router = APIRouter()


@router.get("/openapi.json", dependencies=[needs("list_models")])
async def described(request: Request) -> JSONResponse:
    """Made once, when somebody asks: it takes half a second."""
    state = request.app.state
    if not hasattr(state, "described"):
        state.described = await asyncio.to_thread(document, state.rights)
    return JSONResponse(state.described)

"""`/engines`: the replicas of the policy engine, and taking one out of rotation by hand.

Owns: what an operator sees and may do. Does not own: finding out how a replica does (replica.py). Draining is this
gateway's affair: another one, or the next life of this one, does not know of it.
"""

from __future__ import annotations

from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from bon_algos.contracts import DEFAULT_TENANT
from service.access import caller_of, needs
from service.errors import EngineNotFound, Forbidden
from service.replica import Replica
from service.routes.admin import cut, page_of
from service.serving import Serving

router = APIRouter(prefix="/engines")


@router.get("", dependencies=[needs("read")])
async def engines(request: Request) -> JSONResponse:
    _require_operator(request)
    limit, after = page_of(request)
    replicas = cast(Serving, request.app.state.serving).engine.replicas
    return cut([engine_object(replica) for replica in replicas], limit, after)


@router.post("/{name}/drain", dependencies=[needs("move_traffic")])
async def drain(request: Request, name: str) -> JSONResponse:
    replica = _named(request, name)
    replica.drain()
    return JSONResponse(engine_object(replica))


@router.post("/{name}/undrain", dependencies=[needs("move_traffic")])
async def undrain(request: Request, name: str) -> JSONResponse:
    replica = _named(request, name)
    replica.undrain()
    return JSONResponse(engine_object(replica))


def _require_operator(request: Request) -> None:
    """All tenants share the engines, and only one of them runs the installation. Raises Forbidden."""
    if caller_of(request).tenant != DEFAULT_TENANT:
        raise Forbidden(f"this needs a key of the tenant {DEFAULT_TENANT}, whose engines these are")


def _named(request: Request, name: str) -> Replica:
    _require_operator(request)
    replica = cast(Serving, request.app.state.serving).engine.replica(name)
    if replica is None:
        raise EngineNotFound("no such engine")
    return replica


def engine_object(replica: Replica) -> dict[str, Any]:
    """A replica as the API shows it; `reason` is None while it is in rotation."""
    return {
        "object": "engine",
        "id": replica.name,
        "state": replica.state,
        "since": replica.since,
        "reason": replica.reason or None,
        "outstanding_tokens": replica.outstanding_tokens,
        "policies": sorted(replica.served),
    }

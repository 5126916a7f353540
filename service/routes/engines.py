"""`/engines`: the replicas of the policy engine, and taking one out of rotation by hand.

Owns: what an operator sees and may do. Does not own: finding out how a replica does (replica.py) and what it holds
(observed.py), which replicas there are (fleet.py). Draining is this gateway's affair: another one, or the next life of
this one, does not know of it.
"""

from __future__ import annotations

from time import monotonic, time
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from bon_algos.contracts import DEFAULT_TENANT
from service.access import caller_of, needs
from service.errors import EngineNotFound, Forbidden
from service.observed import Adapter
from service.publishing import Publisher
from service.replica import Replica
from service.routes.admin import control_of, cut, page_of
from service.serving import Serving

router = APIRouter(prefix="/engines")


@router.get("", dependencies=[needs("read")])
async def engines(request: Request) -> JSONResponse:
    _require_operator(request)
    limit, after = page_of(request)
    replicas = cast(Serving, request.app.state.serving).engine.replicas
    return cut([_shown(request, replica) for replica in replicas], limit, after)


@router.post("/{name}/drain", dependencies=[needs("move_traffic")])
async def drain(request: Request, name: str) -> JSONResponse:
    replica = _named(request, name)
    replica.drain()
    return JSONResponse(_shown(request, replica))


@router.post("/{name}/undrain", dependencies=[needs("move_traffic")])
async def undrain(request: Request, name: str) -> JSONResponse:
    replica = _named(request, name)
    replica.undrain()
    return JSONResponse(_shown(request, replica))


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


def _shown(request: Request, replica: Replica) -> dict[str, Any]:
    publisher = control_of(request).publishers.of(replica.name)
    return engine_object(replica) | (adapters_object(publisher) if publisher is not None else {})


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


def adapters_object(publisher: Publisher) -> dict[str, Any]:
    """What the replica is to hold and what it holds, most needed first; as many as it has slots, those it has beside
    them, and those it refused in this life."""
    observed, wanted = publisher.observed, publisher.wanted
    names = [*wanted, *sorted(observed.adapters.keys() - {*wanted})]
    return {
        "slots": publisher.slots,
        "started_at": observed.started_at,
        "adapters": [_adapter_object(publisher, name, name in wanted) for name in names],
    }


def _adapter_object(publisher: Publisher, policy: str, is_wanted: bool) -> dict[str, Any]:
    adapter = publisher.observed.adapters.get(policy) or Adapter()
    used_at = publisher.engine.last_used_at(policy)
    return {
        "policy": policy,
        "wanted": is_wanted,
        "resident": adapter.is_loaded,
        "served": policy in publisher.engine.served,
        "draining": adapter.leaves_at is not None,
        "in_flight": publisher.engine.in_flight(policy),
        "proven_at": _unix(adapter.proven_at),
        "probed_at": _unix(adapter.probed_at),
        "used_at": _unix(used_at or None),
        "failures": adapter.failures,
        "reason": adapter.reason or None,
    }


def _unix(moment: float | None) -> float | None:
    """Unix seconds of a moment of the monotonic clock."""
    return None if moment is None else time() - monotonic() + moment

"""`/health`, `/ready`, `/version`.

Owns: what an operator or a load balancer is told. Does not own: finding it out in the background; `/ready` asks.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from bon_algos.contracts import SCHEMA_VERSION
from service.access import OPEN_TO_ALL, known_caller
from service.serving import Serving

router = APIRouter()


@router.get("/health", dependencies=[OPEN_TO_ALL])
async def health() -> JSONResponse:
    """The process answers; nothing else is asked."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", dependencies=[OPEN_TO_ALL])
async def ready(request: Request) -> JSONResponse:
    """Whether `/generate` would be answered now: a policy engine in rotation and the reward model serve their model,
    and the reward model has ranked its known pairs rightly. Without Redis it stays true while the spool has room;
    `degraded` says so, or that a policy engine is out of rotation. What is missing is told to who has a key."""
    serving = cast(Serving, request.app.state.serving)
    engines, reward_model = await asyncio.gather(serving.engine.readiness(), serving.reward_model.state())
    in_rotation = engines.count("ok")
    engine = "ok" if in_rotation else "; ".join(dict.fromkeys(engines))
    ledger = serving.ledger.status
    may_choose = serving.reward_test.may_choose
    is_ready = engine == reward_model == "ok" and may_choose and bool(serving.catalogue.snapshot.routes)
    is_whole = is_ready and in_rotation == len(engines) and ledger.redis == "ok" and ledger.has_room
    body: dict[str, Any] = {"status": "ready" if is_whole else "degraded" if is_ready else "starting"}
    if known_caller(request) is not None:
        rotation = {"in_rotation": in_rotation, "of": len(engines)}
        body |= {"engine": engine, "engines": rotation, "reward_model": reward_model, **_parts(serving)}
    return JSONResponse(body, 200 if is_ready else 503, headers=None if is_ready else {"Retry-After": "1"})


def _parts(serving: Serving) -> dict[str, Any]:
    ledger = serving.ledger.status
    return {
        "reward_test": serving.reward_test.state,
        "redis": ledger.redis,
        "routes": len(serving.catalogue.snapshot.routes),
        "spool": {
            "has_room": ledger.has_room,
            "pending_bytes": ledger.pending_bytes,
            "dropped": ledger.dropped,
            "damaged": ledger.damaged,
            "refusals": ledger.refusals,
        },
        "measurements_waiting": serving.measurements.waiting,
        "limits": serving.limits.status,
    }


@router.get("/version", dependencies=[OPEN_TO_ALL])
async def versions(request: Request) -> JSONResponse:
    serving = cast(Serving, request.app.state.serving)
    told: dict[str, Any] = {"version": version("bonsai"), "schema_version": SCHEMA_VERSION}
    if known_caller(request) is not None:
        told |= {
            "settings_digest": serving.settings_digest,
            "base_policy": serving.catalogue.base_policy,
            "reward_model": serving.reward_model.model,
        }
    return JSONResponse(told)

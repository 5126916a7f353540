"""What the circles' operations accept and answer: their rows of the OpenAPI document.

Owns: the rows of `/circles` and of a route's circle, and the form of a circle. Does not own: the rows' form and all
others (operations.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bon_algos.contracts import CircleSpec, Turn
from service.errors import (
    CircleNotFound,
    Conflict,
    InvalidField,
    PolicyNotFound,
    PreconditionFailed,
    RouteNotFound,
    StoreFull,
)
from service.operation import MATCH, ONCE, PAGE, Body, Operation
from service.replies import NUMBER, TEXT, WHOLE, Named, kind, listed, maybe, members, rows

CIRCLE: Final = Named(
    "Circle",
    members(
        id=TEXT,
        object=kind("bonsai.circle"),
        route=TEXT,
        status={"enum": ["running", "stopped"]},
        reason=TEXT,
        live_policy=maybe(TEXT),
        turn=maybe(Turn),
        turns=rows(Turn),
        spent=members(jobs=WHOLE, gpu_seconds=NUMBER, kl_base=NUMBER, kl_base_foreseen=NUMBER),
        spec=CircleSpec,
    ),
)
CHANGING: Final = (RouteNotFound, CircleNotFound, Conflict, PreconditionFailed, StoreFull)

CIRCLE_OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("GET", "/circles"): Operation("All circles", {200: listed(CIRCLE)}, parameters=PAGE, errors=(InvalidField,)),
    ("POST", "/circles/stop"): Operation("Stop all circles", {200: listed(CIRCLE)}, errors=(StoreFull,)),
    ("GET", "/routes/{route}/circle"): Operation(
        "A route's circle", {200: CIRCLE}, errors=(RouteNotFound, CircleNotFound), headers=("ETag",)
    ),
    ("PUT", "/routes/{route}/circle"): Operation(
        "Let a route distil itself again and again",
        {200: CIRCLE, 201: CIRCLE},
        Body(CircleSpec, {"n": 16, "min_groups": 2000, "budgets": {"jobs_per_day": 2, "max_kl": 6.0}}),
        (MATCH,),
        (RouteNotFound, PolicyNotFound, PreconditionFailed, StoreFull),
        headers=("ETag",),
    ),
    ("POST", "/routes/{route}/circle/start"): Operation(
        "Go on after a stop",
        {200: CIRCLE},
        parameters=(ONCE, MATCH),
        errors=(*CHANGING, InvalidField),
        headers=("ETag",),
    ),
    ("POST", "/routes/{route}/circle/stop"): Operation(
        "Stop a route's circle and what it has under way",
        {200: CIRCLE},
        parameters=(MATCH,),
        errors=(CircleNotFound, PreconditionFailed, StoreFull),
        headers=("ETag",),
    ),
    ("DELETE", "/routes/{route}/circle"): Operation(
        "Forget a circle that has stopped", {204: None}, parameters=(MATCH,), errors=CHANGING
    ),
}

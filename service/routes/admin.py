"""What the routes of the control plane share: the app's control plane, query parameters, the shape of a list."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from fastapi import Request
from fastapi.responses import JSONResponse

from bon_algos.contracts import ROUTE_PATTERN
from service.access import caller_of
from service.catalogue import Snapshot
from service.control import Control
from service.errors import InvalidField
from service.headers import IDEMPOTENCY_KEY
from service.idempotency import Idempotency
from service.json_body import query_parameters

DEFAULT_LIMIT: Final = 20
MAX_LIMIT: Final = 100


def control_of(request: Request) -> Control:
    """The control plane the app was built with."""
    return cast(Control, request.app.state.control)


def snapshot_of(request: Request) -> Snapshot:
    """What the caller's tenant sees."""
    return control_of(request).catalogue.of(caller_of(request).tenant)


def idempotency_of(request: Request, body: str = "") -> Idempotency | None:
    """The request's `Idempotency-Key`, bound to its method, path and body. Raises Unparseable (400)."""
    operation = f"{request.method} {request.scope['path']}"
    return Idempotency.of(request.headers.get(IDEMPOTENCY_KEY), operation, body, caller_of(request).tenant)


def page_of(request: Request) -> tuple[int, str | None]:
    """(limit, after) of a list. Raises InvalidField."""
    query = query_parameters(request, ("limit", "after"))
    return count_of(query, "limit", DEFAULT_LIMIT, at_most=MAX_LIMIT), query.get("after")


def count_of(query: Mapping[str, str], name: str, default: int, *, at_least: int = 1, at_most: int) -> int:
    """A whole number of the query. Raises InvalidField."""
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and at_least <= int(text) <= at_most):
        raise InvalidField(f"{name} must be an integer in {at_least}..{at_most}", param=name)
    return int(text)


def share_of(query: Mapping[str, str], name: str, default: float) -> float:
    """A number from 0 to 1 of the query. Raises InvalidField."""
    text = query.get(name, str(default))
    if not (re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,18})?", text) and float(text) <= 1):
        raise InvalidField(f"{name} must be a number from 0 to 1", param=name)
    return float(text)


def checked_name(route: str) -> str:
    """A name a route may have. Raises InvalidField."""
    if not re.fullmatch(ROUTE_PATTERN, route):
        raise InvalidField("a route's name is 1 to 64 of a-z, 0-9 and inner hyphens", param="route")
    return route


def list_of(rows: Sequence[dict[str, Any]], *, has_more: bool) -> JSONResponse:
    """A list as OpenAI's clients read it."""
    return JSONResponse(
        {
            "object": "list",
            "data": rows,
            "first_id": rows[0]["id"] if rows else None,
            "last_id": rows[-1]["id"] if rows else None,
            "has_more": has_more,
        }
    )


def cut(rows: Sequence[dict[str, Any]], limit: int, after: str | None) -> JSONResponse:
    """The part of a list held in memory that a page asks for. Raises InvalidField when `after` is not in it."""
    start = 0
    if after is not None:
        start = next((i + 1 for i, row in enumerate(rows) if row["id"] == after), 0)
        if start == 0:
            raise InvalidField("after is not in this list", param="after")
    return list_of(rows[start : start + limit], has_more=start + limit < len(rows))

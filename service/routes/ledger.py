"""`/ledger`: read it, and have one user's part of it erased."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from bon_algos.contracts import POLICY_ID_PATTERN
from service.access import caller_of, needs
from service.erasures import ErasureRequest, erasure_object
from service.errors import InvalidField
from service.json_body import query_parameters, read_model
from service.ledger_pages import row_object
from service.ledger_query import DEFAULT_LIMIT, FIELDS, FILTERS, MAX_LIMIT, LedgerQuery
from service.routes.admin import checked_name, control_of, count_of, idempotency_of

PARAMETERS: Final = (*FILTERS, "limit", "cursor", "fields")
MAX_NAME: Final = 512
MOST: Final = 1e12
"""Of a number: of seconds or of a reward."""
_NUMBER: Final = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,18})?")
router = APIRouter(prefix="/ledger")


@router.get("", dependencies=[needs("read")])
async def read(request: Request) -> JSONResponse:
    given = query_parameters(request, PARAMETERS)
    query, caller = read_query(given), caller_of(request)
    if query.route is not None:
        caller.require_route(query.route)
    page = await control_of(request).ledger_pages.page(query, given.get("cursor"), caller)
    shows_content = caller.may("read_content")
    return JSONResponse(
        {
            "object": "list",
            "data": [row_object(row, query.fields, shows_content=shows_content) for row in page.rows],
            "content": "shown" if shows_content else "withheld",
            "next_cursor": page.next_cursor,
        }
    )


@router.post("/erasures", dependencies=[needs("erase")])
async def erase(request: Request) -> JSONResponse:
    query_parameters(request, ())
    control = control_of(request)
    asked = await read_model(request, ErasureRequest, control.max_body_bytes)
    once = idempotency_of(request, asked.model_dump_json())
    receipt = await control.erasures.ask(asked, caller_of(request), idempotency=once)
    return JSONResponse(erasure_object(receipt), 202, headers={"Location": f"/ledger/erasures/{receipt.id}"})


@router.get("/erasures/{erasure_id}", dependencies=[needs("erase")])
async def receipt(request: Request, erasure_id: str) -> JSONResponse:
    query_parameters(request, ())
    return JSONResponse(erasure_object(await control_of(request).erasures.get(erasure_id, caller_of(request))))


def read_query(given: Mapping[str, str]) -> LedgerQuery:
    """Raises InvalidField."""
    since, until = _number(given, "since", at_least=0), _number(given, "until", at_least=0)
    if since is not None and until is not None and since > until:
        raise InvalidField("since must not be after until", param="since")
    return LedgerQuery(
        route=None if "route" not in given else checked_name(given["route"]),
        policy=_policy(given),
        since=since,
        until=until,
        user=_name(given, "user"),
        session=_name(given, "session"),
        has_feedback=_flag(given, "has_feedback"),
        min_reward=_number(given, "min_reward", at_least=-MOST),
        limit=count_of(given, "limit", DEFAULT_LIMIT, at_most=MAX_LIMIT),
        fields=_fields(given),
    )


def _number(given: Mapping[str, str], name: str, at_least: float) -> float | None:
    text = given.get(name)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text):
        raise InvalidField(f"{name} must be a plain decimal number", param=name)
    if not at_least <= float(text) <= MOST:
        raise InvalidField(f"{name} must be from {at_least:g} to {MOST:g}", param=name)
    return float(text)


def _flag(given: Mapping[str, str], name: str) -> bool | None:
    text = given.get(name)
    if text not in (None, "true", "false"):
        raise InvalidField(f"{name} must be true or false", param=name)
    return None if text is None else text == "true"


def _name(given: Mapping[str, str], name: str) -> str | None:
    text = given.get(name)
    if text is not None and not 1 <= len(text) <= MAX_NAME:
        raise InvalidField(f"{name} must have 1 to {MAX_NAME} characters", param=name)
    return text


def _policy(given: Mapping[str, str]) -> str | None:
    text = given.get("policy")
    if text is not None and not re.fullmatch(POLICY_ID_PATTERN, text):
        raise InvalidField("policy must be a policy's id, pol- and 16 hexadecimal digits", param="policy")
    return text


def _fields(given: Mapping[str, str]) -> tuple[str, ...]:
    if "fields" not in given:
        return FIELDS
    asked = tuple(given["fields"].split(","))
    if not set(asked) <= set(FIELDS):
        raise InvalidField(f"fields must be some of {', '.join(FIELDS)}, with commas between", param="fields")
    return asked

"""What is particular to an operation of the API, as a row of the OpenAPI document's facts.

Owns the form of a row, and the parameters that many rows share. Does not own the rows (operations.py,
training_operations.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel

from service.errors import GatewayError
from service.headers import IDEMPOTENCY_KEY, IF_MATCH
from service.idempotency import MAX_LENGTH
from service.preconditions import MAX_LENGTH as LONGEST
from service.replies import Schema
from service.routes.admin import DEFAULT_LIMIT, MAX_LIMIT

Nulls = Literal["as declared", "refused", "left out", "left out at the top"]
"""What a null does to a member that may be left out: what its type says, an error, or the same as leaving it out;
the last of the body's own members alone."""


class Body(NamedTuple):
    model: type[BaseModel]
    example: Mapping[str, Any]
    nulls: Nulls = "as declared"
    media_type: str = "application/json"


class Parameter(NamedTuple):
    name: str
    place: Literal["query", "header"]
    schema: Mapping[str, Any]
    description: str


class Operation(NamedTuple):
    summary: str
    replies: Mapping[int, Schema]
    """Of success, and what answers in no error's form."""
    body: Body | None = None
    parameters: tuple[Parameter, ...] = ()
    errors: tuple[type[GatewayError], ...] = ()
    """Beside those of every operation."""
    headers: tuple[str, ...] = ()
    """That a success comes with, beside those of every reply; `Location` only what was made (201, 202)."""
    streams: bool = False
    """A success may be a stream of events instead."""
    also: tuple[str, ...] = ()
    """Media types that a success may have instead."""
    media_type: str = "application/json"
    """Of a success."""


def query(name: str, description: str, **schema: Any) -> Parameter:
    return Parameter(name, "query", MappingProxyType(schema), description)


def header(name: str, description: str, **schema: Any) -> Parameter:
    return Parameter(name, "header", MappingProxyType({"type": "string", **schema}), description)


LIMIT: Final = query("limit", "Rows.", type="integer", minimum=1, maximum=MAX_LIMIT, default=DEFAULT_LIMIT)
AFTER: Final = query("after", "The id of a row: those behind it follow.", type="string", minLength=1)
PAGE: Final = (LIMIT, AFTER)
MATCH: Final = header(
    IF_MATCH, "Versions that may be changed, as `ETag` told them.", maxLength=LONGEST, pattern='^("[!#-~]*"|\\*)$'
)
ONCE: Final = header(
    IDEMPOTENCY_KEY,
    "The same request is carried out once in 24 h.",
    minLength=1,
    maxLength=MAX_LENGTH,
    pattern="^[!-~]+$",
)

"""The OpenAPI 3.1 document of the gateway: `python -m service.openapi > docs/openapi.json` writes it.

Owns: its form, what every operation may answer, the schemas of bodies from the models that parse them. Does not own:
who may ask (access.py), what is particular to an operation (operations.py), the members of replies (replies.py).
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final, get_args

from service.access import ROLES, Right, Role
from service.circle_operations import CIRCLE_OPERATIONS
from service.draining import ALIVE
from service.errors import (
    PROBLEM_JSON,
    BodyTimeout,
    BodyTooLarge,
    Forbidden,
    GatewayError,
    HeadersTooLarge,
    InvalidField,
    ShuttingDown,
    StoreUnavailable,
    TooManyWrongKeys,
    Unauthenticated,
    Unparseable,
    UnsupportedMediaType,
)
from service.headers import REPLAYED, REQUEST_ID
from service.operation import Operation, Parameter
from service.operations import OPERATIONS as OTHERS
from service.registry_operations import REGISTRY_OPERATIONS
from service.replies import TEXT, WHOLE, Named, Schema, maybe, members
from service.schemas import Schemas
from service.webhook_operations import WEBHOOK_OPERATIONS

EVERYBODY: Final = (HeadersTooLarge, ShuttingDown)
"""What the edge and the door refuse, whoever asks."""
OPERATIONS: Final = {**OTHERS, **REGISTRY_OPERATIONS, **CIRCLE_OPERATIONS, **WEBHOOK_OPERATIONS}
WITH_A_KEY: Final = (Unparseable, Unauthenticated, TooManyWrongKeys, StoreUnavailable)
WITH_A_BODY: Final = (Unparseable, BodyTimeout, BodyTooLarge, UnsupportedMediaType, InvalidField)

HEADERS: Final = {
    REQUEST_ID: {"description": "As it was sent, or made.", "required": True, "schema": TEXT},
    "ETag": {
        "description": "For `If-Match` or `If-None-Match`.",
        "required": True,
        "schema": TEXT,
    },
    "Location": {"description": "Where to find what was made.", "required": True, "schema": TEXT},
    REPLAYED: {
        "description": "`true`: this answered an earlier request with the same `Idempotency-Key`.",
        "schema": {"const": "true"},
    },
    "Retry-After": {"description": "Seconds.", "required": True, "schema": TEXT},
    "WWW-Authenticate": {"description": "Bearer.", "required": True, "schema": TEXT},
}
ABOUT: Final = (
    "What it all means is in docs/api.md. The description of a refusal is its usual `error.code`; where one status has "
    "several causes, the code names the cause."
)
PROBLEM: Final = Named(
    "Problem",
    members(
        type=TEXT,
        title=TEXT,
        status=WHOLE,
        detail=TEXT,
        instance=TEXT,
        error=members(message=TEXT, type=TEXT, param=maybe(TEXT), code=TEXT),
    ),
)


def require_described(
    rights: Mapping[tuple[str, str], Right | None],
) -> Mapping[tuple[str, str], Right | None]:
    """The same. Raises ValueError for a route without its row in OPERATIONS, or a row without route."""
    if undescribed := rights.keys() ^ OPERATIONS.keys():
        raise ValueError(f"these are not both routes and operations: {sorted(undescribed)}")
    return rights


def document(rights: Mapping[tuple[str, str], Right | None]) -> dict[str, Any]:
    """Of an app with these routes, which all have their rows."""
    schemas = Schemas()
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for (method, path), right in rights.items():
        paths[path][method.lower()] = _operation(method, path, right, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Bonsai", "version": "1", "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.found.items())),
            "responses": dict(sorted(schemas.refusals.items())),
            "headers": HEADERS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(method: str, path: str, right: Right | None, schemas: Schemas) -> dict[str, Any]:
    row = OPERATIONS[method, path]
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "summary": row.summary,
        "security": [] if right is None else [{"key": []}],
        "parameters": [_in_path(name) for name in re.findall(r"{(\w+)}", path)] + [*map(_parameter, row.parameters)],
        "responses": _responses(row, path, right, schemas),
    }
    if right is not None:
        described["description"] = f"Roles: {', '.join(ROLES[right])}."
    if row.body is not None:
        content = {row.body.media_type: {"schema": schemas.of_body(row.body), "example": row.body.example}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {**TEXT, "minLength": 1}}


def _parameter(one: Parameter) -> dict[str, Any]:
    return {"name": one.name, "in": one.place, "description": one.description, "schema": dict(one.schema)}


# --- answers ---------------------------------------------------------------------------------------------


def _responses(row: Operation, path: str, right: Right | None, schemas: Schemas) -> dict[str, Any]:
    errors: dict[int, set[type[GatewayError]]] = defaultdict(set)
    for error in _errors(row, path, right):
        errors[error.status].add(error)
    refusals = {status: _refusal(status, found, schemas) for status, found in errors.items()}
    successes = {status: _success(status, schema, row, schemas) for status, schema in row.replies.items()}
    for status in refusals.keys() & successes.keys():
        content = successes[status]["content"] | refusals[status]["content"]
        # Only the refusal says when to come back, so no header of it is promised.
        successes[status] |= {"description": refusals[status]["description"], "content": content}
    shared = {status: schemas.shared(status, one) for status, one in refusals.items()}
    return {str(status): one for status, one in sorted({**shared, **successes}.items())}


def _refusal(status: int, errors: set[type[GatewayError]], schemas: Schemas) -> dict[str, Any]:
    """Its description holds the codes by which a caller tells causes apart."""
    retry = ["Retry-After"] if all(error.retry_after is not None for error in errors) else []
    challenge = ["WWW-Authenticate"] if status == Unauthenticated.status else []
    return {
        "description": ", ".join(sorted({error.default_code for error in errors})),
        "headers": _headers(*retry, *challenge),
        "content": {PROBLEM_JSON: {"schema": schemas.of(PROBLEM)}},
    }


def _success(status: int, schema: Schema, row: Operation, schemas: Schemas) -> dict[str, Any]:
    content = {} if schema is None else {row.media_type: {"schema": schemas.of(schema)}}
    content |= {"text/event-stream": {"schema": TEXT}} if row.streams else {}
    content |= {media_type: {"schema": TEXT} for media_type in row.also}
    made = [name for name in row.headers if name != "Location" or status in (HTTPStatus.CREATED, HTTPStatus.ACCEPTED)]
    response = {"description": HTTPStatus(status).phrase, "headers": _headers(*made)}
    return {**response, "content": content} if content else response


def _errors(row: Operation, path: str, right: Right | None) -> Iterator[type[GatewayError]]:
    yield from (error for error in EVERYBODY if not (error is ShuttingDown and path == ALIVE))
    yield from WITH_A_KEY if right is not None else ()
    if right is not None and len(ROLES[right]) < len(get_args(Role)):
        yield Forbidden
    yield from WITH_A_BODY if row.body is not None else ()
    yield from row.errors


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in (REQUEST_ID, *names)}


def text_of(described: Mapping[str, Any]) -> str:
    """The document as the file holds it."""
    return json.dumps(described, indent=1) + "\n"


def main() -> None:
    # Not above: both know the routes, which know this module.
    from service.app import create_app, open_gateway
    from service.settings import GatewaySettings

    app = create_app(lambda: open_gateway(GatewaySettings()))
    sys.stdout.write(text_of(document(app.state.rights)))


if __name__ == "__main__":
    main()

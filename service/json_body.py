"""Strict reading of what a caller sent: body, query, and the words of a refusal.

Owns: the byte limit, the media type, JSON that everybody reads the same way (UTF-8, no duplicate names, no NaN),
strict validation by a pydantic model, and the message that names the field, the limit and the kind of what came.
Does not own: what the fields mean. Nothing here ever repeats a value that was sent.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from service.errors import BodyTimeout, BodyTooLarge, InvalidField, Unparseable, UnsupportedMediaType

Model = TypeVar("Model", bound=BaseModel)

BODY_SECONDS = 10.0
"""A body that takes longer is not waited for."""
MAX_INTEGER_DIGITS = 1000
MAX_MEMBERS = 1000
"""Of one JSON object."""
MAX_OBJECTS = 20_000
"""Of one document. Each costs a call, so that a few megabytes of them would take most of a second."""
LONG_BYTES = 100_000
"""From here on reading a body would hold up other requests, and is done in a thread. Fewer have no `MAX_OBJECTS`."""
MAX_FAULTS = 1000
"""Of one body. Each is put into words before one is chosen, so of more than these none is."""
MAX_PARAM_LENGTH = 100
_UNION_BRANCH = re.compile(r"(constrained-)?(str|bool|float)|tuple\[.*|literal\[.*|function-after\[.*|NamedTool")
"""pydantic's names for the branches of a union."""
_PRINTABLE_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_BROKEN = re.compile("[\x00\ud800-\udfff]")
_MAYBE_BROKEN = re.compile(r"\\u(0000|[dD][89a-fA-F])")
"""How the two come into a document: it is UTF-8, and JSON has a NUL as an escape only."""


async def read_model(request: Request, model: type[Model], max_bytes: int) -> Model:
    """The request's body as a record of this kind. Raises InvalidField (422), Unparseable (400),
    UnsupportedMediaType (415), BodyTooLarge (413), BodyTimeout (408)."""
    return await parse_aside(await read_body(request, max_bytes), model)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, never more than max_bytes of it, whether its length was declared or it comes in chunks."""
    _require_json(request)
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
    return bytes(body)


async def parse_aside(body: bytes, model: type[Model], *, null_means_itself_in: Collection[str] | None = None) -> Model:
    """As `parse_model`, in a thread where the body is long."""
    parse = partial(parse_model, body, model, null_means_itself_in=null_means_itself_in)
    return parse() if len(body) < LONG_BYTES else await asyncio.to_thread(parse)


def parse_model(body: bytes, model: type[Model], *, null_means_itself_in: Collection[str] | None = None) -> Model:
    """A body as a record of this kind. null_means_itself_in: names of the members inside which a null stands for
    itself, while elsewhere a member that is null counts as left out; None: a null is never left out."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise InvalidField(f"the body must be a JSON object; got {kind_of(value)}", param="body")
    if null_means_itself_in is not None and b"null" in body:
        try:
            body = json.dumps(_without_nulls(value, null_means_itself_in)).encode()
        except RecursionError:
            raise Unparseable("the body is nested too deeply") from None
    try:
        # JSON mode: an array is a tuple and nothing else is converted.
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise field_error(error) from None


def parse_json(body: bytes) -> Any:
    """One JSON document (RFC 8259) that no two readers understand differently."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise Unparseable("the body is not valid UTF-8") from None
    members = _members if len(body) < LONG_BYTES else _counted_members()
    try:
        value = json.loads(text, object_pairs_hook=members, parse_constant=_refuse_constant, parse_int=_bounded_integer)
    except json.JSONDecodeError as error:
        raise Unparseable(f"the body is not JSON: line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise Unparseable("the body is nested too deeply") from None
    if _MAYBE_BROKEN.search(text):
        _refuse_broken_text(value)
    return value


def _without_nulls(value: Any, verbatim: Collection[str]) -> Any:
    if isinstance(value, list):
        return [_without_nulls(one, verbatim) for one in value]
    if not isinstance(value, dict):
        return value
    said = {name: one for name, one in value.items() if one is not None}
    return {name: one if name in verbatim else _without_nulls(one, verbatim) for name, one in said.items()}


def query_parameters(request: Request, allowed: Collection[str]) -> dict[str, str]:
    """The query, each name at most once and none that is not known."""
    values: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in allowed:
            raise InvalidField("a query parameter is not known here", param=printable(name), code="unknown_field")
        if name in values:
            raise InvalidField(f"query parameter {name} is given twice", param=name)
        values[name] = value
    return values


def field_error(error: ValidationError) -> InvalidField:
    """The first thing wrong, in words that name the field, the limit and the kind of what came."""
    if error.error_count() > MAX_FAULTS:
        return InvalidField(f"body has more than {MAX_FAULTS} faults", param="body")
    details = _nearest(error.errors(include_url=False, include_context=True))
    param = path(details["loc"])
    unknown = details["type"] == "extra_forbidden"
    return InvalidField(f"{param} {_complaint(details)}", param=param, code="unknown_field" if unknown else None)


def _nearest(errors: list[ErrorDetails]) -> ErrorDetails:
    """The first one; of the branches of a union, which has one for each, the branch that was read furthest."""
    first = errors[0]
    *field, branch = first["loc"] or ("",)
    if not (isinstance(branch, str) and _UNION_BRANCH.fullmatch(branch)):
        return first
    of_the_union = [one for one in errors if list(one["loc"][: len(field)]) == field]
    # Of two that end at the same place, the one that was of the right kind there.
    return max(of_the_union, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))


def path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") -> "messages[0].content". Names that are not ours are made printable."""
    text = ""
    for place, part in enumerate(loc):
        if place and isinstance(part, str) and _UNION_BRANCH.fullmatch(part):
            continue  # which no caller wrote
        text += f"[{part}]" if isinstance(part, int) else f".{printable(part)}" if text else printable(part)
    return text[:MAX_PARAM_LENGTH] or "body"


def printable(name: str) -> str:
    """A member's name as it may stand in an error; one that is not a plain word is not repeated."""
    return name if _PRINTABLE_NAME.fullmatch(name) else "(unprintable name)"


def kind_of(value: object) -> str:
    """What came, without saying what it was."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return f"a string of {len(value)} characters"
        case list() | tuple():
            return f"an array of {len(value)} items"
        case _:
            return "an object"


def _require_json(request: Request) -> None:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaType("a body with a content-encoding is not read here")
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if media_type.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise UnsupportedMediaType("the content type must be application/json in UTF-8")


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body must be at most {max_bytes} bytes long")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_MEMBERS:
        raise InvalidField(f"an object may have at most {MAX_MEMBERS} members; got {len(pairs)}", param="body")
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Unparseable("an object has the same name twice")
    return members


def _counted_members() -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """As `_members`, for the objects of one document."""
    places = iter(range(MAX_OBJECTS))

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if next(places, None) is None:
            raise InvalidField(f"the body may have at most {MAX_OBJECTS} objects", param="body")
        return _members(pairs)

    return members


def _refuse_constant(_name: str) -> float:
    raise Unparseable("NaN and Infinity are not JSON")


def _bounded_integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise Unparseable(f"an integer has more than {MAX_INTEGER_DIGITS} digits")
    return int(digits)


def _refuse_broken_text(document: Any) -> None:
    """No string and no name of a member holds what cannot be written as UTF-8, or NUL.

    With a stack of its own, and a place put together only for a refusal: the work is the document's length, however
    deep it is nested.
    """
    places: list[int | str] = []
    levels: list[Iterator[tuple[int | str, Any]]] = [enumerate([document])]
    while levels:
        place, value = next(levels[-1], (None, None))
        if place is None:
            levels.pop()
            del places[-1:]
            continue
        for text in (place, value):
            if isinstance(text, str) and _BROKEN.search(text):
                # The first place is the document's own, which has no name.
                param = path((*places, place)[1:])
                raise InvalidField(f"{param} holds a NUL or half a surrogate pair", param=param)
        if isinstance(value, dict | list):
            places.append(place)
            levels.append(iter(value.items()) if isinstance(value, dict) else enumerate(value))


def _complaint(details: ErrorDetails) -> str:
    """What pydantic found wrong, in our words; a kind of error without words here is only called not valid."""
    limits = details.get("ctx", {})
    got = kind_of(details["input"])
    match details["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            return "is not a field known here"
        case "greater_than_equal":
            return f"must be at least {_plain(limits['ge'])}; got {got} below it"
        case "greater_than":
            return f"must be greater than {_plain(limits['gt'])}; got {got} that is not"
        case "less_than_equal":
            return f"must be at most {_plain(limits['le'])}; got {got} above it"
        case "less_than":
            return f"must be less than {_plain(limits['lt'])}; got {got} that is not"
        case "string_too_short" | "too_short":
            return f"must have at least {limits['min_length']} characters or items; got {got}"
        case "string_too_long" | "too_long":
            return f"must have at most {limits['max_length']} characters or items; got {got}"
        case "string_pattern_mismatch":
            return f"must match {limits['pattern']}; got {got} that does not"
        case "literal_error" | "enum":
            return f"must be one of {limits['expected']}; got {got} that is none of them"
        case "finite_number":
            return "must be a finite number"
        case "value_error":
            return str(limits["error"])
        case kind if (expected := _EXPECTED.get(kind)) is not None:
            return f"must be {expected}; got {got}"
        case _:
            return f"is not valid; got {got}"


def _plain(limit: float) -> str:
    return str(int(limit)) if limit == int(limit) else str(limit)


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "string_type": "a string",
    "list_type": "an array",
    "tuple_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}

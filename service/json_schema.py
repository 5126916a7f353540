"""What a JSON Schema of a caller may be before an engine compiles it.

Owns: its limits. Does not own: what it means (the engine's grammar compiler decides what it supports).
Engines have been brought down through schemas, and compiling one is work that nobody has paid for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, Final
from urllib.parse import unquote

from service.errors import InvalidField

MAX_CHARACTERS: Final = 32_768
MAX_DEPTH: Final = 32
MAX_PATTERN: Final = 256
MAX_COUNT: Final = 10_000
"""Of all counts of a schema together. For each a grammar may hold the counted part once more: an engine's compiler
takes some 10 KB of memory and 0.1 ms for it."""
COUNTS: Final = frozenset(
    f"{bound}{what}" for bound in ("min", "max") for what in ("Items", "Properties", "Length", "Contains")
)
_PIECE: Final = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(?P<least>[0-9]*)(?:,(?P<most>[0-9]*))?\}|.", re.DOTALL)
"""Of a regular expression: an atom, a parenthesis, or a count behind one of the two."""
ALTERNATIVES: Final = ("anyOf", "oneOf", "allOf")


def require_schema(schema: Mapping[str, Any], param: str) -> None:
    """Raises InvalidField."""
    if not schema:
        raise InvalidField(f"{param} must be a JSON Schema with at least one member; got an empty object", param=param)
    for depth, name, value in _members(schema):
        if depth > MAX_DEPTH:
            raise InvalidField(f"{param} must be nested at most {MAX_DEPTH} deep; got deeper", param=param)
        if name == "$ref" and not (isinstance(value, str) and (value == "#" or value.startswith("#/"))):
            raise InvalidField(f"{param} must refer to its own parts only (#/…); got another $ref", param=param)
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidField(f"{param} must have finite numbers", param=param)
        if any(len(pattern) > MAX_PATTERN for pattern in _patterns(name, value)):
            raise InvalidField(f"{param} must have patterns of at most {MAX_PATTERN} characters", param=param)
    if len(json.dumps(schema, ensure_ascii=False)) > MAX_CHARACTERS:
        raise InvalidField(f"{param} must be at most {MAX_CHARACTERS} characters of JSON; got more", param=param)
    _require_ends(schema, param)


def require_movable(schema: Mapping[str, Any], param: str) -> None:
    """What is put inside another schema takes its `$defs` along and nothing else. Raises InvalidField."""
    if not isinstance(schema.get("$defs", {}), Mapping):
        raise InvalidField(f"{param} must have an object as $defs", param=param)
    if any(name == "$ref" and not str(value).startswith("#/$defs/") for _, name, value in _members(schema)):
        raise InvalidField(f"{param} that must be called may refer to their own #/$defs/… only", param=param)


def require_small(schema: Mapping[str, Any], param: str) -> None:
    """What candidates are held to, and an engine therefore compiles: of few counts. Raises InvalidField."""
    counted: float = 0
    for _, name, value in _members(schema):
        if name in COUNTS and isinstance(value, int | float):
            counted += min(max(value, 0), MAX_COUNT + 1)  # a whole number may be too large for a float
        counted += sum(map(_repeated, _patterns(name, value)))
    if counted > MAX_COUNT:
        raise InvalidField(
            f"{param} must have lengths, numbers of items and of properties, and repetitions in patterns of at most "
            f"{MAX_COUNT} together; got more",
            param=param,
        )


def _patterns(name: str, value: object) -> list[str]:
    """The regular expressions of a member."""
    if name == "patternProperties" and isinstance(value, Mapping):
        return list(value)
    return [value] if name == "pattern" and isinstance(value, str) else []


def _repeated(pattern: str) -> int:
    """How many atoms it has more than are written: `a{3}` two, `((ab){2}){3}` ten."""
    sizes, repeated = [0], 0
    last = 0
    for found in _PIECE.finditer(pattern):
        piece = found[0]
        if piece == "(":
            sizes.append(0)
            continue
        if found["least"] is not None:
            more = last * max(int(found["most"] or found["least"] or 0) - 1, 0)
            repeated += more
            last, sizes[-1] = last + more, sizes[-1] + more
            continue
        last = sizes.pop() if piece == ")" and len(sizes) > 1 else 1
        sizes[-1] += last
    return repeated


def _require_ends(schema: Mapping[str, Any], param: str) -> None:
    """Every $ref leads to a part, and none back to where it stands. Of a schema that is only itself nothing is a
    document: an engine that holds a candidate to it has no token that it may draw."""
    same_place: dict[int, list[int]] = {}
    for part in [schema, *(value for _, _, value in _members(schema) if isinstance(value, Mapping))]:
        stand_for_it = [_part(schema, part["$ref"])] if "$ref" in part else []
        if None in stand_for_it:
            raise InvalidField(f"{param} must refer to parts that are there; got a $ref to none", param=param)
        for name in ALTERNATIVES:
            stand_for_it += part[name] if isinstance(part.get(name), list) else []
        same_place[id(part)] = [id(one) for one in stand_for_it]
    try:
        TopologicalSorter(same_place).prepare()
    except CycleError:
        raise InvalidField(f"{param} has a $ref that leads back to itself with nothing between", param=param) from None


def _part(schema: Mapping[str, Any], reference: str) -> object:
    """What a JSON pointer behind `#` names (RFC 6901); None where there is nothing."""
    found: object = schema
    for step in reference.split("/")[1:]:
        if isinstance(found, Mapping):
            found = found.get(unquote(step).replace("~1", "/").replace("~0", "~"))
        elif (
            isinstance(found, list) and step.isascii() and step.isdigit() and len(step) <= 5 and int(step) < len(found)
        ):
            found = found[int(step)]
        else:
            return None
    return found


def _members(schema: object) -> Iterator[tuple[int, str, object]]:
    """Every member of every object and list, with how deep it stands."""
    waiting: list[tuple[int, object]] = [(1, schema)]
    while waiting:
        depth, value = waiting.pop()
        if isinstance(value, Mapping):
            entries = list(value.items())
        elif isinstance(value, list):
            entries = [("", one) for one in value]
        else:
            continue
        for name, inner in entries:
            yield depth, name, inner
            waiting.append((depth + 1, inner))

"""What a JSON Schema of a caller may be before an engine compiles it.

Owns: its limits. Does not own: what it means (the engine's grammar compiler decides what it supports).
Engines have been brought down through schemas, and compiling one is work that nobody has paid for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from service.errors import InvalidField

MAX_CHARACTERS: Final = 32_768
MAX_DEPTH: Final = 32
MAX_PATTERN: Final = 256


def require_schema(schema: Mapping[str, Any], param: str) -> None:
    """Raises InvalidField."""
    if not schema:
        raise InvalidField(f"{param} must be a JSON Schema with at least one member; got an empty object", param=param)
    for depth, name, value in _members(schema):
        if depth > MAX_DEPTH:
            raise InvalidField(f"{param} must be nested at most {MAX_DEPTH} deep; got deeper", param=param)
        if name == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise InvalidField(f"{param} must refer to its own parts only (#/…); got another $ref", param=param)
        if name == "pattern" and isinstance(value, str) and len(value) > MAX_PATTERN:
            raise InvalidField(f"{param} must have patterns of at most {MAX_PATTERN} characters", param=param)
    if len(json.dumps(schema, ensure_ascii=False)) > MAX_CHARACTERS:
        raise InvalidField(f"{param} must be at most {MAX_CHARACTERS} characters of JSON; got more", param=param)


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

"""The JSON Schemas of the OpenAPI document, each under its name.

Owns: schemas of bodies from the models that parse them, of replies from their forms, the text below a field as its
description. Does not own: which model an operation reads (operations.py), the form of a reply (replies.py).
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Final, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from service.openai_messages import SCHEMA_MEMBERS
from service.operation import Body
from service.replies import Named, Shown, maybe, members

SCHEMAS: Final = "#/components/schemas/"
RESPONSES: Final = "#/components/responses/"
NULL: Final = {"type": "null"}


class Schemas:
    """The components of one document."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.refusals: dict[str, Any] = {}

    def of_body(self, body: Body) -> dict[str, Any]:
        """A reference to what the model reads. Raises ValueError where two schemas have one name."""
        schema, parts = _generated(body.model)
        if body.nulls == "refused":
            _without_null(schema)
        if body.nulls == "left out":
            for one in (schema, *parts.values()):
                _with_null(one)
        if body.nulls == "left out at the top":
            _with_null(schema)
        self._keep(parts)
        return self._kept(body.model.__name__, schema)

    def of(self, schema: Any) -> Any:
        """The same with names and records replaced by references. Raises ValueError as above."""
        match schema:
            case Named(name, inner):
                return {"$ref": SCHEMAS + name} if name in self.found else self._kept(name, self.of(inner))
            case Shown(record, without, more):
                own, parts = _generated(record)
                kept = {name: one for name, one in own["properties"].items() if name not in (*without, *more)}
                referred = json.dumps(kept)
                self._keep({name: one for name, one in parts.items() if f'"{SCHEMAS}{name}"' in referred})
                return members(**kept, **self.of(more))
            case type():
                own, parts = _generated(schema)
                self._keep(parts)
                return self._kept(schema.__name__, own)
            case Mapping():
                return {name: self.of(one) for name, one in schema.items()}
            case list():
                return [self.of(one) for one in schema]
        return schema

    def shared(self, status: int, refusal: dict[str, Any]) -> dict[str, Any]:
        """A reference to a response that many operations have."""
        name = f"{status}.{refusal['description'].replace(', ', '.')}"
        self.refusals[name] = refusal
        return {"$ref": RESPONSES + name}

    def _kept(self, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        self._keep({name: schema})
        return {"$ref": SCHEMAS + name}

    def _keep(self, schemas: Mapping[str, Any]) -> None:
        for name, schema in schemas.items():
            if self.found.setdefault(name, schema) != schema:
                raise ValueError(f"two schemas have the name {name}")


def _generated(model: type[BaseModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of a model and those that it refers to. What is read and what is written look alike."""
    schema = model.model_json_schema(ref_template=f"{SCHEMAS}{{model}}", schema_generator=_Described)
    return schema, schema.pop("$defs", {})


def _without_null(schema: dict[str, Any]) -> None:
    """In place: no member may be null."""
    for one in schema["properties"].values():
        kinds = [kind for kind in one.pop("anyOf", ()) if kind != NULL]
        one |= kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {}
        if one.get("default", NULL) is None:
            del one["default"]


def _with_null(schema: dict[str, Any]) -> None:
    """In place: a member that may be left out, and one of a free object, may be null instead."""
    properties = schema.get("properties", {})
    for name, one in properties.items():
        if isinstance(one.get("additionalProperties"), dict):
            one["additionalProperties"] = maybe(one["additionalProperties"])
        if name not in (*schema.get("required", ()), *SCHEMA_MEMBERS) and NULL not in one.get("anyOf", ()):
            apart = {key: one[key] for key in ("description", "default") if key in one}
            properties[name] = {**maybe({key: one[key] for key in one if key not in apart}), **apart}


class _Described(GenerateJsonSchema):
    """pydantic's schema with what stands below a field as its description, and without made-up titles."""

    def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
        made = super().model_schema(schema)
        for name, text in _texts(cast("type[BaseModel]", schema["cls"])).items():
            if name in made.get("properties", {}):
                made["properties"][name].setdefault("description", text)
        return made

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


@cache
def _texts(model: type[BaseModel]) -> dict[str, str]:
    """Field -> the text below it, inherited ones included."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if issubclass(cls, BaseModel) and cls is not BaseModel:
            found |= _own_texts(cls)
    return found


@cache
def _own_texts(cls: type[BaseModel]) -> dict[str, str]:
    definition = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0])
    return dict(_texts_below(definition.body))


def _texts_below(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, inspect.cleandoc(text).replace("\n", " ")

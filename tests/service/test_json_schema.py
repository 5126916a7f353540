"""What a schema may be before an engine compiles it: where its references may lead, how much it may count."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidField
from service.json_schema import MAX_CHARACTERS, MAX_COUNT, MAX_PATTERN, require_movable, require_schema, require_small

TREE = {"type": "object", "properties": {"child": {"$ref": "#"}}}
MUTUAL = {
    "$ref": "#/$defs/even",
    "$defs": {
        "even": {"type": "array", "items": {"$ref": "#/$defs/odd"}},
        "odd": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/even"}]},
    },
}
POINTERS = {
    "anyOf": [{"$ref": "#/$defs/a~1b~0c"}, {"$ref": "#/$defs/a%20b"}, {"$ref": "#/prefixItems/1"}],
    "$defs": {"a/b~c": {"type": "string"}, "a b": {"type": "null"}},
    "prefixItems": [True, {"type": "integer"}],
}


@pytest.mark.parametrize("schema", [TREE, MUTUAL, POINTERS], ids=["a tree", "two that hold each other", "pointers"])
def test_references_that_lead_somewhere(schema):
    require_schema(schema, "s")


ALTERNATIVES: list[dict[str, Any]] = [{name: [{"type": "null"}, {"$ref": "#"}]} for name in ("anyOf", "oneOf", "allOf")]
LONG = {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{(i + 1) % 900}"} for i in range(900)}}


@pytest.mark.parametrize("schema", [*ALTERNATIVES, LONG, {"properties": {"a": {"$ref": "#/properties/a"}}}])
def test_a_reference_back_to_where_it_stands_is_refused(schema):
    with pytest.raises(InvalidField, match=r"^s has a \$ref that leads back to itself with nothing between$"):
        require_schema(schema, "s")


@pytest.mark.parametrize("reference", ["#/$defs/b", "#/prefixItems/2", "#/prefixItems/" + "9" * 5000, "#/type/0"])
def test_a_reference_to_nothing_is_refused(reference):
    with pytest.raises(InvalidField, match=r"a \$ref to none"):
        require_schema({**POINTERS, "type": "string", "items": {"$ref": reference}}, "s")


@pytest.mark.parametrize("reference", ["#anchor", "other.json", 7, None])
def test_a_reference_to_another_document_is_refused(reference):
    with pytest.raises(InvalidField, match="its own parts only"):
        require_schema({"$ref": reference}, "s")


def test_what_is_as_large_as_may_be_takes_no_time():
    """Twelve hundred references into a list of as many: each is followed once."""
    items = [{"$ref": f"#/prefixItems/{i + 1}"} for i in range(1000)]
    schema = {"prefixItems": [*items, {"type": "null"}]}
    assert len(str(schema)) < MAX_CHARACTERS + 5000
    require_schema(schema, "s")


def test_inside_another_schema_only_defs_are_found():
    """The schema of calls has every tool's `$defs` at its root, and nothing else of them."""
    require_movable(MUTUAL, "s")
    for schema in (TREE, POINTERS):
        with pytest.raises(InvalidField, match="their own #/"):
            require_movable(schema, "s")


HALF = MAX_COUNT // 2


@pytest.mark.parametrize(
    ("schema", "more"),
    [
        ({"maxItems": MAX_COUNT}, {"minItems": 1}),
        ({"maxLength": float(MAX_COUNT)}, {"minLength": 0.5}),
        ({"properties": {"a": {"minProperties": HALF}, "b": {"maxProperties": HALF}}}, {"pattern": "a{2}"}),
        ({"pattern": f"^a{{1,{HALF + 1}}}(bc){{{HALF // 2 + 1}}}$"}, {"pattern": f"^a{{1,{HALF}}}(bc){{{HALF}}}$"}),
        ({"pattern": "((ab){50}){100}"}, {"pattern": "((ab){50}){101}"}),
        ({"patternProperties": {f"[{{9}}]{{{MAX_COUNT + 1}}}": True}}, {"maxContains": 1}),
        ({"pattern": r"\{99999}[{99999}]a{,9}" + f"b{{{MAX_COUNT - 7},}}"}, {"minContains": 1}),
        ({"minItems": -(10**9)}, {"maxItems": MAX_COUNT + 1}),
        ({"properties": {"maxItems": {"maxItems": MAX_COUNT}}}, {"items": {"maxItems": 1}}),
    ],
)
def test_all_counts_of_a_schema_together_are_bounded(schema, more):
    """An engine writes each of them out: 100 million items in 68 bytes would take all of its memory."""
    require_small(schema, "s")
    with pytest.raises(InvalidField, match=f"at most {MAX_COUNT} together"):
        require_small({**schema, **more}, "s")


@given(st.text("a(){}[]\\,:?0123456789", max_size=MAX_PATTERN))
def test_whatever_a_pattern_looks_like_it_is_counted(pattern):
    try:
        require_small({"pattern": pattern}, "s")
    except InvalidField:
        assert "{" in pattern

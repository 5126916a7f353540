"""Strict JSON: what is read is what everybody reads, and refusals repeat nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from bon_algos.contracts import Record
from service.errors import InvalidField, Unparseable
from service.json_body import MAX_INTEGER_DIGITS, parse_json, parse_model, path

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
VALUES = st.recursive(
    SCALARS | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_every_document_comes_back_as_it_was(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.dictionaries(TEXTS, SCALARS, min_size=1, max_size=5), st.data())
def test_a_name_that_comes_twice_is_refused_however_it_is_written(members, data):
    again = data.draw(st.sampled_from(sorted(members)))
    text = json.dumps(members)[:-1] + f", {json.dumps(again, ensure_ascii=data.draw(st.booleans()))}: 1}}"
    with pytest.raises(Unparseable, match="same name twice"):
        parse_json(text.encode())


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_read_or_refused(body):
    try:
        parse_json(body)
    except (Unparseable, InvalidField):
        return
    assert json.loads(body.decode()) == parse_json(body)


@given(VALUES, st.integers(0xD800, 0xDFFF))
def test_half_a_surrogate_is_refused_wherever_it_stands(value, code):
    document = json.dumps([value, {"name": "a"}]).replace('"a"', f'"\\u{code:04x}"')
    with pytest.raises(InvalidField):
        parse_json(document.encode())


def test_a_whole_surrogate_pair_is_text():
    assert parse_json(b'"\\ud83d\\ude80"') == "🚀"


def test_the_longest_integer_is_read_and_one_digit_more_is_not():
    assert parse_json(b"9" * MAX_INTEGER_DIGITS) == 10**MAX_INTEGER_DIGITS - 1
    with pytest.raises(Unparseable):
        parse_json(b"9" * (MAX_INTEGER_DIGITS + 1))


class Inner(Record):
    size: int = Field(ge=1)


class Outer(Record):
    name: str = Field(max_length=5)
    inner: tuple[Inner, ...] = ()
    share: float = 0.0


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "name", "name is required"),
        ({"name": 7}, "name", "name must be a string; got an integer"),
        ({"name": "secret"}, "name", "name must have at most 5 characters or items; got a string of 6 characters"),
        ({"name": "a", "nome": 1}, "nome", "nome is not a field known here"),
        ({"name": "a", "inner": {}}, "inner", "inner must be an array; got an object"),
        ({"name": "a", "inner": [{"size": 1}, {"size": 0}]}, "inner[1].size",
         "inner[1].size must be at least 1; got an integer below it"),
        ({"name": "a", "inner": [{"size": True}]}, "inner[0].size", "inner[0].size must be an integer; got a boolean"),
        ({"name": "a", "inner": [{"size": 2.0}]}, "inner[0].size", "inner[0].size must be an integer; got a number"),
        ({"name": "a", "share": "1"}, "share", "share must be a number; got a string of 1 characters"),
        ({"name": "a", "share": None}, "share", "share must be a number; got null"),
    ],
)  # fmt: skip
def test_a_refusal_names_field_limit_and_kind(body, param, message):
    with pytest.raises(InvalidField) as refused:
        parse_model(json.dumps(body).encode(), Outer)
    assert (refused.value.param, refused.value.message) == (param, message)


@given(st.text(min_size=1, max_size=200))
def test_a_name_that_is_not_a_plain_word_is_not_repeated(name):
    text = path(("metadata", name))
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 100

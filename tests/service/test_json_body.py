"""Strict JSON: what is read is what everybody reads, and refusals repeat nothing."""

from __future__ import annotations

import json
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from bon_algos.contracts import JobSpec, Record, TrainingRow
from service.errors import InvalidField, Unparseable
from service.experiment_store import ExperimentRequest
from service.generation import GenerateRequest
from service.json_body import (
    LONG_BYTES,
    MAX_FAULTS,
    MAX_INTEGER_DIGITS,
    MAX_OBJECTS,
    parse_aside,
    parse_json,
    parse_model,
    path,
)
from service.keys import KeyRequest
from service.openai_bodies import ChatBody, CompletionBody
from service.webhook_record import WebhookChange, WebhookRequest

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


@pytest.mark.parametrize(
    ("document", "param"),
    [
        (r'"\u0000"', "body"),
        (r'["a", "b\ud800"]', "[1]"),
        (r'{"a": [{}, [], {"b": ["c", {"d": "\udfffe"}]}], "f": "\u0000"}', "a[2].b[1].d"),
        (r'{"a": {}, "b": [[]], "c": {"\u0000": "d"}}', "c.(unprintable name)"),
    ],
)
def test_broken_text_is_named_by_its_place(document, param):
    with pytest.raises(InvalidField) as refused:
        parse_json(document.encode())
    assert (refused.value.param, refused.value.message) == (param, f"{param} holds a NUL or half a surrogate pair")


def test_looking_for_broken_text_costs_the_same_however_deep_it_may_stand():
    """A request of a few megabytes would otherwise hold up all others: its texts times their depth."""
    depth, texts = 500, 1000

    def work(around: int) -> int:
        document = b"[" * around + b'"",' * texts + rb'"\ud83d\ude80"' + b"]" * around
        return num_calls(lambda: parse_json(document))

    assert work(depth) - work(1) < texts * depth / 10


def num_calls(work) -> int:
    """Of functions, generators that go on included."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_broken_text_is_refused_at_whatever_depth_can_be_read(opening):
    closing = "]" if opening == "[" else "}"
    for depth in (1, 100, *range(900, 1000), 1_500, 3_000, 10_000, 100_000):
        with pytest.raises((InvalidField, Unparseable)):
            parse_json((opening * depth + r'"\u0000"' + closing * depth).encode())


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


def test_more_faults_than_are_worth_words_are_counted():
    def refusal(num_faults: int) -> InvalidField:
        with pytest.raises(InvalidField) as refused:
            parse_model(json.dumps({"name": "a", "inner": [{"size": 0}] * num_faults}).encode(), Outer)
        return refused.value

    assert refusal(MAX_FAULTS).param == "inner[0].size"
    assert refusal(MAX_FAULTS + 1).message == f"body has more than {MAX_FAULTS} faults"


WRONG = [0] * 1000
JOB = {"method": {"type": "bon_sft"}}
CALLING = {"role": "assistant", "content": "", "tool_calls": WRONG}


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (GenerateRequest, {"prompt_token_ids": ["a"] * 1000}),
        (GenerateRequest, {"prompt": "a", "stop": WRONG}),
        (GenerateRequest, {"messages": WRONG}),
        (GenerateRequest, {"messages": [CALLING]}),
        (GenerateRequest, {"prompt": "a", "tools": WRONG[:128]}),
        (CompletionBody, {"model": "m", "prompt": [-1] * 1000}),
        (CompletionBody, {"model": "m", "prompt": [["a"] * 1000]}),
        (ChatBody, {"model": "m", "messages": WRONG}),
        (ChatBody, {"model": "m", "messages": [{"role": "user", "content": WRONG}]}),
        (ChatBody, {"model": "m", "messages": [{**CALLING, "tool_calls": WRONG[:128]}]}),
        (ChatBody, {"model": "m", "messages": [{"role": "user", "content": "a"}], "tools": WRONG[:128]}),
        (JobSpec, {**JOB, "window": {"routes": WRONG}}),
        (JobSpec, {**JOB, "window": {"tags": WRONG}}),
        (JobSpec, {**JOB, "window": {"policies": WRONG}}),
        (ExperimentRequest, {"arms": WRONG}),
        (KeyRequest, {"name": "a", "role": "viewer", "routes": WRONG}),
        (WebhookRequest, {"name": "n", "url": "https://a.example", "event_types": WRONG}),
        (WebhookChange, {"event_types": WRONG}),
        (TrainingRow, {"prompt_token_ids": ["a"] * 1000, "completions": ["a"]}),
        (TrainingRow, {"messages": WRONG, "completions": ["a"]}),
        (TrainingRow, {"prompt": "a", "completions": WRONG}),
        (TrainingRow, {"prompt": "a", "completions": ["a"], "rewards": ["a"] * 1000}),
        (TrainingRow, {"prompt": "a", "completions": [{"token_ids": ["a"] * 1000}]}),
        (TrainingRow, {"prompt": "a", "completions": [{"logprobs": ["a"] * 1000}]}),
    ],
)
def test_of_a_list_the_first_fault_is_the_last(model: type[BaseModel], fields):
    """A million of them would take longer to tell than the list to read."""
    with pytest.raises(ValidationError) as refused:
        model.model_validate_json(json.dumps(fields), strict=True)
    # One for each kind of thing that may stand there, and that the list has ended too early.
    assert refused.value.error_count() < 10


class Reader(Record):
    text: str
    thread: int = Field(default_factory=threading.get_ident)
    """That reads it."""


@pytest.mark.anyio
@pytest.mark.parametrize(("size", "is_aside"), [(LONG_BYTES - 12, False), (LONG_BYTES - 11, True)])
async def test_a_long_body_is_read_beside_the_event_loop(size, is_aside):
    """Around the text are 11 bytes."""
    read = await parse_aside(b'{"text":"%s"}' % (b"a" * size), Reader)
    assert (read.thread != threading.get_ident()) is is_aside


def test_a_document_has_so_many_objects_and_no_more():
    """In 4 MiB there are 600,000, which take a second."""
    assert len(parse_json(b"[" + b'{"a":1},' * (MAX_OBJECTS - 1) + b"{}]")) == MAX_OBJECTS
    with pytest.raises(InvalidField, match=f"at most {MAX_OBJECTS} objects"):
        parse_json(b"[" + b'{"a":1},' * MAX_OBJECTS + b"{}]")


@given(st.text(min_size=1, max_size=200))
def test_a_name_that_is_not_a_plain_word_is_not_repeated(name):
    text = path(("metadata", name))
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 100

"""Calls in what a model writes, in the three ways that chat templates have them written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from bon_algos.contracts import Tool
from bon_algos.tool_calls import Call, Spoken, calling_schema, format_of_template, read_calls, sayable

PARIS = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
CALL_OF_PARIS = Call("weather", '{"city": "Paris", "days": 2}')
CALL_OF_ROME = Call("weather", '{"city": "Rome"}')
BOTH = (CALL_OF_PARIS, CALL_OF_ROME)


def tagged(*documents: str) -> str:
    return "\n".join(f"<tool_call>\n{document}\n</tool_call>" for document in documents)


def parameters(document: str) -> str:
    return document.replace("arguments", "parameters")


@pytest.mark.parametrize(
    ("form", "completion", "text", "calls"),
    [
        ("tagged", tagged(PARIS), "", (CALL_OF_PARIS,)),
        ("tagged", "Let me see.\n" + tagged(PARIS, ROME), "Let me see.", BOTH),
        ("tagged", tagged('{"name": "now"}'), "", (Call("now", "{}"),)),
        ("objects", parameters(PARIS), "", (CALL_OF_PARIS,)),
        ("objects", f"<|python_tag|>{parameters(PARIS)}; {parameters(ROME)}", "", BOTH),
        ("list", f"[{PARIS}, {ROME}]", "", BOTH),
        ("list", f" [TOOL_CALLS] [{PARIS}]", "", (CALL_OF_PARIS,)),
    ],
)
def test_calls_are_read(form, completion, text, calls):
    assert read_calls(completion, form) == Spoken(text, calls)
    assert read_calls(completion, form, is_parallel=False) == Spoken(text, calls[:1])


@pytest.mark.parametrize(
    ("form", "completion"),
    [
        ("tagged", "It rains."),
        ("tagged", "<tool_call>\n{broken\n</tool_call>"),
        ("tagged", tagged(PARIS, "[1]")),
        ("tagged", tagged(PARIS) + " and then I thought"),
        ("tagged", "<tool_call>" + PARIS),
        ("tagged", tagged(PARIS) + "</tool_call>"),
        ("tagged", tagged(PARIS) + " or " + tagged(ROME)),
        ("tagged", tagged('{"name": 3}')),
        ("tagged", tagged('{"name": "f", "arguments": "text"}')),
        ("tagged", tagged('{"name": "f", "arguments": {"x": NaN}}')),
        ("objects", "It rains."),
        ("objects", '{"answer": 42}'),
        ("objects", parameters(PARIS) + " I thought"),
        ("list", "[1, 2]"),
        ("list", "[]"),
        ("list", PARIS),
    ],
)
def test_what_cannot_be_read_stays_text(form, completion):
    assert read_calls(completion, form) == Spoken(completion, ())


@pytest.mark.parametrize(
    "completion",
    ["<tool_call>" + " " * 30_000 + "x", "<tool_call>" * 30_000, ("<tool_call>" + " " * 50) * 5_000 + "</tool_call"],
    ids=["blanks", "tags", "tags and blanks"],
)
def test_a_call_without_an_end_is_read_as_fast_as_any_text(completion):
    """Work that grew with a power of the length would not end here: the whole gateway waits for it."""
    assert read_calls(completion, "tagged") == Spoken(completion, ())


WORDS = st.sampled_from(
    ["It ", "rains", "<", "tool", "<tool_call>", "</tool_call>", PARIS, "{", "[", "[TOOL_CALLS]", " "]
)


@given(st.sampled_from(["tagged", "objects", "list"]), st.lists(WORDS, max_size=8), st.data())
def test_what_was_said_while_it_was_written_is_the_beginning_of_what_was_written(form, words, data):
    """Nothing that was sent is ever taken back, and it grows."""
    completion, sent = "".join(words), ""
    for end in sorted(data.draw(st.lists(st.integers(0, len(completion)), max_size=6))):
        written = completion[:end]
        said = written[: sayable(written, form)]
        assert said.startswith(sent)
        sent = said
    assert read_calls(completion, form).text.startswith(sent)


def test_words_are_said_at_once_and_a_call_is_held_back():
    assert [sayable(text, "tagged") for text in ("It rains", "It rains <too", "It rains <b", "It <tool_call>{")] == [
        8,
        8,
        11,
        2,
    ]
    assert [sayable(text, "objects") for text in ("", "<|py", "It", '{"a')] == [0, 0, 2, 0]
    assert [sayable(text, "list") for text in ("", "[TOOL", "Of course", "[1")] == [0, 0, 9, 0]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{% endif %}", "tagged"),
        ("{% if tools %}<tool_call>\n<function=name>{% endif %}", None),
        ("{{ tools }}[TOOL_CALLS]", "list"),
        ('{{ tools }}{"name": "f", "parameters": {}}', "objects"),
        ("{{ tools }}", None),
    ],
)
def test_the_template_tells_the_format(template, form):
    assert format_of_template(template) == form


POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
DRAW = Tool(
    name="draw",
    parameters={"properties": {"at": {"$ref": "#/$defs/Point"}}, "required": ["at"], "$defs": {"Point": POINT}},
)
STOP = Tool(name="stop")


@pytest.mark.parametrize(
    ("value", "is_valid", "is_valid_alone"),
    [
        ([{"name": "draw", "arguments": {"at": {"x": 1}}}], True, True),
        ([{"name": "stop", "arguments": {}}], True, True),
        ([{"name": "stop", "arguments": {}}] * 2, True, False),
        ([], False, False),
        ([{"name": "draw", "arguments": {"at": {}}}], False, False),
        ([{"name": "fly", "arguments": {}}], False, False),
        ({"name": "stop", "arguments": {}}, False, False),
    ],
)
def test_the_calling_schema_holds_calls_of_the_tools_and_nothing_else(value, is_valid, is_valid_alone):
    """Judged by the reference implementation of JSON Schema."""
    for is_parallel, expected in ((True, is_valid), (False, is_valid_alone)):
        schema = calling_schema([DRAW, STOP], is_parallel=is_parallel)
        assert Draft202012Validator(schema).is_valid(value) is expected
    if is_valid:
        assert len(read_calls(json.dumps(value), "list").calls) == len(value)


def test_two_meanings_of_one_definition_are_refused():
    other = Tool(name="other", parameters={"$defs": {"Point": {"type": "string"}}})
    with pytest.raises(ValueError, match="Point"):
        calling_schema([DRAW, other], is_parallel=True)

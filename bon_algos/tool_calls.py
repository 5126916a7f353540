"""Tool calls in what a model writes: how a chat template has them written, reading them back, prescribing them.

Owns: the formats, telling them by the template, the parsers, the schema that makes a model call. Does not own: the
shape in which clients see calls. Text that cannot be read as a call stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from bon_algos.contracts import Tool

CallFormat = Literal["tagged", "objects", "list"]
"""tagged: `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes, Qwen). objects: the whole text is one JSON
object, or several with semicolons between them, with `parameters` (Llama). list: the whole text is a JSON list of calls
(Mistral; and what `calling_schema` prescribes)."""

_TAG: Final = "<tool_call>"
_END_TAG: Final = "</tool_call>"
_MARKS: Final[dict[CallFormat, tuple[str, ...]]] = {
    "tagged": (_TAG,),
    "objects": ("<|python_tag|>", "{"),
    "list": ("[TOOL_CALLS]", "["),
}


class Call(NamedTuple):
    name: str
    arguments: str
    """JSON."""


class Spoken(NamedTuple):
    """What a completion says and what it calls."""

    text: str
    calls: tuple[Call, ...]


def format_of_template(template: str) -> CallFormat | None:
    """How a chat template has calls written; None where it has no place for tools or another format."""
    if "tools" not in template:
        return None
    if _TAG in template:
        return "tagged" if "<function=" not in template else None
    if "[TOOL_CALLS]" in template:
        return "list"
    return "objects" if '"parameters"' in template else None


def calling_schema(tools: Sequence[Tool], *, is_parallel: bool) -> dict[str, Any]:
    """JSON Schema of a list of calls to these tools, at least one of them. ValueError where two tools mean different
    things by one name of `$defs`, which stand once for all."""
    definitions: dict[str, Any] = {}
    for name, definition in (entry for tool in tools for entry in tool.parameters.get("$defs", {}).items()):
        if definitions.setdefault(name, definition) != definition:
            raise ValueError(f"two tools mean different things by #/$defs/{name}")
    most = {} if is_parallel else {"maxItems": 1}
    shared = {"$defs": definitions} if definitions else {}
    return {
        "type": "array",
        "items": {"anyOf": [_call_schema(tool) for tool in tools]},
        "minItems": 1,
        **most,
        **shared,
    }


def _call_schema(tool: Tool) -> dict[str, Any]:
    own = {name: value for name, value in tool.parameters.items() if name != "$defs"}
    return {
        "type": "object",
        "properties": {"name": {"enum": [tool.name]}, "arguments": {"type": "object", **own}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def read_calls(completion: str, form: CallFormat, *, is_parallel: bool = True) -> Spoken:
    """The text and the calls of a whole completion; the first call alone unless several are wanted at once.

    A completion with a call that cannot be read is text, all of it."""
    place = start_of_calls(completion, form)
    if place is None or (calls := _parsed(completion[place:], form)) is None:
        return Spoken(completion, ())
    return Spoken(completion[:place].rstrip(), calls if is_parallel else calls[:1])


def start_of_calls(text: str, form: CallFormat) -> int | None:
    """Where calls begin, if they do. Only tagged ones may stand behind words."""
    if form == "tagged":
        place = text.find(_TAG)
        return None if place < 0 else place
    start = len(text) - len(text.lstrip())
    return start if text.startswith(_MARKS[form], start) else None


def sayable(text: str, form: CallFormat) -> int:
    """How much of the beginning of a completion cannot become part of a call, whatever follows: characters."""
    place = start_of_calls(text, form)
    if place is not None:
        return len(text[:place].rstrip())
    if form != "tagged":
        begun = text.lstrip()
        may_call = any(mark.startswith(begun) for mark in _MARKS[form])
        return 0 if may_call else len(text)
    held = next((size for size in range(len(_TAG) - 1, 0, -1) if text.endswith(_TAG[:size])), 0)
    # White space before a call belongs to no text.
    return len(text[: len(text) - held].rstrip())


def _parsed(text: str, form: CallFormat) -> tuple[Call, ...] | None:
    if form == "tagged":
        documents = _between_tags(text)
        return None if documents is None else _calls(documents)
    for mark in _MARKS[form][:1]:
        text = text.strip().removeprefix(mark)
    if form == "objects":
        return _calls(_split_objects(text))
    listed = _json(text)
    return _called(listed) if isinstance(listed, list) else None


def _between_tags(text: str) -> list[str] | None:
    """What stands in each pair of tags; None where anything but blanks stands outside of them.

    Each character is looked at a fixed number of times: a model may write tags and blanks for as long as it may write.
    """
    *pairs, rest = text.split(_END_TAG)
    parts = [pair.partition(_TAG) for pair in pairs]
    if rest.strip() or any(before.strip() or not tag for before, tag, _ in parts):
        return None
    return [document.strip() for _, _, document in parts]


def _split_objects(text: str) -> list[str]:
    """JSON objects with semicolons between them; what is none is left for the reader to refuse."""
    found, decoder, place = [], json.JSONDecoder(), 0
    while place < len(text):
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return [text]
        found.append(text[place:end])
        between = re.compile(r"[;\s]*").match(text, end)
        place = between.end() if between else len(text)
    return found


def _calls(documents: Sequence[str]) -> tuple[Call, ...] | None:
    return _called([_json(document) for document in documents])


def _called(values: Sequence[object]) -> tuple[Call, ...] | None:
    calls = [_call(value) for value in values]
    whole = tuple(call for call in calls if call is not None)
    return whole if whole and len(whole) == len(calls) else None


def _call(value: object) -> Call | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, Mapping):
        return None
    return Call(value["name"][:64], json.dumps(arguments, ensure_ascii=False))


def _json(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

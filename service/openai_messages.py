"""What a chat of OpenAI's API may hold: messages, tools, which of them must be called, the form of the answer.

Owns: these objects, their limits, what they are in our own words. Does not own: the rest of the body
(openai_bodies.py), how calls are written and read (bon_algos/tool_calls.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from bon_algos.contracts import Message, Record, Tool, ToolCall
from bon_algos.tool_calls import calling_schema
from service.errors import InvalidField
from service.generation import MAX_TOOLS
from service.json_schema import require_movable, require_schema

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
SCHEMA_MEMBERS: Final = ("parameters", "schema")
"""Members that hold a JSON Schema, where null means something."""
CallId = Annotated[str, Field(min_length=1, max_length=64)]


# --- messages --------------------------------------------------------------------------------------------


class TextPart(Record):
    type: Literal["text"]
    text: str


class CalledFunction(Record):
    name: str = Field(min_length=1, max_length=64)
    arguments: str


class ChatCall(Record):
    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Record):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[tuple[TextPart, ...], Field(fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    """Of the speaker; no template has a place for it."""
    tool_calls: tuple[ChatCall, ...] = Field((), fail_fast=True, max_length=MAX_TOOLS)
    tool_call_id: CallId | None = None

    @property
    def plain(self) -> Message:
        parts = self.content if isinstance(self.content, tuple) else ()
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=self.content if isinstance(self.content, str) else "".join(part.text for part in parts),
            tool_calls=tuple(
                ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
                for call in self.tool_calls
            ),
            tool_call_id=self.tool_call_id,
        )


def plain_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Raises InvalidField for a message that cannot stand where it does."""
    called: set[str] = set()
    for i, message in enumerate(messages):
        _require_place(message, called, f"messages[{i}]")
        called |= {call.id for call in message.tool_calls}
    return tuple(message.plain for message in messages)


def _require_place(message: ChatMessage, called: set[str], param: str) -> None:
    if message.tool_calls and message.role != "assistant":
        raise InvalidField(f"{param}.tool_calls belongs to role assistant", param=f"{param}.tool_calls")
    if message.content is None and not message.tool_calls:
        raise InvalidField(f"{param}.content is required", param=f"{param}.content")
    if (message.role == "tool") != (message.tool_call_id is not None):
        raise InvalidField(f"{param}.tool_call_id belongs to role tool, which needs it", param=f"{param}.tool_call_id")
    if message.tool_call_id is not None and message.tool_call_id not in called:
        raise InvalidField(f"{param}.tool_call_id names no call of an earlier message", param=f"{param}.tool_call_id")


# --- tools -----------------------------------------------------------------------------------------------


class Function(Record):
    name: FunctionName
    description: str | None = Field(None, max_length=16_384)
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False
    """Whether a forced call keeps to the schema: it always does."""


class ChatTool(Record):
    type: Literal["function"]
    function: Function

    @property
    def plain(self) -> Tool:
        return Tool(**self.function.model_dump(exclude={"strict"}))


class NamedFunction(Record):
    name: FunctionName


class NamedTool(Record):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def plain_tools(tools: Sequence[ChatTool], choice: ToolChoice | None) -> tuple[Tool, ...]:
    """The tools that the policy is shown. Raises InvalidField."""
    if choice is not None and not tools:
        raise InvalidField("tool_choice needs tools", param="tool_choice")
    for i, tool in enumerate(tools):
        if tool.function.parameters:
            require_schema(tool.function.parameters, f"tools[{i}].function.parameters")
    if len({tool.function.name for tool in tools}) < len(tools):
        raise InvalidField("tools must have different names", param="tools")
    return () if choice == "none" else tuple(tool.plain for tool in tools)


def forced_calls(tools: Sequence[Tool], choice: ToolChoice | None, *, is_parallel: bool) -> dict[str, Any] | None:
    """The schema of what must be called; None where the policy may choose. Raises InvalidField."""
    if choice is None or choice in ("none", "auto"):
        return None
    if isinstance(choice, NamedTool):
        tools, is_parallel = [tool for tool in tools if tool.name == choice.function.name], False
    if not tools:
        raise InvalidField("tool_choice names none of the tools", param="tool_choice")
    for tool in tools:
        require_movable(tool.parameters, "tools")
    try:
        return calling_schema(tools, is_parallel=is_parallel)
    except ValueError as error:
        raise InvalidField(f"tools cannot be called for: {error}", param="tools") from None


# --- the form of the answer ------------------------------------------------------------------------------


class NamedSchema(Record):
    name: FunctionName
    description: str | None = Field(None, max_length=16_384)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False
    """Every answer keeps to the schema, strict or not."""


class ResponseFormat(Record):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


def prescribed_schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema of the answer; None where it is any text. Raises InvalidField."""
    if form is None:
        return None
    if (form.type == "json_schema") != (form.json_schema is not None):
        raise InvalidField(
            "response_format.json_schema belongs to type json_schema, which needs it",
            param="response_format.json_schema",
        )
    if form.json_schema is None:
        return {"type": "object"} if form.type == "json_object" else None
    require_schema(form.json_schema.schema_, "response_format.json_schema.schema")
    return form.json_schema.schema_

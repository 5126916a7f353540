"""What `POST /v1/completions` and `/v1/chat/completions` accept, and the `/generate` request that it amounts to.

Owns: the fields of OpenAI's API that we honour, their limits, what `model`, `n` and `best_of` mean. Does not own: what
becomes of the request (serving.py), the replies (openai_replies.py). A field that is not here is refused by name.

`n` is how many choices are returned, `best_of` how many candidates the best-of-n arm draws; on `/generate` it is `n`
that says how many are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Final, NamedTuple

from pydantic import BeforeValidator, Field

from bon_algos.contracts import Record
from bon_algos.tool_calls import CallFormat
from service.catalogue import Snapshot
from service.errors import InvalidField, NotFound
from service.generation import MAX_TOOLS, CompletionOptions, GenerateRequest, TokenIds
from service.headers import ARM
from service.openai_messages import (
    ChatMessage,
    ChatTool,
    ResponseFormat,
    ToolChoice,
    forced_calls,
    plain_messages,
    plain_tools,
    prescribed_schema,
)

MAX_LOGPROBS: Final = 20
"""Alternatives to each token."""


class StreamOptions(Record):
    include_usage: bool = False
    """A last chunk without choices says what the request used."""
    bonsai_progress: bool = False
    """Progress as events `bonsai.progress`; otherwise as comments, which clients skip."""
    bonsai_comments: bool = True
    """False for a client that stumbles over comments: then a load balancer may take the silence for the end."""


class Presentation(NamedTuple):
    """What a caller wants to see."""

    choices: int
    """The best so many."""
    logprobs: bool
    alternatives: int
    """To each token."""
    calls: CallFormat | None = None
    """How calls are written; None: there are none to be read."""
    parallel_calls: bool = True


class Body(CompletionOptions):
    """What both endpoints take."""

    model: Annotated[str, Field(min_length=1, max_length=64)]
    """A route, or a policy of the route `default`."""
    n: int = Field(1, ge=1)
    best_of: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    def presentation(self, call_format: CallFormat | None) -> Presentation:
        """call_format: of the policy's chat template."""
        raise NotImplementedError

    @property
    def names(self) -> Mapping[str, str]:
        """Of fields of `/generate` that are called something else here."""
        return {} if self.best_of is None else {"n": "best_of"}

    def _text(self) -> dict[str, object]:
        """The fields of `/generate` that say what is to be continued."""
        raise NotImplementedError

    def as_request(self, route: str, n: int | None) -> GenerateRequest:
        """The same on `/generate`. Raises InvalidField for what one field's type cannot say."""
        shared = self.model_dump(include=CompletionOptions.model_fields.keys() & self.model_fields_set)
        given = {"route": route, "n": n, **shared, **self._text()}
        return GenerateRequest.model_validate({name: value for name, value in given.items() if value is not None})


def _one_prompt(prompt: object) -> object:
    """A list of one prompt may stand for it; a prompt is a text or its token ids."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ValueError(f"must be one text or one list of token ids; got an array of {len(prompt)} prompts")
        prompt = prompt[0]
    return tuple(prompt) if isinstance(prompt, list) else prompt


class CompletionBody(Body):
    """Of `POST /v1/completions`."""

    prompt: Annotated[
        str | TokenIds,
        BeforeValidator(_one_prompt, json_schema_input_type=str | TokenIds | tuple[str] | tuple[TokenIds]),
    ]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def presentation(self, call_format: CallFormat | None) -> Presentation:
        return Presentation(self.n, self.logprobs is not None, self.logprobs or 0)

    @property
    def names(self) -> Mapping[str, str]:
        return {**super().names, "prompt_token_ids": "prompt"}

    def _text(self) -> dict[str, object]:
        return {"prompt" if isinstance(self.prompt, str) else "prompt_token_ids": self.prompt}


class ChatBody(Body):
    """Of `POST /v1/chat/completions`."""

    messages: tuple[ChatMessage, ...] = Field(fail_fast=True, min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: tuple[ChatTool, ...] = Field((), fail_fast=True, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True

    def presentation(self, call_format: CallFormat | None) -> Presentation:
        is_free = self.tool_choice in (None, "auto")
        calls: CallFormat | None = None
        if self.tools and self.tool_choice != "none":
            calls = call_format if is_free else "list"
        return Presentation(self.n, self.logprobs, self.top_logprobs, calls, self.parallel_tool_calls)

    @property
    def names(self) -> Mapping[str, str]:
        limit = {"max_tokens": "max_completion_tokens"} if self.max_tokens is None else {}
        form = "tool_choice" if self.response_format is None else "response_format"
        return {**super().names, **limit, "json_schema": form}

    def _text(self) -> dict[str, object]:
        said = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(said) > 1:
            raise InvalidField("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise InvalidField("top_logprobs needs logprobs: true", param="top_logprobs")
        tools = plain_tools(self.tools, self.tool_choice)
        forced = forced_calls(tools, self.tool_choice, is_parallel=self.parallel_tool_calls)
        prescribed = prescribed_schema(self.response_format)
        if forced is not None and prescribed is not None:
            raise InvalidField("response_format prescribes one answer and tool_choice another", param="response_format")
        return {
            "messages": plain_messages(self.messages),
            "tools": tools,
            "json_schema": forced or prescribed,
            "max_tokens": said.pop() if said else None,
        }


@contextmanager
def in_words_of(body: Body) -> Iterator[None]:
    """What is wrong with the request of `/generate` is said of the field that the caller wrote."""
    try:
        yield
    except InvalidField as error:
        param = error.param or ""
        name = body.names.get(param)
        if name is None:
            raise
        raise InvalidField(
            error.message.replace(param, name, 1), param=name, code=error.code, facts=error.facts
        ) from None


class Addressed(NamedTuple):
    """Who is asked, and for how many candidates."""

    request: GenerateRequest
    forced_arm: str | None


def addressed(body: Body, snapshot: Snapshot, forced_arm: str | None, n_cap: int) -> Addressed:
    """More than one choice is drawn by the base policy's best-of-n, for a distilled policy stands in for one.

    forced_arm: of the header. Raises InvalidField, and NotFound for a model that is neither a route nor a policy.
    """
    _require_counts(body, n_cap)
    route, asked = snapshot.routes.get(body.model), body.best_of or body.n
    if route is not None:
        if body.n == 1 or forced_arm is not None:
            return Addressed(body.as_request(route.name, body.best_of), forced_arm)
        # It is the request's n also where the arm says how many: so its limit is told in its words.
        drawn = body.best_of or max(body.n, route.default_n)
        return Addressed(body.as_request(route.name, drawn), f"base:{drawn}")
    if forced_arm is not None:
        raise InvalidField(f"model must be a route where {ARM} names a policy", param="model")
    if body.model not in snapshot.policies:
        raise NotFound("model is neither a route nor a policy", param="model", code="model_not_found")
    return Addressed(body.as_request("default", asked), f"{body.model}:{asked}")


def _require_counts(body: Body, n_cap: int) -> None:
    for name, count in (("n", body.n), ("best_of", body.best_of)):
        if count is not None and count > n_cap:
            raise InvalidField(f"{name} must be at most {n_cap}; got an integer above it", param=name)
    if body.best_of is not None and body.best_of < body.n:
        raise InvalidField(f"best_of must be at least n, which is {body.n}; got an integer below it", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise InvalidField("stream_options needs stream: true", param="stream_options")

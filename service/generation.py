"""What `POST /generate` accepts, and how it becomes a candidate group that has no candidates yet.

Owns: the fields and their limits, the prompt's tokens and window, the deadline. Does not own: HTTP
(routes/generate.py), which arm answers (experiments.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BeforeValidator, ConfigDict, Field

from bon_algos.chat import ChatTokenizer, TemplateRefused
from bon_algos.contracts import TAG_PATTERN, Message, Record, Route, Sampling, Tool
from service.best_of_n import Budget
from service.errors import InvalidField
from service.headers import TIMEOUT
from service.json_schema import require_schema, require_small

LOWEST_TEMPERATURE: Final = 0.01
"""Below it the engine samples at another temperature than it was told."""
CHARACTERS_PER_TOKEN: Final = 8
"""A prompt longer than this many characters for each token of the window is refused before it is tokenised."""
MAX_LOGIT_BIAS: Final = 300
"""Tokens."""
MAX_TOOLS: Final = 128
MAX_PROMPT_TOKENS: Final = 2**20
"""Named by their ids. The window allows fewer, and is known later."""
MAX_TAGS: Final = 16
TEXT_FIELDS: Final = ("prompt", "messages", "prompt_token_ids")
"""One of them says what is to be continued."""
SCORING_SHARE: Final = 0.2
LONGEST_SCORING_SECONDS: Final = 5.0


def _as_tuple(stop: object) -> object:
    """One stop text may stand alone."""
    if isinstance(stop, str):
        return (stop,)
    return tuple(stop) if isinstance(stop, list) else stop


StopText = Annotated[str, Field(min_length=1, max_length=256)]
_Stops = Annotated[tuple[StopText, ...], Field(fail_fast=True, max_length=16)]
StopTexts = Annotated[_Stops, BeforeValidator(_as_tuple, json_schema_input_type=StopText | _Stops)]
TokenIds = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPT_TOKENS)
]
Unit = Annotated[str, Field(min_length=1, max_length=256)]
Metadata = dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]]


class CompletionOptions(Record):
    """What a request may say on every endpoint that completes, of how and for whom."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1_000_000)
    """0 keeps the whole vocabulary."""
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=MAX_LOGIT_BIAS)
    """By token id, in nats, from −100 to 100."""
    stop: StopTexts = ()
    seed: int | None = Field(None, ge=0, lt=2**63)
    user: Unit | None = None
    metadata: Metadata = Field(default_factory=dict, max_length=16)
    timeout_ms: int | None = Field(None, ge=1)
    quorum: int | None = Field(None, ge=1)
    store: bool | None = None
    """Left out: as its key was made with."""


class GenerateRequest(CompletionOptions):
    """Body of `POST /generate`. None: the caller did not say; null is refused."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [name]} for name in TEXT_FIELDS]})

    prompt: str | None = None
    messages: tuple[Message, ...] | None = Field(None, fail_fast=True, min_length=1, max_length=1000)
    prompt_token_ids: TokenIds | None = None
    tools: tuple[Tool, ...] = Field((), fail_fast=True, max_length=MAX_TOOLS)
    """What the policy is shown that it may call."""
    json_schema: dict[str, Any] | None = None
    """Of what every candidate must be."""
    route: str = Field("default", min_length=1, max_length=64)
    n: int | None = None
    unit: Unit | None = None
    """Whom an experiment's arm sticks to."""
    wait_for_reward: bool = False
    return_candidates: bool = False

    @property
    def text_param(self) -> str:
        """The one field that says what is to be continued."""
        return next((name for name in TEXT_FIELDS if getattr(self, name) is not None), "prompt")

    def sampling(self, max_tokens: int) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in sorted(self.logit_bias.items())),
            stop=self.stop,
            seed=self.seed,
            json_schema=None if self.json_schema is None else json.dumps(self.json_schema, ensure_ascii=False),
        )


class EncodedPrompt(NamedTuple):
    prompt: str
    """As rendered for the policy."""
    token_ids: list[int]


def require_sense(request: GenerateRequest) -> None:
    """What one field's type cannot say. Raises InvalidField."""
    for name in sorted(request.model_fields_set):
        if getattr(request, name) is None:
            raise InvalidField(f"{name} must not be null: leave it out", param=name)
    given = sum(getattr(request, name) is not None for name in TEXT_FIELDS)
    if given != 1:
        raise InvalidField(
            f"exactly one of prompt, messages and prompt_token_ids is required; got {given}", param="prompt"
        )
    if request.prompt is not None:
        _require_text(request.prompt, "prompt")
    for i, message in enumerate(request.messages or ()):
        if not message.tool_calls and message.role != "tool":
            _require_text(message.content, f"messages[{i}].content")
    if request.tools and request.messages is None:
        raise InvalidField("tools needs messages: no other text has a place for them", param="tools")
    for i, tool in enumerate(request.tools):
        if tool.parameters:
            require_schema(tool.parameters, f"tools[{i}].parameters")
    if request.json_schema is not None:
        require_schema(request.json_schema, "json_schema")
        require_small(request.json_schema, "json_schema")
    tags = tags_of(request)
    if len(tags) > MAX_TAGS or not all(re.fullmatch(TAG_PATTERN, tag) for tag in tags):
        raise InvalidField(
            f"metadata.tags must be at most {MAX_TAGS} tags with commas between them, each of at most 64 letters, "
            "digits, _ . : / and -",
            param="metadata.tags",
        )
    if math.copysign(1, request.temperature) < 0 or 0 < request.temperature < LOWEST_TEMPERATURE:
        raise InvalidField(f"temperature must be 0 or at least {LOWEST_TEMPERATURE} and at most 2", param="temperature")


def require_tokens(logit_bias: Mapping[str, float], vocabulary: int) -> None:
    """Every key is a token of the policy, every bias one the engine takes. Raises InvalidField."""
    for token, bias in logit_bias.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9 and int(token) < vocabulary):
            raise InvalidField(
                f"logit_bias must have token ids from 0 to {vocabulary - 1} as its names", param="logit_bias"
            )
        if not -100 <= bias <= 100:
            raise InvalidField("logit_bias must have numbers from -100 to 100 as its values", param="logit_bias")


def asked_n(body: int | None, query: Mapping[str, str], n_cap: int) -> int | None:
    """The n of the request, from body or query; both only if they are equal. Raises InvalidField."""
    in_query = query.get("n")
    if in_query is None:
        named = body
    elif not (in_query.isascii() and in_query.isdigit()) or in_query.startswith("0"):
        raise InvalidField("n in the query must be a positive integer without sign or leading zero", param="n")
    else:
        # More digits than any cap has: far above it, whatever they are.
        named = int(in_query[:20])
        if body is not None and body != named:
            raise InvalidField("n in the query and in the body differ", param="n")
    if named is not None and not 1 <= named <= n_cap:
        side = "below" if named < 1 else "above"
        raise InvalidField(f"n must be at least 1 and at most {n_cap}; got an integer {side} it", param="n")
    return named


def encode(request: GenerateRequest, tokenizer: ChatTokenizer, window: int) -> EncodedPrompt:
    """The prompt as the policy reads it. window: the policy's, tokens. Raises InvalidField."""
    param, longest = request.text_param, CHARACTERS_PER_TOKEN * window
    characters = _characters(request)
    if characters > longest:
        raise InvalidField(f"{param} must be at most {longest} characters long; got {characters}", param=param)
    if request.prompt_token_ids is not None:
        token_ids = list(request.prompt_token_ids)
        _require_room(len(token_ids), window, param)
        if max(token_ids) >= tokenizer.vocabulary_size:
            raise InvalidField(f"{param} must have token ids below {tokenizer.vocabulary_size}", param=param)
        prompt = tokenizer.decode(token_ids)
    elif request.messages is None:
        prompt = request.prompt or ""
        token_ids = tokenizer.encode_prompt(prompt)
    else:
        prompt, token_ids = _conversation(request.messages, request.tools, tokenizer)
    _require_room(len(token_ids), window, param)
    return EncodedPrompt(prompt, token_ids)


def _require_room(tokens: int, window: int, param: str) -> None:
    if tokens + 1 > window:
        raise InvalidField(
            f"{param} must be at most {window - 1} tokens long, to leave room for one more in a window of {window}; "
            f"got {tokens}",
            param=param,
        )


def _characters(request: GenerateRequest) -> int:
    calls = sum(len(call.arguments) for message in request.messages or () for call in message.tool_calls)
    tools = sum(len(tool.model_dump_json()) for tool in request.tools)
    return len(request.prompt or "") + sum(len(message.content) for message in request.messages or ()) + calls + tools


def _conversation(
    messages: Sequence[Message], tools: Sequence[Tool], tokenizer: ChatTokenizer
) -> tuple[str, list[int]]:
    if tools and tokenizer.call_format is None:
        raise InvalidField(
            "the policy's chat template has no place for tools in a form that is read here", param="tools"
        )
    if any(message.tool_calls for message in messages) and not tokenizer.shows_calls:
        raise InvalidField("the policy's chat template has no place for tool calls", param="messages")
    try:
        return tokenizer.encode_messages(messages, add_generation_prompt=True, tools=tools)
    except TemplateRefused as error:
        raise InvalidField(f"the chat template refuses the messages: {error}", param="messages") from None


def fitting_max_tokens(asked: int | None, default: int, prompt_tokens: int, window: int) -> int:
    """Tokens a candidate may have: what was asked if the window has room for it, else an error; the route's default
    is lowered to what fits."""
    room = window - prompt_tokens
    if asked is None:
        return min(default, room)
    if asked > room:
        raise InvalidField(
            f"max_tokens must be at most {room} behind a prompt of {prompt_tokens} tokens in a window of {window}; "
            "got an integer above it",
            param="max_tokens",
        )
    return asked


def asked_timeout(body: int | None, header: str | None, deadline_ms: int) -> int | None:
    """Milliseconds, from the body or the header x-bonsai-timeout; both only if they are equal. Raises InvalidField."""
    named, param = body, "timeout_ms"
    if header is not None:
        param = TIMEOUT
        if not re.fullmatch("[1-9][0-9]*", header):
            raise InvalidField(f"{param} must be a positive integer without sign or leading zero", param=param)
        # More digits than any deadline has: far above it, whatever they are.
        named = int(header[:20])
    if named is not None and named > deadline_ms:
        raise InvalidField(f"{param} must be at most {deadline_ms}; got an integer above it", param=param)
    if body is not None and body != named:
        raise InvalidField(f"{param} and timeout_ms differ", param=param)
    return named


def budget_of(
    request: GenerateRequest, route: Route, n: int, started: float, *, first: int, timeout_ms: int | None
) -> Budget:
    """The deadline, the slice of it kept for scoring, and the quorum. first: candidates of the first wave, n where it
    is the only one. timeout_ms: the caller's. Raises InvalidField."""
    if request.quorum is not None and request.quorum > n:
        raise InvalidField(f"quorum must be at most n, which is {n}; got an integer above it", param="quorum")
    seconds = (timeout_ms or route.deadline_ms) / 1000
    scoring = min(SCORING_SHARE * seconds, LONGEST_SCORING_SECONDS) if n > 1 or request.wait_for_reward else 0.0
    return Budget(
        started=started,
        deadline=started + seconds,
        scoring_starts=started + seconds - scoring,
        quorum=min(request.quorum or route.quorum or math.ceil(first / 2), first),
    )


def session_of(request: GenerateRequest) -> str:
    """Which groups belong together: `metadata.session`, else whatever begins with the same message."""
    first = repr(request.prompt_token_ids) if request.prompt is None else request.prompt
    if request.messages is not None:
        first = request.messages[0].content
    named = request.metadata.get("session")
    return named if named is not None else sha256(first.encode()).hexdigest()[:16]


def tags_of(request: GenerateRequest) -> tuple[str, ...]:
    """What the caller calls it, `metadata.tags`, each once."""
    named = request.metadata.get("tags")
    return () if named is None else tuple(dict.fromkeys(tag.strip() for tag in named.split(",")))


def _require_text(text: str, param: str) -> None:
    if not text.strip():
        raise InvalidField(f"{param} must not be empty or blank; got a string of {len(text)} characters", param=param)

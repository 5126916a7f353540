"""The HTTP schema by which any program can be a reward model: pure functions over JSON, no I/O.

    GET  /v1/models  ->  {"data": [{"id": NAME}]}
    POST /score      {"model": NAME, "prompt": str, "messages": [OpenAI's message, …] | null, "completions": [str, …]}
                 ->  {"rewards": [number | null, …], "reasons": [str | null, …]}

One reward for each completion, in order; null: it has none. `reasons` may be left out. A program that does not serve
NAME answers 404, one that has no room 429 or 503.

Owns: this schema. Does not own: how a vLLM server is asked (`vllm_protocol`), what becomes of answers (`scoring`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bon_algos.contracts import Message
from bon_algos.vllm_protocol import MalformedReply, as_float

LONGEST_REASON = 200
"""Characters of a reason that are kept."""


class Verdict(NamedTuple):
    """What was said of one completion."""

    reward: float | None
    """Possibly not finite: for the caller to refuse."""
    reason: str = ""


def score_request(
    model: str, prompt: str, messages: Sequence[Message] | None, completions: Sequence[str]
) -> dict[str, Any]:
    """Body of the POST. prompt: as the policy reads it; messages: as the caller sent them, if it did."""
    turns = None if messages is None else [_openai_message(message) for message in messages]
    return {"model": model, "prompt": prompt, "messages": turns, "completions": list(completions)}


def _openai_message(message: Message) -> dict[str, Any]:
    """What a message does not have is not there."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    return {
        "role": message.role,
        "content": message.content,
        **({"tool_calls": calls} if calls else {}),
        **({} if message.tool_call_id is None else {"tool_call_id": message.tool_call_id}),
    }


def parse_score(body: Mapping[str, Any], count: int) -> list[Verdict]:
    """One verdict for each completion, in order. Raises MalformedReply when one is missing or no number."""
    rewards, reasons = body.get("rewards"), body.get("reasons")
    if not isinstance(rewards, list) or len(rewards) != count:
        raise MalformedReply(f"`rewards` is not a list of {count}")
    if reasons is not None and (not isinstance(reasons, list) or len(reasons) != count):
        raise MalformedReply(f"`reasons` is not a list of {count}")
    return [
        Verdict(_reward(reward), _reason(reason))
        for reward, reason in zip(rewards, reasons or [None] * count, strict=True)
    ]


def _reward(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedReply("a reward is neither a number nor null")
    return as_float(value)


def _reason(value: object) -> str:
    """Of one line, whatever was sent."""
    if value is not None and not isinstance(value, str):
        raise MalformedReply("a reason is neither a text nor null")
    return " ".join((value or "").split())[:LONGEST_REASON]

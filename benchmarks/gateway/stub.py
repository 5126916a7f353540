"""A policy engine and a reward model that answer at once with what vLLM would say, in a process of their own.

Owns: their wire format, byte for byte as long as vLLM's, and the fixed time they take. Does not own: who asks. Peers
that ask the policy itself what candidates are worth get an opinion as fast as we get scores.

Answers are made beforehand: what is measured waits for nothing that is computed here. Completions are what the demo's
tokenizer makes of the demo's prompts, cut at random; log-probs are random.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
from aiohttp import web
from tokenizers import Tokenizer

from benchmarks.stub_stack import POLICY, REWARD_MODEL
from bonsai.demo.prompts import training_prompts
from bonsai.stack_plan import SHIPPED_MODELS

N: Final = 16
TOKENS: Final = 32
"""Of each candidate."""
DRAWING_SECONDS: Final = 0.02
SCORING_SECONDS: Final = 0.005
VARIANTS: Final = 32
"""Different answers, by turns."""
OPTILLM_ASKS: Final = "Rate the above response:"
"""The last message where optillm wants a number."""


class Stub:
    def __init__(self) -> None:
        self._streams = itertools.cycle(_stream(seed) for seed in range(VARIANTS))
        self._seeds = itertools.cycle(range(VARIANTS))
        self._opinions = itertools.cycle(range(N))
        self._calls = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/calls", self._told_calls)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/classify", self._classify)
        return app

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": POLICY}, {"id": REWARD_MODEL}]})

    async def _told_calls(self, _: web.Request) -> web.Response:
        return web.Response(text=str(self._calls))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self._calls += 1
        body = await request.read()
        if b'"stream": true' not in body and b'"stream":true' not in body:  # the canary
            return web.json_response({"choices": [_choice(0, " a", ["a"], [5], [-0.5], "length")]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        first, rest = next(self._streams)
        await asyncio.sleep(DRAWING_SECONDS / 2)
        await response.write(first)
        await asyncio.sleep(DRAWING_SECONDS / 2)
        for chunk in rest:
            await response.write(chunk)
        return response

    async def _chat(self, request: web.Request) -> web.Response:
        """A whole reply to OpenAI's clients: n texts, with their tokens where asked for; or an opinion, where that is
        asked for."""
        self._calls += 1
        asked = await request.json()
        if (opinion := self._opinion(asked)) is not None:
            await asyncio.sleep(SCORING_SECONDS)
            return _json(_chat_reply([_message(0, opinion, "stop")]))
        await asyncio.sleep(DRAWING_SECONDS)
        return _json(_drawn_chat(next(self._seeds), asked.get("n") or 1, bool(asked.get("return_token_ids"))))

    def _opinion(self, asked: Mapping[str, Any]) -> str | None:
        if asked["messages"][-1]["content"] == OPTILLM_ASKS:
            return str(next(self._opinions) % 11)
        if "response_format" in asked:  # TensorZero's judge
            return json.dumps({"thinking": "It keeps to what was asked.", "answer_choice": next(self._opinions)})
        return None

    async def _classify(self, request: web.Request) -> web.Response:
        self._calls += 1
        asked = await request.json()
        await asyncio.sleep(SCORING_SECONDS)
        return _json(_scores(len(asked["input"])))


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


@cache
def _drawn_chat(seed: int, n: int, with_tokens: bool) -> bytes:
    choices = []
    for i, (text, ids, logprobs) in enumerate(completions(seed)[:n]):
        told = {"token_ids": ids, "logprobs": _of_tokens(_words(text), logprobs)} if with_tokens else {}
        choices.append({**_message(i, text, "length"), **told})
    return _chat_reply(choices)


def _of_tokens(words: list[str], logprobs: list[float]) -> dict[str, Any]:
    pairs = zip(words, logprobs, strict=False)
    return {"content": [{"token": w, "logprob": p, "bytes": list(w.encode()), "top_logprobs": []} for w, p in pairs]}


def _message(index: int, text: str, reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}


def _chat_reply(choices: Sequence[Mapping[str, Any]]) -> bytes:
    drawn = TOKENS * len(choices)
    usage = {"prompt_tokens": 30, "completion_tokens": drawn, "total_tokens": 30 + drawn}
    head = {"id": "chatcmpl-0", "object": "chat.completion", "created": 1_800_000_000, "model": POLICY}
    return json.dumps({**head, "choices": choices, "usage": usage}).encode()


def completions(seed: int) -> list[tuple[str, list[int], list[float]]]:
    """Text, token ids and log-probs of each candidate."""
    tokenizer = Tokenizer.from_file(str(SHIPPED_MODELS / "policy" / "tokenizer.json"))
    ids = _corpus(tokenizer)
    generator = np.random.default_rng(seed)
    found = []
    for start in generator.integers(0, len(ids) - TOKENS, N):
        cut = ids[start : start + TOKENS]
        logprobs = (-generator.exponential(1.5, TOKENS)).astype(np.float32).astype(float).tolist()
        found.append((tokenizer.decode(cut), cut, logprobs))
    return found


@cache
def _text() -> str:
    return " ".join(training_prompts())


def _corpus(tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode(_text(), add_special_tokens=False).ids
    return ids


def _stream(seed: int) -> tuple[bytes, list[bytes]]:
    """What goes out with the first token, and then a piece for each candidate: an interval of `max_tokens` tokens."""
    firsts, rests = [], []
    for i, (text, ids, logprobs) in enumerate(completions(seed)):
        words = _words(text)
        firsts.append(_event(_choice(i, words[0], words[:1], ids[:1], logprobs[:1], None)))
        rests.append(_event(_choice(i, text[len(words[0]) :], words[1:TOKENS], ids[1:], logprobs[1:], "length")))
    return b"".join(firsts), [*rests[:-1], rests[-1] + b"data: [DONE]\n\n"]


def _words(text: str) -> list[str]:
    """Stand for tokens: at least as many."""
    return [f" {word}" for word in text.split()] + [" ."] * TOKENS


def _event(choice: dict[str, Any]) -> bytes:
    head = {"id": f"cmpl-{'0' * 32}", "object": "text_completion", "created": 1_800_000_000, "model": POLICY}
    told = json.dumps({**head, "choices": [choice]}, separators=(",", ":"))
    return b"data: " + told.encode() + b"\n\n"


def _choice(
    index: int, text: str, words: list[str], ids: list[int], logprobs: list[float], reason: str | None
) -> dict[str, Any]:
    told = {
        "text_offset": list(range(0, 6 * len(ids), 6)),
        "token_logprobs": logprobs,
        "tokens": words,
        "top_logprobs": [{word: logprob} for word, logprob in zip(words, logprobs, strict=False)],
    }
    return {
        "index": index,
        "text": text,
        "logprobs": told,
        "finish_reason": reason,
        "stop_reason": None,
        "token_ids": ids,
        "prompt_token_ids": None,
    }


@cache
def _scores(count: int) -> bytes:
    rewards = np.random.default_rng(0).normal(size=count).tolist()
    data = [{"index": i, "label": "LABEL_0", "probs": [one], "num_classes": 1} for i, one in enumerate(rewards)]
    return json.dumps({"id": "classify-0", "object": "list", "model": REWARD_MODEL, "data": data}).encode()


def main() -> None:
    """argv: a port of loopback."""
    web.run_app(Stub().app(), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=lambda _: None)

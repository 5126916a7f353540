"""A policy engine that says what a test told it to say, with vLLM's wire format and scripted faults.

For faults and for the gateway's own speed only; tests/contract plays the same calls to this and to the real engine.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from aiohttp import web

from bon_algos.vllm_protocol import CANARY_PRIORITY
from tests.stubs.tokenizer import token_ids

T = TypeVar("T")
Fault = Literal[
    "none",
    "busy",  # 503: the queue is full
    "error",  # 500
    "refused",  # 400: a field it does not take
    "refused_inside",  # the same in a stream: 200, and a 400 instead of a choice
    "silent",  # accepts, then never says a word
    "stalls",  # a first piece, and then not a word
    "cut",  # the connection breaks in the middle of the stream
    "no_end",  # the stream ends without [DONE]
    "garbage",  # not JSON
    "error_inside",  # 200, and an error instead of a choice
    "one_missing",  # n - 1 candidates, then a regular end
    "wrong_index",
    "nan_logprob",
    "endless",  # bytes without end
]


@dataclass
class EngineScript:
    """What the engine does next. A test may replace any field at any time."""

    completions: list[str] = field(default_factory=lambda: ["a fine answer"])
    """Candidate i says completions[i % len]."""
    finish_reasons: list[str] = field(default_factory=lambda: ["stop"])
    delays: list[float] = field(default_factory=lambda: [0.0])
    """Seconds from the start until candidate i has finished."""
    fault: Fault = "none"
    logprob: float = -0.5
    alternatives: dict[int, float] = field(default_factory=dict)
    """Token id to log-prob, said of every token where alternatives are asked for by their ids."""
    models: list[str] = field(default_factory=list)
    """The base first."""
    roots: dict[str, str] = field(default_factory=dict)
    """Where adapters were loaded from."""
    own_logprobs: dict[str, float] = field(default_factory=dict)
    """Of models that do not answer with `logprob`."""
    unknown: set[str] = field(default_factory=set)
    """Models that are listed and 404 when they are asked for."""
    load_fault: str = ""
    """Why no adapter can be loaded: 500."""


class StubEngine:
    """Keeps the requests it saw and when a client left one of them."""

    def __init__(self, base: str) -> None:
        self.script = EngineScript(models=[base])
        self.requests: list[dict[str, Any]] = []
        """Without canaries, which are no traffic."""
        self.heads: list[Mapping[str, str]] = []
        """The headers of the same."""
        self.num_canaries = 0
        self.num_lists = 0
        self.aborted_at: list[float] = []
        """time.monotonic() of each stream that its client closed."""
        self.active = 0
        self.most_active = 0
        self.started_at: float | None = time.time()
        self.changes: list[tuple[str, str]] = []
        """(load or unload, policy), as they were asked for."""

    def restart(self) -> None:
        """Another life of the process: of its adapters it knows nothing."""
        self.started_at = time.time()
        del self.script.models[1:]
        self.script.roots.clear()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        return app

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        script = self.script
        if body["priority"] == CANARY_PRIORITY:
            self.num_canaries += 1
        else:
            self.requests.append(body)
            self.heads.append(request.headers)
        if body["model"] not in script.models or body["model"] in script.unknown:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if (status := {"busy": 503, "error": 500, "refused": 400}.get(script.fault)) is not None:
            return web.json_response({"error": {}}, status=status)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            if not body.get("stream"):
                if script.fault == "silent":
                    await asyncio.Event().wait()
                return web.json_response(_whole(body, script))
            return await self._stream(request, body, script)
        except asyncio.CancelledError:
            self.aborted_at.append(time.monotonic())
            raise
        finally:
            self.active -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], script: EngineScript) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if script.fault == "silent":
            await asyncio.Event().wait()
        if script.fault == "endless":
            while True:
                await response.write(b"data: " + b" " * 65_536)
        started = time.monotonic()
        order = sorted(range(body["n"]), key=lambda i: _cycled(script.delays, i))
        for sent, i in enumerate(order):
            if script.fault == "one_missing" and sent == len(order) - 1:
                break
            if script.fault == "cut" and sent == len(order) // 2:
                assert request.transport is not None
                request.transport.abort()
                return response
            rest = started + _cycled(script.delays, i) - time.monotonic()
            if rest > 0:
                await asyncio.sleep(rest)
            for chunk in _chunks(body, script, i):
                await response.write(b"data: " + chunk + b"\n\n")
                if script.fault == "stalls":
                    await asyncio.Event().wait()
        if script.fault != "no_end":
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _models(self, _request: web.Request) -> web.Response:
        self.num_lists += 1
        cards = [{"id": name, "root": self.script.roots.get(name)} for name in self.script.models]
        return web.json_response({"object": "list", "data": cards})

    async def _metrics(self, _request: web.Request) -> web.Response:
        if self.started_at is None:
            return web.Response(status=404)
        return web.Response(
            text=f"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds {self.started_at}\n"
        )

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, directory = body["lora_name"], Path(body["lora_path"])
        self.changes.append(("load", name))
        if self.script.load_fault:
            return web.json_response({"error": {"message": self.script.load_fault}}, status=500)
        if name in self.script.models:
            return web.json_response({"error": {"message": f"'{name}' has already been loaded."}}, status=400)
        if not (directory / "adapter_config.json").exists():
            return web.json_response({"error": {"message": "no adapter found"}}, status=404)
        self.script.models.append(name)
        self.script.roots[name] = str(directory)
        return web.Response(text="Success")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.changes.append(("unload", name))
        if name not in self.script.models:
            return web.json_response({"error": {"message": f"'{name}' cannot be found."}}, status=404)
        self.script.models.remove(name)
        return web.Response(text="Success")


def _cycled(values: list[T], index: int) -> T:
    return values[index % len(values)]


def _chunks(body: dict[str, Any], script: EngineScript, i: int) -> list[bytes]:
    """Two chunks as vLLM sends them with a large stream_interval: the first token, then the rest."""
    if script.fault == "garbage":
        return [b'{"choices": [']
    if script.fault == "refused_inside":
        return [b'{"error": {"message": "secret detail", "code": 400}}']
    if script.fault == "error_inside":
        return [b'{"error": {"message": "secret detail"}}']
    text = _cycled(script.completions, i)
    index = body["n"] + 3 if script.fault == "wrong_index" else i
    first, rest = _choice(index, text[:1], script), _choice(index, text[1:], script)
    rest["finish_reason"] = _cycled(script.finish_reasons, i)
    if body.get("return_tokens_as_token_ids"):
        for part in (first, rest):
            told = {f"token_id:{token}": logprob for token, logprob in script.alternatives.items()}
            part["logprobs"]["top_logprobs"] = [told] * len(part["token_ids"])
    return [json.dumps({"object": "text_completion", "choices": [part]}).encode() for part in (first, rest)]


def _choice(index: int, text: str, script: EngineScript) -> dict[str, Any]:
    ids = token_ids(text)
    logprob = float("nan") if script.fault == "nan_logprob" else script.logprob
    return {
        "index": index,
        "text": text,
        "logprobs": {"token_logprobs": [logprob] * len(ids)},
        "finish_reason": None,
        "token_ids": ids,
    }


def _whole(body: dict[str, Any], script: EngineScript) -> dict[str, Any]:
    """An answer that is not streamed: candidates, or the one token that is allowed."""
    choices = []
    for i in range(body.get("n", 1)):
        choice = _choice(i, _cycled(script.completions, i), script)
        choice["finish_reason"] = _cycled(script.finish_reasons, i)
        if (only := body.get("allowed_token_ids")) is not None:
            logprob = script.own_logprobs.get(body["model"], script.logprob)
            choice |= {"token_ids": only[:1], "logprobs": {"token_logprobs": [logprob]}}
        choices.append(choice)
    return {"object": "text_completion", "choices": choices}

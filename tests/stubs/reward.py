"""A reward model whose scores a test chooses, with vLLM's `/classify` format and scripted faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

from tests.stubs.tokenizer import text_of

Fault = Literal["none", "busy", "error", "silent", "one_missing", "doubled", "two_labels", "garbage"]


@dataclass
class RewardScript:
    score: Callable[[str], float | None] = field(default=lambda text: float(len(text)))
    """Of the text the reward model reads. None is sent as null, as NaN is by vLLM."""
    delay: float = 0.0
    fault: Fault = "none"
    is_reversed: bool = False
    """Scores come in another order; their indices are right."""


class StubReward:
    """Keeps the requests it saw."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.script = RewardScript()
        self.requests: list[dict[str, Any]] = []
        self.heads: list[Mapping[str, str]] = []
        """The headers of the same."""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/classify", self._classify)
        app.router.add_get("/v1/models", self._models)
        return app

    @property
    def texts(self) -> list[str]:
        """Everything that was scored, in the order in which it came."""
        return [_text(one) for request in self.requests for one in request["input"]]

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model}]})

    async def _classify(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.heads.append(request.headers)
        script = self.script
        if script.fault in ("busy", "error"):
            return web.json_response({"error": {}}, status=503 if script.fault == "busy" else 500)
        if script.fault == "silent":
            await asyncio.Event().wait()
        await asyncio.sleep(script.delay)
        data = [{"index": i, "probs": [script.score(_text(one))]} for i, one in enumerate(body["input"])]
        if script.is_reversed:
            data.reverse()
        if script.fault == "one_missing":
            data = data[:-1]
        if script.fault == "doubled":
            data[-1]["index"] = data[0]["index"]
        if script.fault == "two_labels":
            data[0]["probs"] = [0.0, 1.0]
        if script.fault == "garbage":
            return web.Response(text="<html>", content_type="text/html")
        return web.json_response({"object": "list", "data": data})


def _text(one: str | list[int]) -> str:
    """vLLM takes both."""
    return one if isinstance(one, str) else text_of(one)


ScoreFault = Literal[
    "none", "busy", "error", "silent", "gone", "one_missing", "one_more", "text", "boolean", "no_list", "garbage",
    "reason_of_no_text", "endless",
]  # fmt: skip
BROKEN_SCORES: tuple[ScoreFault, ...] = (
    "error", "one_missing", "one_more", "text", "boolean", "no_list", "garbage", "reason_of_no_text", "endless",
)  # fmt: skip
"""Answers that break the schema, or are none."""


@dataclass
class ScoreScript:
    score: Callable[[str], object] = field(default=lambda text: float(len(text)))
    """Of a completion's text; sent as it is, so also null and NaN."""
    reasons: list[str | None] | None = None
    fault: ScoreFault = "none"


class StubScore:
    """A program that speaks our own schema, with scripted faults. Keeps the requests it saw."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.script = ScoreScript()
        self.requests: list[dict[str, Any]] = []

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/score", self._score)
        app.router.add_get("/v1/models", self._models)
        return app

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model}]})

    async def _score(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        fault = self.script.fault
        if fault in ("busy", "error", "gone"):
            return web.json_response({"error": {}}, status={"busy": 503, "error": 500, "gone": 404}[fault])
        if fault == "silent":
            await asyncio.Event().wait()
        if fault == "garbage":
            return web.Response(text="<html>", content_type="text/html")
        if fault == "endless":
            return await _endless(request)
        rewards: list[object] = [self.script.score(text) for text in body["completions"]]
        if fault == "one_missing":
            rewards = rewards[:-1]
        if fault == "one_more":
            rewards = [*rewards, 1.0]
        if fault in ("text", "boolean"):
            rewards[0] = "1.0" if fault == "text" else True
        if fault == "no_list":
            return web.json_response({"rewards": 1.0})
        reasons = [1] * len(rewards) if fault == "reason_of_no_text" else self.script.reasons
        return web.json_response({"rewards": rewards} | ({} if reasons is None else {"reasons": reasons}))


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    try:
        while True:
            await response.write(b" " * 65_536)
    finally:
        # What is still to be sent would keep the connection open beyond the stub's end.
        if request.transport is not None:
            request.transport.abort()

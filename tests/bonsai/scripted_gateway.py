"""A gateway that speaks the public API and answers from a script; for the client and the demo's traffic.

Rewards are those of the script, in drawing order; every request is kept.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from bonsai.client import BonsaiClient, open_client


class ScriptedGateway:
    """Answers /generate with the given rewards, the n-th candidate of a prompt with the n-th reward."""

    def __init__(
        self,
        rewards: Sequence[float | None] = (1.0,),
        *,
        seconds: float = 0.0,
        jobs: Sequence[dict[str, Any]] = (),
        policies: Sequence[dict[str, Any]] = (),
    ) -> None:
        """`jobs` and `policies` are what successive looks at a job or a policy see."""
        self._rewards, self._seconds = rewards, seconds
        self._jobs, self._policies = iter(jobs), iter(policies)
        self.requests: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0

    @asynccontextmanager
    async def client(self) -> AsyncIterator[BonsaiClient]:
        app = web.Application()
        app.add_routes([web.post("/generate", self._generate), web.get("/distill/{job}", self._job)])
        app.add_routes([web.get("/policies/{policy}", self._policy)])
        async with TestServer(app) as server, open_client(str(server.make_url("/"))) as client:
            yield client

    async def _generate(self, request: web.Request) -> web.Response:
        body = {**await request.json(), "query": dict(request.query), "headers": dict(request.headers)}
        self.requests.append(body)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(self._seconds)
        self.under_way -= 1
        arm = request.headers.get("x-bonsai-arm", "base:1")
        n = int(request.query.get("n", arm.rsplit(":")[-1]))
        return web.json_response(self._answer(arm, n, [self._rewards[i % len(self._rewards)] for i in range(n)]))

    @staticmethod
    def _answer(arm: str, n: int, rewards: list[float | None]) -> dict[str, Any]:
        best = max(range(n), key=lambda i: -1e9 if rewards[i] is None else float(rewards[i] or 0))
        choices = [
            {
                "index": i,
                "text": f"completion {i}",
                "reward": reward,
                "finish_reason": "stop",
                "failure": None if reward is not None else "reward_error",
                "tokens": 5,
                "logprob": -4.0,
                "selected": i == best,
            }
            for i, reward in enumerate(rewards)
        ]
        return {
            "id": "resp_1",
            "object": "bonsai.generation",
            "created": 1,
            "route": "default",
            "completion": f"completion {best}",
            "finish_reason": "stop",
            "reward": rewards[best],
            "arm": arm,
            "arm_reason": "forced",
            "experiment": None,
            "policy": "pol-0123456789abcdef",
            "candidates": {"requested": n, "finished": n, "scored": n, "failed": {}},
            "selection": {"status": "ok", "reward_model": "rm-0", "reward": rewards[best], "margin": None},
            "usage": {"prompt_tokens": 7, "completion_tokens": 5, "discarded_tokens": 5 * (n - 1), "total_tokens": 7},
            "warnings": [],
            "choices": choices,
        }

    async def _job(self, request: web.Request) -> web.Response:
        job = next(self._jobs, None)
        return _not_found() if job is None else web.json_response({"id": request.match_info["job"], **job})

    async def _policy(self, request: web.Request) -> web.Response:
        policy = next(self._policies, None)
        if policy is None:
            return _not_found()
        bare = {"id": request.match_info["policy"], "state": "candidate", "served": False, "fingerprint": None}
        return web.json_response({**bare, "manifest": None, **policy})


def _not_found() -> web.Response:
    error = {"message": "no such job", "type": "invalid_request_error", "param": None, "code": "job_not_found"}
    body = {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "no such job", "error": error}
    return web.json_response(body, status=404, content_type="application/problem+json")

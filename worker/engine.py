"""The worker's client of the engines: sampling, scoring, adapters.

Owns sockets, bounds and the translation of what goes wrong. Does not own what is said (`vllm_protocol`, `scoring`) nor
how long to be patient (`patience`). Synchronous on the outside, for a training loop; parallel on the inside.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import aiohttp

from bon_algos.contracts import Candidate, RewardConfig, Sampling
from bon_algos.scoring import Completion, Reader, Score, combined, template_digest_of
from bon_algos.vllm_protocol import (
    ROLLOUT_PRIORITY,
    Json,
    completion_request,
    parse_completion,
)
from worker.errors import EngineUnavailable, JobFailed

REQUEST_TIMEOUT_SECONDS = 180.0
REQUESTS_IN_FLIGHT = 48
"""Enough to fill an engine's batch; what waits here is not waiting inside the engine in front of users."""
MAX_REPLY_BYTES = 64 * 2**20
CHECK_SECONDS = 0.5
UNLOAD_SECONDS = 10.0
"""A job that stops waits so long for its adapter to be forgotten."""

Result = TypeVar("Result")


class Draw(NamedTuple):
    """n candidates of one prompt from one model, under one law."""

    model: str
    prompt_ids: Sequence[int]
    sampling: Sampling
    n: int


class Engines:
    """The policy engine and the members of the reward model, for one job. `check` is asked twice a second while a
    call is under way; when it raises, the call is aborted: a cancelled or fenced job stops waiting."""

    def __init__(
        self, policy_url: str, reward_model: RewardConfig, readers: Sequence[Reader], check: Callable[[], None]
    ) -> None:
        """readers: one for each member of the reward model."""
        self._members = [f"reward {member.id}" for member in reward_model.members]
        self._urls = {"policy": policy_url}
        self._urls |= {name: one.url for name, one in zip(self._members, reward_model.members, strict=True)}
        self._reward_model = reward_model
        self._readers = readers
        self.reward_model_id = reward_model.id
        self.reward_template_digest = template_digest_of(readers)
        self._check = check
        self._runner = asyncio.Runner()
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    def __enter__(self) -> Self:
        self._runner.run(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._close())
        self._runner.close()

    def sample(self, draws: Sequence[Draw]) -> list[list[Candidate]]:
        """The candidates of each draw, in order; all draws in parallel, behind users' requests."""

        def one(draw: Draw) -> Coroutine[Any, Any, list[Candidate]]:
            body = completion_request(
                draw.model, draw.prompt_ids, draw.n, draw.sampling, stream=False, priority=ROLLOUT_PRIORITY
            )
            return self._post("policy", "/v1/completions", body, lambda answer: parse_completion(answer, draw.n))

        return self._run_all([one(draw) for draw in draws])

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        """One score for each completion, in order: of every member, all in parallel, as the gateway scores."""
        asked = [reader.ask(completions) for reader in self._readers]
        calls = [(name, own, call) for name, own in zip(self._members, asked, strict=True) for call in own.calls]
        found = self._run_all([self._post(name, call.path, call.body, call.read) for name, _, call in calls])
        for (_, own, call), scores in zip(calls, found, strict=True):
            for place, score in zip(call.places, scores, strict=True):
                own.scores[place] = score
        return combined(self._reward_model, [own.scores for own in asked])

    def load_adapter(self, name: str, directory: Path) -> None:
        """Have the policy engine serve an adapter under a name that was never used before."""
        body = {"lora_name": name, "lora_path": str(directory.resolve())}
        self._run_all([self._request("policy", "POST", "/v1/load_lora_adapter", body)])

    def unload_adapter(self, name: str) -> None:
        """Have the policy engine forget an adapter; one it does not know is forgotten already. Done even when the job
        must stop, since nobody else would."""
        self._runner.run(self._forget(name))

    def served_models(self) -> list[str]:
        """Names the policy engine answers to: its base model and its adapters."""
        return self._run_all([self._served_models()])[0]

    # --- the wire ------------------------------------------------------------------------------------

    async def _served_models(self) -> list[str]:
        body = await self._request("policy", "GET", "/v1/models", None)
        return [str(model["id"]) for model in json.loads(body)["data"]]

    async def _forget(self, name: str) -> None:
        try:
            async with asyncio.timeout(UNLOAD_SECONDS):
                if name in await self._served_models():
                    await self._request("policy", "POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except TimeoutError as error:
            raise EngineUnavailable(f"the policy engine did not forget {name} in {UNLOAD_SECONDS:.0f} s") from error

    async def _open(self) -> None:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_SECONDS, sock_connect=5)
        for name, url in self._urls.items():
            is_unix = url.startswith("unix://")
            # A connection per request: an engine closes idle ones after seconds, and a request that is sent into
            # one that closes meanwhile is lost without a word of who lost it.
            connector: aiohttp.BaseConnector = (
                aiohttp.UnixConnector(url.removeprefix("unix://"), limit=0, force_close=True)
                if is_unix
                else aiohttp.TCPConnector(limit=0, force_close=True)
            )
            base = "http://engine" if is_unix else url
            self._sessions[name] = aiohttp.ClientSession(base, connector=connector, timeout=timeout)

    async def _close(self) -> None:
        for session in self._sessions.values():
            await session.close()

    def _run_all(self, calls: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
        return self._runner.run(self._all(calls))

    async def _all(self, calls: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
        free = asyncio.Semaphore(REQUESTS_IN_FLIGHT)

        async def bounded(call: Coroutine[Any, Any, Result]) -> Result:
            async with free:
                return await call

        tasks = [asyncio.ensure_future(bounded(call)) for call in calls]
        try:
            waiting = set(tasks)
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=CHECK_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                self._check()
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for call in calls:
                call.close()

    async def _post(self, engine: str, path: str, body: Json, parse: Callable[[Json], Result]) -> Result:
        answer = await self._request(engine, "POST", path, body)
        try:
            return parse(json.loads(answer))
        except ValueError as error:  # MalformedReply, or no JSON at all
            raise EngineUnavailable(f"the {engine} engine answered nonsense to {path}: {error}") from error

    async def _request(self, engine: str, method: str, path: str, body: Json | None) -> bytes:
        """One exchange. 4xx (but for `not found` and `too many`) is our own mistake and fails the job."""
        try:
            async with self._sessions[engine].request(method, path, json=body) as response:
                content = await _bounded(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineUnavailable(f"the {engine} engine does not answer {path}: {type(error).__name__}") from error
        status = response.status
        if status < 400:
            return content
        # vLLM answers 500 to an adapter whose rank it was not started for, and will never take it.
        is_for_good = (status < 500 and status not in (404, 429)) or b"max_lora_rank" in content
        if is_for_good:
            detail = content[:300].decode(errors="replace")
            raise JobFailed("engine_refused", f"the {engine} engine answered {status} to {path}: {detail}")
        raise EngineUnavailable(f"the {engine} engine answered {status} to {path}")


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > MAX_REPLY_BYTES:
            raise aiohttp.ClientPayloadError(f"longer than {MAX_REPLY_BYTES} bytes")
    return bytes(content)

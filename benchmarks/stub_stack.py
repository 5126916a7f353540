"""A gateway process with a Redis of its own before stub engines that take a fixed time.

Owns: starting and ending them, and asking. Does not own: how much is asked, what is made of the answers (overload.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple

import aiohttp
from aiohttp import web
from redis.asyncio import Redis
from tokenizers import Tokenizer, models, pre_tokenizers

from bon_algos.contracts import RewardConfig, VllmMember
from bonsai.redis_server import server_argv, system_server
from service.api_key import new_key, new_pepper

SECONDS_EACH: Final = 1.0
"""That the engine takes for a request."""
N: Final = 2
MAX_TOKENS: Final = 20
PROMPT: Final = "hi"
COST: Final = len(PROMPT) + N * MAX_TOKENS
"""Of a request; one token per byte, and every candidate is as long as it may be."""
POLICY: Final = "pol-" + "0" * 16
REWARD_MODEL: Final = "rm-" + "0" * 16
WINDOW: Final = 256
START_SECONDS: Final = 60.0
PAUSE_SECONDS: Final = 0.05


class Reply(NamedTuple):
    status: int
    """0: the connection broke."""
    code: str
    """Of an error, ours."""
    asked_at: float
    seconds: float


class Engines:
    """A policy engine and a reward model in one."""

    def __init__(self) -> None:
        self.num_requests = self.num_active = self.most_active = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/classify", self._classify)
        return app

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": POLICY}, {"id": REWARD_MODEL}]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body["stream"]:  # the canary
            return web.json_response({"choices": [_choice(0)]})
        self.num_requests += 1
        self.num_active += 1
        self.most_active = max(self.most_active, self.num_active)
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await asyncio.sleep(SECONDS_EACH)
            for index in range(body["n"]):
                await response.write(b"data: " + json.dumps({"choices": [_choice(index)]}).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.num_active -= 1

    async def _classify(self, request: web.Request) -> web.Response:
        asked = (await request.json())["input"]
        return web.json_response({"data": [{"index": i, "probs": [float(i)]} for i in range(len(asked))]})


def _choice(index: int) -> dict[str, Any]:
    ids = list(range(1, MAX_TOKENS + 1))
    logprobs = {"token_logprobs": [-0.5] * MAX_TOKENS}
    return {"index": index, "text": "a" * MAX_TOKENS, "logprobs": logprobs, "finish_reason": "length", "token_ids": ids}


def write_model(directory: Path) -> None:
    """A tokenizer with one token per byte."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    directory.mkdir()
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


@asynccontextmanager
async def running_process(*argv: str, **environment: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*argv, env={**os.environ, **environment}, stdout=quiet, stderr=quiet)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Setting(NamedTuple):
    """What gateways stand in."""

    directory: Path
    engines: Engines
    engines_url: str
    redis: Redis
    redis_url: str
    session: aiohttp.ClientSession


@asynccontextmanager
async def setting() -> AsyncGenerator[Setting]:
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bonsai-overload-")))
        write_model(directory / "model")
        engines = Engines()
        runner = web.AppRunner(engines.app(), access_log=None, handler_cancellation=True)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        argv = server_argv(system_server().executable, directory / "redis.sock", directory)
        await stack.enter_async_context(running_process(*argv))
        redis_url = f"unix://{directory}/redis.sock"
        redis = await stack.enter_async_context(Redis.from_url(redis_url))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        yield Setting(directory, engines, f"http://127.0.0.1:{runner.addresses[0][1]}", redis, redis_url, session)


class Gateway(NamedTuple):
    process: asyncio.subprocess.Process
    url: str
    key: str
    session: aiohttp.ClientSession
    spool: Path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    async def ask(self) -> Reply:
        asked_at = monotonic()
        body = {"prompt": PROMPT, "n": N, "max_tokens": MAX_TOKENS}
        try:
            async with self.session.post(f"{self.url}/generate", json=body, headers=self.headers) as response:
                told = await response.json(content_type=None)
                code = "" if response.status == 200 else told["type"].rpartition(":")[2]
                return Reply(response.status, code, asked_at, monotonic() - asked_at)
        except (aiohttp.ClientError, OSError):
            return Reply(0, "broken", asked_at, monotonic() - asked_at)

    async def ready(self) -> dict[str, Any] | None:
        """None while it is not."""
        try:
            async with self.session.get(f"{self.url}/ready", headers=self.headers) as response:
                told: dict[str, Any] = await response.json(content_type=None)
                return told if response.status == 200 else None
        except (aiohttp.ClientError, OSError):
            return None

    async def until(self, is_so: Callable[[dict[str, Any]], bool]) -> None:
        """Returns when `/ready` says so. TimeoutError when it does not in a minute."""
        async with asyncio.timeout(START_SECONDS):
            while (told := await self.ready()) is None or not is_so(told):
                await asyncio.sleep(PAUSE_SECONDS)


@asynccontextmanager
async def gateway(around: Setting, places: int) -> AsyncGenerator[Gateway]:
    """A gateway whose budget has room for so many requests, ready to answer."""
    model = around.directory / "model"
    reward_model = VllmMember(url=around.engines_url, model=REWARD_MODEL, directory=model, window=WINDOW)
    settings = {
        "POLICY_ENGINE_URLS": json.dumps([around.engines_url]),
        "REWARD_MODEL": RewardConfig(members=(reward_model,)).model_dump_json(),
        "POLICY_DIRECTORY": str(model),
        "MAX_MODEL_LEN": str(WINDOW),
        "MAX_TOKENS_IN_FLIGHT": str(places * COST),
        "MAX_TOKENS_WAITING": str(4 * places * COST),
    }
    async with started_gateway(around.directory, around.redis_url, around.session, settings) as one:
        yield one


@asynccontextmanager
async def started_gateway(
    directory: Path,
    redis_url: str,
    session: aiohttp.ClientSession,
    settings: Mapping[str, str],
) -> AsyncGenerator[Gateway]:
    """A gateway with auth and ledger, ready to answer."""
    port, key = free_port(), new_key()
    for name, secret in (("admin.key", key), ("pepper", new_pepper())):
        (directory / name).touch(mode=0o600)
        (directory / name).write_text(secret)
    ours = {
        "REDIS_URL": redis_url,
        "BASE_POLICY_ID": POLICY,
        "ADMIN_KEY_FILE": str(directory / "admin.key"),
        "KEY_PEPPER_FILE": str(directory / "pepper"),
        "ARTEFACTS": str(directory / "artefacts"),
        "SPOOL": str(directory / "spool"),
        "PORT": str(port),
        "REWARD_PAIRS": "none",
        **settings,
    }
    environment = {f"BONSAI_{name}": value for name, value in ours.items()}
    async with running_process(sys.executable, "-m", "service", **environment) as process:
        opened = Gateway(process, f"http://127.0.0.1:{port}", key, session, directory / "spool")
        await opened.until(lambda told: told["status"] == "ready")
        yield opened


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

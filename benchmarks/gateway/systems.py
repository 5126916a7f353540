"""What is measured: our gateway, before a stub, and the same two calls made directly.

Owns: starting and ending them, on which core they run, what is asked. Does not own: when (load.py), peers (peers.py).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
from redis.asyncio import Redis

from benchmarks.gateway.load import Ask, family
from benchmarks.gateway.stub import TOKENS, N
from benchmarks.stub_stack import (
    PAUSE_SECONDS,
    POLICY,
    REWARD_MODEL,
    START_SECONDS,
    Gateway,
    free_port,
    running_process,
    started_gateway,
)
from bon_algos.contracts import RewardConfig, Sampling, VllmMember
from bon_algos.vllm_protocol import classify_request, completion_request
from bonsai.demo.prompts import training_prompts
from bonsai.redis_server import server_argv, system_server
from bonsai.stack_plan import SHIPPED_MODELS

WINDOW: Final = 1024
IDLE_SECONDS: Final = 2.0
PROMPT_TOKENS: Final = 24
"""About as many as the prompts have."""


class World(NamedTuple):
    """What everything measured stands in."""

    directory: Path
    stub_url: str
    redis: Redis
    redis_url: str
    session: aiohttp.ClientSession
    core: int
    """For what is measured, and nothing else of ours."""


class System(NamedTuple):
    """Something that answers."""

    name: str
    pid: int
    ask: Ask
    alone: Ask
    """The same calls of engines, made directly by the generator."""


def cores() -> tuple[int, int]:
    """The measured one, and that of everybody else; the same on a machine that has only one."""
    free = sorted(os.sched_getaffinity(0))
    return free[0], free[-1]


@asynccontextmanager
async def world() -> AsyncGenerator[World]:
    """Redis, the stub and this process on one core."""
    measured, other = cores()
    os.sched_setaffinity(0, {other})
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bonsai-gateway-")))
        argv = server_argv(system_server().executable, directory / "redis.sock", directory)
        await stack.enter_async_context(running_process(*argv))
        redis_url = f"unix://{directory}/redis.sock"
        redis = await stack.enter_async_context(Redis.from_url(redis_url))
        port = free_port()
        code = "from benchmarks.gateway.stub import main; main()"
        await stack.enter_async_context(running_process(sys.executable, "-c", code, str(port)))
        # No connection is used again that the other side may be closing.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        stub_url = f"http://127.0.0.1:{port}"
        await answering(session, f"{stub_url}/v1/models", {})
        yield World(directory, stub_url, redis, redis_url, session, measured)


async def answering(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> None:
    """Returns when the address answers 200. TimeoutError when it does not in a minute."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            try:
                async with session.get(url, headers=headers) as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, OSError):
                pass
            await asyncio.sleep(PAUSE_SECONDS)


def prompts() -> Callable[[], str]:
    """One after the other, for ever."""
    return itertools.cycle(training_prompts()).__next__


# --- the same two calls, directly --------------------------------------------------------------------------


def direct(around: World) -> Ask:
    """Draw and score, as the gateway does it; answers are read to their end and not looked at."""
    sampling = Sampling(max_tokens=TOKENS)
    ids = list(range(5, 5 + PROMPT_TOKENS))
    said = " word" * (PROMPT_TOKENS + TOKENS)
    draw = completion_request(POLICY, ids, N, sampling, stream=True)
    score = classify_request(REWARD_MODEL, [said] * N, add_special_tokens=False)
    return in_turn(calling(around, "/v1/completions", draw), calling(around, "/classify", score))


def calling(around: World, path: str, *bodies: Mapping[str, Any]) -> Ask:
    """All at once."""
    headers = {"Content-Type": "application/json"}
    prepared = [json.dumps(body).encode() for body in bodies]

    async def one(body: bytes) -> None:
        async with around.session.post(around.stub_url + path, data=body, headers=headers) as response:
            await response.read()

    async def ask() -> bool:
        await asyncio.gather(*(one(body) for body in prepared))
        return True

    return ask


def in_turn(*asks: Ask) -> Ask:
    """The next when the one before is answered."""

    async def ask() -> bool:
        return all([await one() for one in asks])

    return ask


async def calls_each(around: World, ask: Ask) -> int:
    """How many calls of engines it makes of one request."""
    before = await _calls(around)
    await ask()
    return await _calls(around) - before


async def _calls(around: World) -> int:
    async with around.session.get(f"{around.stub_url}/calls") as response:
        return int(await response.text())


# --- ours --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def ours(around: World) -> AsyncGenerator[Gateway]:
    """`python -m service` with a key, the ledger and Redis, as it comes."""
    reward = VllmMember(url=around.stub_url, model=REWARD_MODEL, directory=SHIPPED_MODELS / "reward", window=WINDOW)
    settings = {
        "POLICY_ENGINE_URLS": json.dumps([around.stub_url]),
        "REWARD_MODEL": RewardConfig(members=(reward,)).model_dump_json(),
        "POLICY_DIRECTORY": str(SHIPPED_MODELS / "policy"),
        "MAX_MODEL_LEN": str(WINDOW),
    }
    directory = Path(tempfile.mkdtemp(dir=around.directory))
    async with started_gateway(directory, around.redis_url, around.session, settings) as one:
        pin(one.process.pid, around.core)
        yield one


def pin(pid: int, core: int) -> None:
    """All threads of a process and of its descendants; what they start later comes to the same core."""
    for one in family(pid):
        for thread in Path(f"/proc/{one}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def generate(around: World, one: Gateway) -> System:
    prompt = prompts()
    return _asking(around, one, "/generate", lambda: {"prompt": prompt(), "n": N, "max_tokens": TOKENS}, "completion")


def chat(around: World, one: Gateway) -> System:
    prompt = prompts()

    def body() -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt()}]
        return {"model": "default", "messages": messages, "best_of": N, "max_tokens": TOKENS}

    return _asking(around, one, "/v1/chat/completions", body, "choices")


def _asking(around: World, one: Gateway, path: str, body: Callable[[], dict[str, Any]], member: str) -> System:
    ask = asking(one.session, one.url + path, one.key, body, member)
    return System(path, one.process.pid, ask, direct(around))


def asking(session: aiohttp.ClientSession, url: str, key: str, body: Callable[[], dict[str, Any]], member: str) -> Ask:
    """member: without it an answer is none."""
    headers = {"Authorization": f"Bearer {key}"}
    needed = f'"{member}"'.encode()

    async def ask() -> bool:
        try:
            async with session.post(url, json=body(), headers=headers) as response:
                return needed in await response.read() and response.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    return ask

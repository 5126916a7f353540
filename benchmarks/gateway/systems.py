"""What is measured: the two calls made directly, our gateway, and LiteLLM's proxy, each before the same stub.

Owns: starting and ending them, on which core they run, what is asked of each. Does not own: when (load.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import subprocess
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

ROOT: Final = Path(__file__).resolve().parents[2]
PIP: Final = ("-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--require-hashes")
WINDOW: Final = 1024
IDLE_SECONDS: Final = 2.0
PROMPT_TOKENS: Final = 24
"""About as many as the prompts have."""


class CannotRun(Exception):
    """A peer that is not there; the text says why."""


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


def direct(around: World) -> System:
    """Draw and score, as the gateway does it; answers are read to their end and not looked at."""
    sampling = Sampling(max_tokens=TOKENS)
    ids = list(range(5, 5 + PROMPT_TOKENS))
    said = " word" * (PROMPT_TOKENS + TOKENS)
    draw = json.dumps(completion_request(POLICY, ids, N, sampling, stream=True)).encode()
    score = json.dumps(classify_request(REWARD_MODEL, [said] * N, add_special_tokens=False)).encode()
    headers = {"Content-Type": "application/json"}

    async def ask() -> bool:
        for path, body in (("/v1/completions", draw), ("/classify", score)):
            async with around.session.post(around.stub_url + path, data=body, headers=headers) as response:
                await response.read()
        return True

    return System("the two calls, directly", os.getpid(), ask)


# --- ours --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def ours(around: World, profile: Path | None = None) -> AsyncGenerator[Gateway]:
    """`python -m service` with a key, the ledger and Redis, as it comes; under cProfile where a file is given."""
    reward = VllmMember(url=around.stub_url, model=REWARD_MODEL, directory=SHIPPED_MODELS / "reward", window=WINDOW)
    settings = {
        "POLICY_ENGINE_URLS": json.dumps([around.stub_url]),
        "REWARD_MODEL": RewardConfig(members=(reward,)).model_dump_json(),
        "POLICY_DIRECTORY": str(SHIPPED_MODELS / "policy"),
        "MAX_MODEL_LEN": str(WINDOW),
    }
    command = ("-m", "service") if profile is None else ("-m", "cProfile", "-o", str(profile), "-m", "service")
    directory = Path(tempfile.mkdtemp(dir=around.directory))
    async with started_gateway(directory, around.redis_url, around.session, settings, command) as one:
        pin(one.process.pid, around.core)
        yield one


def pin(pid: int, core: int) -> None:
    """All threads of a process and of its descendants; what they start later comes to the same core."""
    for one in family(pid):
        for thread in Path(f"/proc/{one}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def generate(one: Gateway) -> System:
    prompt = prompts()
    return _asking(one, "/generate", lambda: {"prompt": prompt(), "n": N, "max_tokens": TOKENS}, "completion")


def chat(one: Gateway) -> System:
    prompt = prompts()

    def body() -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt()}]
        return {"model": "default", "messages": messages, "best_of": N, "max_tokens": TOKENS}

    return _asking(one, "/v1/chat/completions", body, "choices")


def _asking(one: Gateway, path: str, body: Callable[[], dict[str, Any]], member: str) -> System:
    return System(path, one.process.pid, asking(one.session, one.url + path, one.key, body, member))


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


# --- peers -------------------------------------------------------------------------------------------------


def environment_of(peer: str) -> Path:
    """Python of the peer's environment, made once for each version of its lock file. Raises CannotRun."""
    lock = ROOT / "requirements" / "peers" / f"{peer}.txt"
    directory = ROOT / ".venv" / "peers" / f"{peer}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        for command in (
            (sys.executable, "-m", "venv", "--clear", str(directory)),
            (str(python), *PIP, "-r", str(lock)),
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise CannotRun(f"it could not be installed: {_last_line(done.stderr)}")
        (directory / "complete").touch()
    return python


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")


@asynccontextmanager
async def litellm(around: World) -> AsyncGenerator[System]:
    """Its proxy with a key: one chat completion of n = 16 passed on. No scoring, no choice, no ledger. Raises
    CannotRun."""
    python = await asyncio.to_thread(environment_of, "litellm")
    port, key = free_port(), "sk-of-the-benchmark"
    model = {"model": f"openai/{POLICY}", "api_base": f"{around.stub_url}/v1", "api_key": "none"}
    told = {"model_list": [{"model_name": "stub", "litellm_params": model}], "general_settings": {"master_key": key}}
    config = around.directory / "litellm.yaml"
    config.write_text(json.dumps(told))  # JSON is YAML
    argv = (str(python.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1", "--port", str(port))
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PYTHONPATH": ""}
    async with running_process(*argv, "--telemetry", "False", **quiet) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            await answering(around.session, f"{url}/health/liveliness", {})
        except TimeoutError:
            raise CannotRun(f"its proxy did not answer within {START_SECONDS:g} s") from None
        pin(process.pid, around.core)
        prompt = prompts()

        def body() -> dict[str, Any]:
            return {"model": "stub", "messages": [{"role": "user", "content": prompt()}], "n": N, "max_tokens": TOKENS}

        ask = asking(around.session, f"{url}/v1/chat/completions", key, body, "choices")
        if not await ask():
            raise CannotRun("its proxy refuses a chat completion")
        yield System("LiteLLM's proxy: one call passed on", process.pid, ask)

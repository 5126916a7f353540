"""Who else answers chat completions before engines: LiteLLM's proxy, optillm's best-of-n, TensorZero's.

Owns: starting and ending them before the stub, on the measured core, what is asked of each, which calls it makes of
that. Does not own: their environments (environments.py), the load (load.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.gateway.environments import CannotRun, environment_of
from benchmarks.gateway.load import Ask
from benchmarks.gateway.stub import OPTILLM_ASKS, TOKENS, N
from benchmarks.gateway.systems import System, World, answering, asking, calling, calls_each, in_turn, pin, prompts
from benchmarks.stub_stack import PAUSE_SECONDS, POLICY, START_SECONDS, free_port, running_process

CHAT: Final = "/v1/chat/completions"
KEY: Final = "key-of-the-benchmark"
TENSORZERO_DOOR: Final = """
import signal, sys, types, tensorzero
client = types.SimpleNamespace()
tensorzero.patch_openai_client(client, config_file=sys.argv[1], async_setup=False)
with open(sys.argv[2], "w") as file:
    file.write(client.base_url)
signal.pause()
"""
"""Its embedded gateway has HTTP for OpenAI's clients, which is how we ask ours as well."""
DRAWN: Final = " word" * TOKENS

Peer = Callable[[World], AbstractAsyncContextManager[System]]


TOKENS_TOLD: Final = {"logprobs": True, "return_token_ids": True}
"""What vLLM is asked for where candidates are to be learned from."""


@asynccontextmanager
async def litellm(
    around: World, *, name: str = "LiteLLM", told: Mapping[str, Any] = TOKENS_TOLD
) -> AsyncGenerator[System]:
    """One chat completion of n = 16 passed on, with what is told of tokens, as we get it. No scoring, no choice, no
    ledger. Raises CannotRun."""
    commands = await asyncio.to_thread(environment_of, "peers/litellm")
    model = {"model": f"openai/{POLICY}", "api_base": f"{around.stub_url}/v1", "api_key": "none"}
    models = [{"model_name": "stub", "litellm_params": model}]
    config = around.directory / "litellm.yaml"
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": KEY}}))  # JSON is YAML
    port = free_port()
    argv = (str(commands / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port))
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PYTHONPATH": ""}
    async with running_process(*argv, "--telemetry", "False", **quiet) as process:
        url = f"http://127.0.0.1:{port}"
        await _started(around, f"{url}/health/liveliness")
        alone = calling(around, CHAT, _chat(n=N, **told))
        yield await _system(around, name, process.pid, url + "/v1", {"model": "stub", "n": N, **told}, 1, alone)


@asynccontextmanager
async def optillm(around: World) -> AsyncGenerator[System]:
    """Best of 16, `bon`: one call that draws, then a call for each candidate's rating, one after the other. No ledger.
    Raises CannotRun."""
    commands = await asyncio.to_thread(environment_of, "peers/optillm")
    port = free_port()
    told = ("--approach", "bon", "--best-of-n", str(N), "--base-url", f"{around.stub_url}/v1", "--log", "error")
    argv = (str(commands / "optillm"), *told, "--optillm-api-key", KEY, "--port", str(port))
    # Its own key as a variable would mean that it is to run a model itself.
    own = {"OPENAI_API_KEY": "none", "HOME": str(around.directory), "PYTHONPATH": ""}
    async with running_process(*argv, **own) as process:
        url = f"http://127.0.0.1:{port}"
        await _started(around, f"{url}/health")
        rating = _chat({"role": "assistant", "content": DRAWN}, {"role": "user", "content": OPTILLM_ASKS})
        alone = in_turn(calling(around, CHAT, _chat(n=N)), *[calling(around, CHAT, rating)] * N)
        yield await _system(around, "optillm's bon", process.pid, url + "/v1", {"model": "stub"}, 1 + N, alone)


@asynccontextmanager
async def tensorzero(around: World) -> AsyncGenerator[System]:
    """Best of 16: 16 calls at once, then one of a judge who reads all. No key, nothing observed. Raises CannotRun."""
    commands = await asyncio.to_thread(environment_of, "peers/tensorzero")
    config, address = around.directory / "tensorzero.toml", around.directory / "tensorzero.url"
    config.write_text(_tensorzero_config(f"{around.stub_url}/v1/"))
    argv = (str(commands / "python"), "-W", "ignore", "-c", TENSORZERO_DOOR, str(config), str(address))
    async with running_process(*argv, RUST_LOG="error", PYTHONPATH="") as process:
        url = await _written(address)
        judge = _chat({"role": "user", "content": DRAWN * N}, response_format={"type": "json_schema"})
        alone = in_turn(calling(around, CHAT, *[_chat()] * N), calling(around, CHAT, judge))
        asked = {"model": "tensorzero::function_name::best"}
        yield await _system(around, "TensorZero", process.pid, url, asked, N + 1, alone)


PEERS: Final[Mapping[str, Peer]] = {
    "LiteLLM": litellm,
    "LiteLLM, texts": partial(litellm, name="texts alone through LiteLLM", told={}),
    "optillm": optillm,
    "TensorZero": tensorzero,
}


def _tensorzero_config(api_base: str) -> str:
    """One function with a variant that draws once and a variant that takes the best of 16 of those."""
    return f"""
[gateway]
observability.enabled = false

[models.stub]
routing = ["stub"]

[models.stub.providers.stub]
type = "openai"
model_name = "{POLICY}"
api_base = "{api_base}"
api_key_location = "none"

[functions.best]
type = "chat"

[functions.best.variants.one]
type = "chat_completion"
model = "stub"

[functions.best.variants.best]
type = "experimental_best_of_n_sampling"
candidates = {json.dumps(["one"] * N)}

[functions.best.variants.best.evaluator]
model = "stub"

[functions.best.experimentation]
type = "static"
candidate_variants = ["best"]
"""


async def _system(
    around: World, name: str, pid: int, url: str, asked: Mapping[str, Any], calls: int, alone: Ask
) -> System:
    """asked: what a body holds beside its messages. calls: of engines, that it must make of a request. Raises
    CannotRun."""
    pin(pid, around.core)
    prompt = prompts()

    def body() -> dict[str, Any]:
        return {**asked, "messages": [{"role": "user", "content": prompt()}], "max_tokens": TOKENS}

    ask = asking(around.session, f"{url}/chat/completions", KEY, body, "choices")
    if not await ask():
        raise CannotRun("it refuses a chat completion")
    if (made := await calls_each(around, ask)) != calls:
        raise CannotRun(f"it made {made} calls of a request that should come to {calls}")
    return System(f"{name}, {calls} calls" if calls > 1 else f"{name}, 1 call passed on", pid, ask, alone)


def _chat(*more: Mapping[str, str], **members: Any) -> dict[str, Any]:
    """A body as long as those that peers send."""
    first = {"role": "user", "content": prompts()()}
    return {"model": POLICY, "messages": [first, *more], "max_tokens": TOKENS, **members}


async def _started(around: World, url: str) -> None:
    try:
        await answering(around.session, url, {})
    except TimeoutError:
        raise CannotRun(f"it did not answer within {START_SECONDS:g} s") from None


async def _written(address: Path) -> str:
    try:
        async with asyncio.timeout(START_SECONDS):
            while not address.exists() or not (url := address.read_text()):
                await asyncio.sleep(PAUSE_SECONDS)
            return url
    except TimeoutError:
        raise CannotRun(f"it did not open within {START_SECONDS:g} s") from None

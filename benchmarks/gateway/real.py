"""Best-of-16 through the gateway of a real stack, and the same two calls made directly, by turns.

Owns: the pairs. Does not own: the stack, which is `bonsai up`'s own. Both draw the same candidates: prompt and seed
are the same, and who is first changes from pair to pair, for the second finds the prompt in the engine's cache.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import aiohttp
import numpy as np

from benchmarks.claims import Claim, at_most
from benchmarks.gateway.stub import N
from bon_algos.contracts import Sampling
from bon_algos.scoring import open_readers
from bonsai.demo.prompts import held_out_prompts
from bonsai.reward_plan import config_of
from bonsai.up import Options, Stack, prepare, running_stack
from service.reward import RewardModel
from service.tokenizer_files import read_tokenizer
from service.vllm import DrawingWindow, PolicyEngine

TOKENS = 64
WARM_PAIRS = 5
SECONDS = 120.0
COLUMNS = ("best of 16, real engines", "median ms", "half of them between, ms")

Call = Callable[[str, int], Awaitable[None]]
"""Prompt and seed."""


class Pair(NamedTuple):
    """Milliseconds."""

    direct: float
    gateway: float


def pairs(count: int) -> list[Pair]:
    """A stack of its own with the demo's models, taken down at the end. Raises what `running_stack` raises."""
    with tempfile.TemporaryDirectory(prefix="bonsai-gateway-") as directory:
        return asyncio.run(_measured(Path(directory), count))


async def _measured(directory: Path, count: int) -> list[Pair]:
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(running_stack(prepare(Options(directory=directory, port=0))))
        direct, gateway = await _direct(running, stack), await _gateway(running, stack)
        found = []
        for number, prompt in enumerate(islice(held_out_prompts(), count + WARM_PAIRS)):
            calls = (direct, gateway) if number % 2 else (gateway, direct)
            took = {call: await _milliseconds(call, prompt, number) for call in calls}
            found.append(Pair(took[direct], took[gateway]))
        return found[WARM_PAIRS:]


async def _milliseconds(call: Call, prompt: str, seed: int) -> float:
    begun = perf_counter()
    await call(prompt, seed)
    return 1000 * (perf_counter() - begun)


async def _direct(running: Stack, stack: AsyncExitStack) -> Call:
    """The gateway's own two clients, without the gateway."""
    tokenizer = read_tokenizer(running.plan.policy.path)
    config = config_of(running.plan.reward, running.state.reward_socket)
    engine = PolicyEngine(f"unix://{running.state.policy_socket}")
    reward_model = RewardModel(config, open_readers(config, lambda member: read_tokenizer(member.directory)))
    stack.push_async_callback(engine.close)
    stack.push_async_callback(reward_model.close)

    async def call(prompt: str, seed: int) -> None:
        end = asyncio.get_running_loop().time() + SECONDS
        sampling = Sampling(max_tokens=TOKENS, seed=seed)
        ids = tokenizer.encode_prompt(prompt)
        drawn = await engine.sample(running.plan.policy_id, ids, N, sampling, DrawingWindow(end, end, N))
        await reward_model.score(prompt, None, [candidate.text for candidate in drawn])

    return call


async def _gateway(running: Stack, stack: AsyncExitStack) -> Call:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    session = await stack.enter_async_context(aiohttp.ClientSession(headers=headers))

    async def call(prompt: str, seed: int) -> None:
        body = {"prompt": prompt, "n": N, "max_tokens": TOKENS, "seed": seed}
        async with session.post(f"{running.url}/generate", json=body) as response:
            response.raise_for_status()
            await response.read()

    return call


def rows_of(found: list[Pair]) -> list[tuple[str, ...]]:
    return [
        _row("the two calls, directly", [pair.direct for pair in found]),
        _row("through the gateway", [pair.gateway for pair in found]),
        _row("more through the gateway, pair by pair", [pair.gateway - pair.direct for pair in found]),
    ]


def _row(name: str, milliseconds: list[float]) -> tuple[str, ...]:
    low, high = np.quantile(milliseconds, (0.25, 0.75))
    return name, f"{median(milliseconds):.1f}", f"{low:.1f} – {high:.1f}"


def claims_of(found: list[Pair]) -> list[Claim]:
    ratio = median(pair.gateway for pair in found) / median(pair.direct for pair in found)
    return [at_most("real engines: through the gateway ÷ directly, medians", ratio, 1.05)]

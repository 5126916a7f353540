"""Best-of-16 through the gateway of a real stack, and the same two calls made directly, by turns.

Owns: the pairs, and the client that needs no gateway. Does not own: the stack, which is `bonsai up`'s own. Both draw
the same candidates: prompt and seed are the same, and who is first changes from pair to pair, for the second finds the
prompt in the engine's cache.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import aiohttp
import numpy as np

from benchmarks.claims import Claim, at_most
from benchmarks.gateway.stub import N
from bon_algos.contracts import Interval, Sampling
from bon_algos.scoring import Completion, open_readers
from bon_algos.vllm_protocol import completion_request
from bonsai.demo.prompts import held_out_prompts
from bonsai.reward_plan import config_of
from bonsai.up import Options, Stack, prepare, running_stack
from service.tokenizer_files import read_tokenizer

TOKENS = 64
WARM_PAIRS = 5
RESAMPLES = 2000
COLUMNS = ("best of 16, real engines", "median", "half of them between")

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
        for number, prompt in enumerate(islice(cycle(held_out_prompts()), count + WARM_PAIRS)):
            calls = (direct, gateway) if number % 2 else (gateway, direct)
            took = {call: await _milliseconds(call, prompt, number) for call in calls}
            found.append(Pair(took[direct], took[gateway]))
        return found[WARM_PAIRS:]


async def _milliseconds(call: Call, prompt: str, seed: int) -> float:
    begun = perf_counter()
    await call(prompt, seed)
    return 1000 * (perf_counter() - begun)


async def _direct(running: Stack, stack: AsyncExitStack) -> Call:
    """What a client without a gateway has to do: two requests, and in between the texts that are to be scored."""
    tokenizer = read_tokenizer(running.plan.policy.path)
    config = config_of(running.plan.reward, running.state.reward_socket)
    [reader] = open_readers(config, lambda member: read_tokenizer(member.directory))
    policy = await stack.enter_async_context(_engine(running.state.policy_socket))
    reward_model = await stack.enter_async_context(_engine(running.state.reward_socket))

    async def call(prompt: str, seed: int) -> None:
        sampling = Sampling(max_tokens=TOKENS, seed=seed)
        draw = completion_request(running.plan.policy_id, tokenizer.encode_prompt(prompt), N, sampling, stream=True)
        async with policy.post("/v1/completions", json=draw) as response:
            texts = texts_of(await response.read())
        [score] = reader.ask([Completion(prompt, None, text) for text in texts]).calls
        async with reward_model.post(score.path, json=score.body) as response:
            await response.read()

    return call


def _engine(socket: Path) -> aiohttp.ClientSession:
    connector = aiohttp.UnixConnector(str(socket))
    return aiohttp.ClientSession("http://engine", connector=connector, raise_for_status=True)


def texts_of(stream: bytes) -> list[str]:
    """Of each candidate, from the events of a completion's stream."""
    texts = [""] * N
    for line in stream.splitlines():
        if line.startswith(b"data: {"):
            for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
    return texts


async def _gateway(running: Stack, stack: AsyncExitStack) -> Call:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    session = await stack.enter_async_context(aiohttp.ClientSession(headers=headers))

    async def call(prompt: str, seed: int) -> None:
        body = {"prompt": prompt, "n": N, "max_tokens": TOKENS, "seed": seed}
        async with session.post(f"{running.url}/generate", json=body) as response:
            response.raise_for_status()
            await response.read()

    return call


def rows_of(found: Sequence[Pair]) -> list[tuple[str, ...]]:
    ratio = ratio_of(found)
    return [
        _row("the two calls, directly, ms", [pair.direct for pair in found]),
        _row("through the gateway, ms", [pair.gateway for pair in found]),
        _row("more through the gateway, pair by pair, ms", [pair.gateway - pair.direct for pair in found]),
        ("through the gateway ÷ directly", f"{ratio.mean:.3f}", f"{ratio.low:.3f} – {ratio.high:.3f} (95 %)"),
    ]


def _row(name: str, milliseconds: Sequence[float]) -> tuple[str, ...]:
    low, high = np.quantile(milliseconds, (0.25, 0.75))
    return name, f"{median(milliseconds):.1f}", f"{low:.1f} – {high:.1f}"


def ratio_of(found: Sequence[Pair]) -> Interval:
    """The median of the gateway's time over that of the same pair's direct calls, with its 95 % bootstrap interval."""
    ratios = np.array([pair.gateway / pair.direct for pair in found])
    drawn_RP = ratios[np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))]
    low, high = np.quantile(np.median(drawn_RP, axis=1), (0.025, 0.975))
    return Interval(mean=float(np.median(ratios)), low=float(low), high=float(high))


def claims_of(found: Sequence[Pair]) -> list[Claim]:
    return [at_most("real engines: through the gateway ÷ directly, median of pairs", ratio_of(found).mean, 1.05)]


def figures_of(found: Sequence[Pair]) -> dict[str, object]:
    return {"ratio": ratio_of(found).model_dump(), "pairs": [pair._asdict() for pair in found]}

"""Traffic that the demo and the circle benchmark send through the public API.

Owns how many requests are under way at one time and what is timed. Does not own the statistics (`measure.py`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bonsai.client import BonsaiClient
from bonsai.demo.measure import Speed
from bonsai.generation_replies import Choice, Generation

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

PER_REQUEST = 64
"""Candidates of one request when a pool is drawn: the route's cap."""


def _nothing() -> None:
    return None


async def _together(work: Callable[[], Coroutine[Any, Any, None]], times: int) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(times):
                group.create_task(work())
    except ExceptionGroup as failures:
        # They failed for one reason, most often that the gateway went away; the others were ended by the first.
        raise failures.exceptions[0] from None


async def in_parallel(
    items: Sequence[_Item],
    work: Callable[[_Item], Awaitable[_Result]],
    *,
    concurrency: int,
    advance: Callable[[], None] = _nothing,
) -> list[_Result]:
    """Results in the order of the items; `advance` after each. The first failure ends all and is raised."""
    results: dict[int, _Result] = {}
    numbered = enumerate(items)

    async def take_turns() -> None:
        for index, item in numbered:
            results[index] = await work(item)
            advance()

    await _together(take_turns, min(concurrency, len(items)))
    return [results[index] for index in range(len(items))]


async def draw(
    client: BonsaiClient,
    policy: str,
    prompts: Sequence[str],
    draws: int,
    *,
    concurrency: int,
    advance: Callable[[], None] = _nothing,
) -> list[list[Choice]]:
    """At least `draws` scored candidates of a policy for every prompt, none of which a job may learn from."""
    n = min(draws, PER_REQUEST)
    requests = [prompt for _ in range(math.ceil(draws / n)) for prompt in prompts]

    async def candidates(prompt: str) -> tuple[Choice, ...]:
        answer = await client.generate(
            prompt, n=n, arm=f"{policy}:{n}", wait_for_reward=True, return_candidates=True, store=False
        )
        return answer.choices

    drawn = await in_parallel(requests, candidates, concurrency=concurrency, advance=advance)
    groups: dict[str, list[Choice]] = {prompt: [] for prompt in prompts}
    for prompt, choices in zip(requests, drawn, strict=True):
        groups[prompt].extend(choices)
    return [groups[prompt] for prompt in prompts]


async def latencies(client: BonsaiClient, arm: str, prompts: Iterable[str]) -> list[float]:
    """Milliseconds of one request after another, each on an idle engine."""
    found = []
    for prompt in prompts:
        start = time.perf_counter()
        await client.generate(prompt, arm=arm, store=False)
        found.append(1000 * (time.perf_counter() - start))
    return found


class Load(NamedTuple):
    """A saturated run, from its first request to its last answer."""

    answers: int
    seconds: float
    tokens: int
    """Generated for these answers."""


async def saturate(client: BonsaiClient, arm: str, prompts: Sequence[str], *, seconds: float, concurrency: int) -> Load:
    """Keep `concurrency` requests under way for some seconds, then wait for the last.

    Every answer waits for its reward: one sample is scored too, only later, and a backlog left behind would slow
    down whatever is measured next.
    """
    endless: Iterator[str] = cycle(prompts)
    start = time.perf_counter()
    answers: list[Generation] = []

    async def keep_asking() -> None:
        while time.perf_counter() < start + seconds:
            answers.append(await client.generate(next(endless), arm=arm, wait_for_reward=True, store=False))

    await _together(keep_asking, concurrency)
    took = time.perf_counter() - start
    return Load(len(answers), took, sum(answer.usage.generated_tokens for answer in answers))


async def speeds(
    client: BonsaiClient,
    arms: Sequence[tuple[str, int]],
    prompts: Sequence[str],
    *,
    rounds: int,
    timed_per_round: int,
    seconds: float,
    sequences: int,
    advance: Callable[[], None] = _nothing,
) -> list[Speed]:
    """Speed of each arm (name, n), in `rounds` during which the arms take turns, so that none has the quieter
    machine. A saturated run keeps about `sequences` candidates at the engine, whatever the arm's n."""
    timed: dict[str, list[float]] = {arm: [] for arm, _ in arms}
    loads: dict[str, list[Load]] = {arm: [] for arm, _ in arms}
    for turn in range(rounds):
        mine = prompts[turn * timed_per_round : (turn + 1) * timed_per_round]
        for arm, n in arms:
            timed[arm] += await latencies(client, arm, mine)
            busy = max(2, sequences // n)
            loads[arm].append(await saturate(client, arm, prompts, seconds=seconds, concurrency=busy))
            advance()
    return [speed_of(timed[arm], loads[arm]) for arm, _ in arms]


def speed_of(milliseconds: Sequence[float], loads: Sequence[Load]) -> Speed:
    """Percentiles over all timed answers; the median of the saturated runs. ValueError when no answer came."""
    answers = sum(load.answers for load in loads)
    if not milliseconds or not answers:
        raise ValueError("no answer came while the speed was measured")
    return Speed(
        tokens_per_answer=sum(load.tokens for load in loads) / answers,
        p50_ms=float(np.percentile(milliseconds, 50)),
        p95_ms=float(np.percentile(milliseconds, 95)),
        answers=len(milliseconds),
        answers_per_second=float(np.median([load.answers / load.seconds for load in loads])),
    )

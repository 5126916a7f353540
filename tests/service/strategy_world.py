"""A gateway whose reward of a completion is the number it says, what it learns from, how a later wave goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import compress

import numpy as np
import pytest
import redis

from bon_algos.contracts import LEDGER_STREAM
from tests.fixtures.gateway import Reply, World, gateway_settings, running_gateway
from tests.service.records import group
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running

N, CAP, FIRST = 8, 16, 2
"""The first wave is a quarter of n."""
ROUTE = {"strategy": "adaptive", "default_n": N, "n_cap": CAP, "deadline_ms": 20_000}
HI = {"prompt": "hi", "max_tokens": 16}


def said(text: str) -> float:
    """The reward model's reading of "u:…\\na:0.5\\n" is 0.5."""
    return float(text.split("a:")[-1])


@pytest.fixture
def gateway(tmp_path: Path, engine: StubEngine, reward: StubReward, redis_url: str) -> Iterator[Callable[..., World]]:
    """A gateway whose reward of a completion is the number it says, and which learns at once."""
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        reward.script.score, engine.script.completions = said, ["0.0"]
        contexts = []

        def start(**settings: float) -> World:
            values = {"learning_seconds": 0.05, **settings}
            context = running_gateway(gateway_settings(tmp_path, engine_url, reward_url, redis_url, **values))
            contexts.append(context)
            return World(context.__enter__(), engine, reward, redis_url)

        yield start
        for context in contexts:
            context.__exit__(None, None, None)


def log_history(world: World, rewards_BM: np.ndarray, first: int = 0) -> None:
    """Full groups of the base policy, four tokens a candidate; all at once."""
    with redis.Redis.from_url(world.redis_url) as store, store.pipeline() as pipe:
        for i, row in enumerate(rewards_BM, start=first):
            one = group([(float(reward), 4) for reward in row])
            one = one.model_copy(update={"id": f"resp_{i}", "prompt_token_ids": (1, i)})
            data = compress(one.model_dump_json().encode())
            pipe.xadd(LEDGER_STREAM, {"kind": "group", "id": one.id, "data": data})
        pipe.execute()


def known(world: World) -> dict[str, object]:
    found: dict[str, object] = world.client.get("/routes/default/strategy").json
    return found


def from_the_second_wave(world: World, change: Callable[[], None]) -> None:
    """Rewards of the first wave call for more; once they are known, `change` is made."""
    world.engine.script.completions = ["-1.5", "-1.25"]

    def score(text: str) -> float:
        change()
        return said(text)

    world.reward.script.score = score


def chunks_of(reply: Reply) -> list[dict[str, Any]]:
    events = reply.body.decode().strip().split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]

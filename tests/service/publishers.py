"""A publisher before engines that a test scripts, and a policy for them to load.

Owns: the engine at the process's edge, what stands around it, a candidate as the worker registers it. Does not own: the
files of a policy (published.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from redis.asyncio import Redis

from service.catalogue import Catalogue
from service.errors import EngineBroken, EngineUnavailable, PolicyNotServed
from service.fingerprint import FLOAT32_TOLERANCE
from service.policies import Policies
from service.publishers import Publishers
from service.publishing import Publisher
from service.vllm import AdapterRefused, EngineState
from tests.service.published import base_logprob, write_policy
from tests.service.records import BASE, policy, route
from tests.service.test_policies import register

PROVE_EVERY = 300.0


class OneEngine:
    """An engine at the process's edge: what it has loaded, and how far from the base each adapter really is."""

    def __init__(self, name: str = "policy-0") -> None:
        self.name = name
        self.is_in_rotation = True
        self.served: frozenset[str] = frozenset()
        self.adapters: dict[str, str] = {}
        self.started_at: float | None = None
        self.distance = 0.5
        self.base_distance = 0.0
        self.calls: Counter[str] = Counter()
        self.used_at: dict[str, float] = {}
        self.has_other_base = False
        self.is_away = False
        self.is_broken = False
        self.refusal: str | None = None
        self.unservable: set[str] = set()
        """Listed, and not known when it is asked for."""
        self.num_probes = 0

    def serve(self, policies: Iterable[str]) -> None:
        self.served = frozenset(policies)

    def in_flight(self, policy: str) -> int:
        return self.calls[policy]

    def last_used_at(self, policy: str) -> float:
        return self.used_at.get(policy, 0.0)

    def forget(self, policy: str) -> None:
        self.used_at.pop(policy, None)

    def distrust(self, *, has_other_base: bool) -> None:
        self.has_other_base = has_other_base

    async def observe(self) -> EngineState:
        if self.is_away:
            raise EngineUnavailable("away")
        return EngineState({BASE: "/models/base", **self.adapters}, self.started_at)

    async def load_adapter(self, policy: str, directory: str) -> None:
        if self.refusal is not None:
            raise AdapterRefused(self.refusal)
        self.adapters[policy] = directory

    async def unload_adapter(self, policy: str) -> None:
        self.adapters.pop(policy, None)

    async def logprobs(
        self, policy: str, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int]
    ) -> list[float]:
        if self.is_broken:
            raise EngineBroken("no answer")
        if policy == BASE:
            return [base_logprob(token) - self.base_distance for token in completion_token_ids]
        self.num_probes += 1
        if policy in self.unservable:
            raise PolicyNotServed("no such model")
        assert policy in self.adapters
        return [base_logprob(token) - self.distance for token in completion_token_ids]

    def restart(self) -> None:
        self.adapters.clear()


@pytest.fixture
def engine() -> OneEngine:
    return OneEngine()


@pytest.fixture
async def catalogue(redis: Redis) -> Catalogue:
    return Catalogue(redis, policy(BASE), route())


@pytest.fixture
def publisher(engine: OneEngine, catalogue: Catalogue, redis: Redis, tmp_path: Path) -> Publisher:
    return make_publisher(engine, catalogue, redis, tmp_path)


def make_publisher(engine: OneEngine, catalogue: Catalogue, redis: Redis, root: Path) -> Publisher:
    return make_publishers([engine], catalogue, redis, root).each[0]


def make_publishers(
    engines: Sequence[OneEngine],
    catalogue: Catalogue,
    redis: Redis,
    root: Path,
    clock: Callable[[], float] = time.monotonic,
) -> Publishers:
    publishers = Publishers(
        catalogue,
        Policies(redis),
        artefacts=root,
        slots=2,
        max_lora_rank=32,
        tolerance=FLOAT32_TOLERANCE,
        prove_every=PROVE_EVERY,
        clock=clock,
    )
    for engine in engines:
        publishers.join(engine)
    return publishers


async def candidate(redis: Redis, catalogue: Catalogue, root: Path) -> str:
    """Registered as the worker's last script does it."""
    written = write_policy(root)
    await catalogue.refresh()
    await register(redis, policy(written.policy_id, fingerprint=None, created_at=5.0, written=written))
    await catalogue.refresh()
    return written.policy_id

"""One engine of the pool against the clock: what a canary makes of it, what it is no longer asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from bon_algos.contracts import Candidate, Sampling
from bon_algos.vllm_protocol import Listener
from service.breaker import FAILED_CALLS
from service.errors import EngineUnavailable, PolicyNotServed
from service.loops import running_loops
from service.pool import EnginePool
from service.replica import Replica
from service.vllm import DrawingWindow, EngineState
from tests.service.records import BASE, STUDENT

pytestmark = pytest.mark.anyio


class OneEngine:
    """An engine at the process's edge. Its tokens come one by one; a canary's never comes while it hangs."""

    def __init__(self) -> None:
        self.busy_until = 0.0
        """The loop's time: until then tokens come with every turn of it, from the first canary on."""
        self.asked = asyncio.Event()
        """For a canary."""
        self.is_away = False
        self.is_hung = False
        self.forgot = False
        self.num_canaries = 0
        self.num_draws = 0

    async def sample(
        self,
        policy: str,
        prompt_token_ids: Sequence[int],
        n: int,
        sampling: Sampling,
        window: DrawingWindow,
        hear: Listener | None,
        came: Callable[[], None] = lambda: None,
    ) -> list[Candidate]:
        self.num_draws += 1
        if self.forgot:
            raise PolicyNotServed("forgotten")
        if self.is_away:
            await asyncio.sleep(0.05)
            raise EngineUnavailable("away")
        if self.busy_until:
            await self.asked.wait()
            while asyncio.get_running_loop().time() < self.busy_until:
                came()
                await asyncio.sleep(0)
            return []
        for _ in range(sampling.max_tokens):
            await asyncio.sleep(0.05)
            came()
        return []

    async def give_a_token(self, policy: str) -> None:
        self.num_canaries += 1
        self.asked.set()
        if self.is_away:
            raise EngineUnavailable("away")
        if self.is_hung:
            await asyncio.Event().wait()

    async def models(self) -> list[str]:
        if self.is_away:
            raise EngineUnavailable("away")
        return [BASE]

    async def observe(self) -> EngineState:
        return EngineState(dict.fromkeys(await self.models()), None)

    async def load_adapter(self, policy: str, directory: str) -> None: ...

    async def unload_adapter(self, policy: str) -> None: ...

    async def logprobs(self, policy: str, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        return []


@asynccontextmanager
async def watched(engine: OneEngine, hung_after: float = 0.3) -> AsyncIterator[Replica]:
    replica = Replica("policy-0", engine, BASE, canary_after=0.02, hung_after=hung_after)
    async with running_loops(replica.canary.run()):
        yield replica


async def state_is(replica: Replica, state: str) -> None:
    async with asyncio.timeout(5):
        while replica.state != state:
            await asyncio.sleep(0)


async def draw_one(from_whom: Replica | EnginePool, policy: str, max_tokens: int, seconds: float = 60) -> None:
    end = asyncio.get_running_loop().time() + seconds
    window = DrawingWindow(soft=end, hard=end, quorum=1)
    await from_whom.sample(policy, [1], 1, Sampling(max_tokens=max_tokens), window, None)


async def test_a_busy_engine_whose_tokens_advance_is_not_hung():
    """A canary waits for as long as tokens come, here for twice its patience; then none come, and it is."""
    engine, patience = OneEngine(), 0.1
    engine.is_hung = True
    engine.busy_until = asyncio.get_running_loop().time() + 2 * patience
    async with watched(engine, hung_after=patience) as replica:
        drawing = asyncio.create_task(draw_one(replica, BASE, max_tokens=1))
        while not drawing.done():
            assert replica.state == "ok"
            await asyncio.sleep(0)
        assert engine.num_canaries == 1
        await state_is(replica, "hung")


async def test_an_engine_that_can_be_reached_again_is_probed_at_once():
    """The breaker's first pause is a second, the longest ten: nothing waits for it, so a few turns of the loop do."""
    engine = OneEngine()
    engine.is_away = True
    async with watched(engine) as replica:
        await state_is(replica, "open")
        with pytest.raises(EngineUnavailable):
            await replica.observe()
        engine.is_away = False
        await replica.observe()
        for _ in range(10):
            await asyncio.sleep(0)
        assert replica.state == "ok"


async def test_a_policy_that_an_engine_forgot_is_not_asked_of_it_again():
    engine = OneEngine()
    replica = Replica("policy-0", engine, BASE, canary_after=10, hung_after=30)
    replica.serve({BASE, STUDENT})
    engine.forgot = True
    with pytest.raises(PolicyNotServed):
        await draw_one(replica, STUDENT, max_tokens=1)
    assert (replica.may_serve(STUDENT), replica.may_serve(BASE)) == (False, True)


@pytest.mark.parametrize(("seconds", "num_draws"), [(60.0, 2), (0.02, 1)])
async def test_when_the_deadline_has_passed_no_other_engine_is_tried(seconds: float, num_draws: int):
    """Each takes 0.05 s to be found away."""
    engines = [OneEngine(), OneEngine()]
    for engine in engines:
        engine.is_away = True
    replicas = [Replica(f"policy-{i}", one, BASE, canary_after=10, hung_after=30) for i, one in enumerate(engines)]
    with pytest.raises(EngineUnavailable):
        await draw_one(EnginePool(replicas), BASE, max_tokens=1, seconds=seconds)
    assert sum(engine.num_draws for engine in engines) == num_draws


async def test_why_it_opened_is_known_after_a_drain_too():
    engine = OneEngine()
    engine.is_away = True
    replica = Replica("policy-0", engine, BASE, canary_after=10, hung_after=30)
    replica.drain()
    assert (replica.state, replica.reason) == ("draining", "it is drained")
    for _ in range(FAILED_CALLS):
        with pytest.raises(EngineUnavailable):
            await draw_one(replica, BASE, max_tokens=1)
    replica.undrain()
    assert (replica.state, replica.reason) == ("open", "away")


async def test_a_policy_is_in_flight_while_it_is_asked_and_was_used_when_it_gave_a_token():
    engine = OneEngine()
    replica = Replica("policy-0", engine, BASE, canary_after=10, hung_after=30)
    engine.is_away = True
    with pytest.raises(EngineUnavailable):
        await draw_one(replica, BASE, max_tokens=1)
    assert (replica.in_flight(BASE), replica.last_used_at(BASE)) == (0, 0.0)
    engine.is_away = False
    before = time.monotonic()
    drawing = asyncio.create_task(draw_one(replica, BASE, max_tokens=2))
    while not replica.last_used_at(BASE):
        await asyncio.sleep(0)
    assert replica.in_flight(BASE) == 1
    await drawing
    await replica.idle(seconds=0)
    assert replica.in_flight(BASE) == 0
    assert before < replica.last_used_at(BASE) <= time.monotonic()
    replica.forget(BASE)
    assert replica.last_used_at(BASE) == 0.0

"""How the demo's requests are laid out, against a gateway that answers from a script."""

import asyncio

import pytest

from bonsai.client import RequestRefused
from bonsai.demo import traffic
from bonsai.generation_replies import Choice
from tests.bonsai.scripted_gateway import ScriptedGateway


def test_results_come_in_the_order_of_the_items():
    async def double(value: int) -> int:
        await asyncio.sleep(0.001 * (5 - value))
        return 2 * value

    assert asyncio.run(traffic.in_parallel([1, 2, 3, 4], double, concurrency=4)) == [2, 4, 6, 8]


def test_no_more_than_the_given_number_is_under_way():
    gateway = ScriptedGateway(seconds=0.002)

    async def ask() -> None:
        async with gateway.client() as client:
            await traffic.in_parallel(["p"] * 20, client.generate, concurrency=3)

    asyncio.run(ask())
    assert gateway.most_under_way == 3
    assert len(gateway.requests) == 20


def test_the_first_failure_ends_all():
    async def ask() -> None:
        async with ScriptedGateway().client() as client:
            await traffic.in_parallel(["job_1"] * 9, client.job, concurrency=3)

    with pytest.raises(RequestRefused, match="no such job"):
        asyncio.run(ask())


def test_draws_come_in_requests_of_at_most_the_cap_and_are_kept_from_jobs():
    gateway = ScriptedGateway([1.0, 2.0])

    async def draw() -> list[list[Choice]]:
        async with gateway.client() as client:
            return await traffic.draw(client, "base", ["a", "b"], 130, concurrency=2)

    drawn = asyncio.run(draw())
    assert [len(group) for group in drawn] == [192, 192]  # 130 draws take three requests of 64 for each prompt
    assert [request["headers"]["x-bonsai-arm"] for request in gateway.requests] == ["base:64"] * 6
    assert not any(request["store"] for request in gateway.requests)
    assert all(request["wait_for_reward"] and request["return_candidates"] for request in gateway.requests)


def test_a_saturated_run_counts_every_answer_and_the_time_to_the_last():
    """Four under way, at least 10 ms each, started for 50 ms: at most five turns of four, and five tokens each."""
    gateway = ScriptedGateway(seconds=0.01)

    async def load() -> traffic.Load:
        async with gateway.client() as client:
            return await traffic.saturate(client, "base:1", ["a"], seconds=0.05, concurrency=4)

    found = asyncio.run(load())
    assert 4 <= found.answers <= 20
    assert found.answers == len(gateway.requests)
    assert found.seconds >= 0.05
    assert found.tokens == 5 * found.answers
    assert all(request["wait_for_reward"] for request in gateway.requests)


def test_speed_by_hand():
    # 10 answers in 2 s, 30 in 2 s, 12 in 2 s: 5, 15 and 6 a second, median 6; 520 tokens for 52 answers
    loads = [traffic.Load(10, 2.0, 100), traffic.Load(30, 2.0, 300), traffic.Load(12, 2.0, 120)]
    speed = traffic.speed_of([10.0, 20.0, 30.0, 40.0, 50.0], loads)
    assert speed.answers_per_second == pytest.approx(6)
    assert speed.tokens_per_answer == pytest.approx(10)
    assert (speed.p50_ms, speed.p95_ms) == pytest.approx((30, 48))


def test_no_speed_without_an_answer():
    with pytest.raises(ValueError, match="no answer"):
        traffic.speed_of([1.0], [traffic.Load(0, 2.0, 0)])

"""Admission as the life of a request meets it: turns, refusals, charges."""

from __future__ import annotations

import asyncio
import random
from time import monotonic

import pytest

from bon_algos.contracts import CandidateGroup
from service.access import Caller
from service.allowances import Allowances, TakingLimits
from service.errors import AnswerTooLong, EngineBroken, OverBudget, Overloaded, RateLimited
from service.fair_queue import FairQueue, Owner
from service.limits import SHADOW_KEY, Limits
from service.request_cost import FEWEST, CompletionLengths, drawn_tokens
from tests.service.records import group

pytestmark = pytest.mark.anyio
GREEDY, OTHER = Caller("greedy", "default", "inference"), Caller("other", "default", "inference")
ONE = group([(0.0, 3)])
"""A prompt of 1 token and at most 8 drawn: 9; in fact 4."""


UNLIMITED = Allowances("tenant", TakingLimits())


def limits_of(budget: int, room: int = 10**6, **of_a_key: int) -> Limits:
    return Limits(FairQueue(budget, room), Allowances("key", TakingLimits(**of_a_key)), UNLIMITED)


class Drawing:
    """A request that holds its place until it is told to end."""

    def __init__(self, limits: Limits, caller: Caller = GREEDY, asked: CandidateGroup = ONE, seconds: float = 60.0):
        self.is_admitted = False
        self._may_end = asyncio.Event()
        self.task = asyncio.create_task(self._life(limits, caller, asked, seconds))

    async def _life(self, limits: Limits, caller: Caller, asked: CandidateGroup, seconds: float) -> None:
        async with limits.admitted(caller, asked, asked.requested, monotonic() + seconds) as admission:
            self.is_admitted = True
            await self._may_end.wait()
            admission.group = asked

    async def end(self) -> None:
        self._may_end.set()
        await self.task

    async def go_away(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
        await settled()


async def settled() -> None:
    """Every task that can go on has gone on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def drawings(limits: Limits, count: int, caller: Caller = GREEDY) -> list[Drawing]:
    started = [Drawing(limits, caller) for _ in range(count)]
    await settled()
    return started


# --- turns -----------------------------------------------------------------------------------------------


async def test_one_key_with_1000_waiting_does_not_delay_anothers_first_request():
    limits = limits_of(budget=9)
    greedy = await drawings(limits, 1001)
    [other] = await drawings(limits, 1, OTHER)
    assert [one.is_admitted for one in greedy[:2]] == [True, False]
    await greedy[0].end()
    await settled()
    assert other.is_admitted
    assert not greedy[1].is_admitted
    assert limits.status["requests_waiting"] == 1000
    for one in greedy[1:]:
        await one.go_away()
    await other.end()
    assert limits.status["tokens_in_flight"] == limits.status["tokens_waiting"] == 0


async def test_leaving_the_queue_frees_the_place_at_once():
    limits = limits_of(budget=9)
    running, leaving, next_one = await drawings(limits, 3)
    await leaving.go_away()
    assert limits.status["requests_waiting"] == 1
    await running.end()
    await settled()
    assert next_one.is_admitted
    await next_one.end()


async def test_leaving_while_running_frees_the_place_at_once():
    limits = limits_of(budget=9)
    running, next_one = await drawings(limits, 2)
    await running.go_away()
    assert next_one.is_admitted
    await next_one.end()


async def test_whoever_goes_away_as_his_turn_comes_leaves_no_place_taken():
    limits = limits_of(budget=9)
    running, leaving, next_one = await drawings(limits, 3)
    leaving.task.cancel()
    await running.end()
    await settled()
    assert next_one.is_admitted
    await next_one.end()
    assert limits.status["tokens_in_flight"] == 0


async def test_a_time_out_of_the_work_is_not_taken_for_a_full_gateway():
    with pytest.raises(TimeoutError):
        async with limits_of(budget=9).admitted(GREEDY, ONE, ONE.requested, monotonic() + 60):
            raise TimeoutError


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_comes_and_goes_nothing_is_left_behind(seed):
    """300 requests of three keys, of which every third goes away at some moment: waiting, running, or in between."""
    draw = random.Random(seed)
    limits = limits_of(budget=100, tokens_per_minute=10**6)
    finished = 0

    async def request(steps: int) -> None:
        nonlocal finished
        asked = group([(0.0, 3)] * draw.randint(1, 16))
        async with limits.admitted(
            Caller(draw.choice("abc"), "default", "inference"), asked, asked.requested, monotonic() + 60
        ):
            status = limits.status
            assert status["tokens_in_flight"] <= 100 or status["requests_in_flight"] == 1
            for _ in range(steps):
                await asyncio.sleep(0)
        finished += 1

    tasks = [asyncio.create_task(request(draw.randint(0, 5))) for _ in range(300)]
    leaving = tasks[::3]
    draw.shuffle(leaving)
    for task in leaving:
        for _ in range(draw.randint(0, 3)):
            await asyncio.sleep(0)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
    assert finished == results.count(None) >= 200
    zero = ("tokens_in_flight", "requests_in_flight", "tokens_waiting", "requests_waiting")
    assert [limits.status[name] for name in zero] == [0] * 4


# --- the whole process is full ---------------------------------------------------------------------------


async def test_a_request_that_waited_half_of_its_time_is_refused():
    """Nothing has finished yet, so nobody knows how long it will take; half of the time is for drawing."""
    limits = limits_of(budget=9)
    [running] = await drawings(limits, 1)
    with pytest.raises(Overloaded):
        await Drawing(limits, OTHER, seconds=0.02).task
    assert limits.status["refused"]["overloaded"] == 1
    assert limits.status["requests_waiting"] == 0
    await running.end()


async def test_a_request_that_would_be_admitted_too_late_is_refused_before_it_waits():
    """Three requests of about 0.1 s each are before it, and it has 0.2 s."""
    limits = limits_of(budget=9)
    async with limits.admitted(GREEDY, ONE, ONE.requested, monotonic() + 60):
        await asyncio.sleep(0.1)
    before = await drawings(limits, 3)
    late = Drawing(limits, seconds=0.2)
    await settled()
    assert late.task.done(), "it waits"
    with pytest.raises(Overloaded, match="a request of 9 tokens"):
        await late.task
    for one in before:
        await one.end()


async def test_retry_after_is_the_estimated_wait():
    """Each token was in flight for 3 s by the queue's clock; 10 budgets must leave before."""
    queue = FairQueue(9, room=180)
    limits = Limits(queue, Allowances("key", TakingLimits()), UNLIMITED)
    ticket = queue.enter(Owner("default", "greedy"), 9)
    queue.admit(0.0)
    queue.leave(ticket, 3.0)
    before = await drawings(limits, 11)
    # 10 of 9 fill half of the room, which is what one key may fill.
    with pytest.raises(Overloaded) as refused:
        await Drawing(limits).task
    assert refused.value.retry_after == 33
    for one in before:
        await one.go_away()


async def test_a_full_queue_has_room_for_another_key():
    limits = limits_of(budget=9, room=90)
    waiting = await drawings(limits, 6)
    with pytest.raises(Overloaded):
        await Drawing(limits).task
    [other] = await drawings(limits, 1, OTHER)
    assert not other.task.done()
    for one in [*waiting, other]:
        await one.go_away()


# --- what a key is charged -------------------------------------------------------------------------------


def left(limits: Limits) -> int:
    return int(limits.headers(GREEDY)["x-ratelimit-remaining-tokens"])


async def test_a_key_is_charged_with_the_most_and_then_with_what_was_drawn():
    limits = limits_of(budget=1000, tokens_per_minute=100)
    [drawing] = await drawings(limits, 1)
    assert left(limits) == 100 - 9
    await drawing.end()
    assert left(limits) == 100 - 4


async def test_whoever_goes_away_is_charged_with_the_most():
    limits = limits_of(budget=1000, tokens_per_minute=100)
    [drawing] = await drawings(limits, 1)
    await drawing.go_away()
    assert left(limits) == 100 - 9


async def test_an_engine_that_fails_costs_the_key_nothing():
    limits = limits_of(budget=1000, tokens_per_minute=100)
    with pytest.raises(EngineBroken):
        async with limits.admitted(GREEDY, ONE, ONE.requested, monotonic() + 60):
            raise EngineBroken("it broke")
    assert left(limits) == 100


async def test_an_answer_that_was_too_long_for_us_costs_the_key_the_most():
    """Else a caller who finds out how to get one would have the engine for nothing."""
    limits = limits_of(budget=1000, tokens_per_minute=100)
    with pytest.raises(AnswerTooLong):
        async with limits.admitted(GREEDY, ONE, ONE.requested, monotonic() + 60):
            raise AnswerTooLong("it is longer than 7 bytes")
    assert left(limits) == 100 - 9


async def test_whoever_was_never_admitted_is_charged_nothing():
    limits = limits_of(budget=9, tokens_per_minute=100)
    running, waiting = await drawings(limits, 2)
    assert left(limits) == 100 - 18
    await waiting.go_away()
    assert left(limits) == 100 - 9
    await running.end()


def tenant_limits(budget: int, **of_a_tenant: int) -> Limits:
    of_a_key = TakingLimits(tokens_per_minute=1000)
    return Limits(
        FairQueue(budget, 10**6), Allowances("key", of_a_key), Allowances("tenant", TakingLimits(**of_a_tenant))
    )


async def test_all_keys_of_a_tenant_together_have_its_limit():
    limits = tenant_limits(1000, tokens_per_minute=30)
    running = [Drawing(limits, Caller(f"key-{number}", "many", "inference")) for number in range(3)]
    await settled()
    refused = Drawing(limits, Caller("another", "many", "inference"))
    with pytest.raises(RateLimited, match="this tenant may have 30 tokens in a minute"):
        await refused.task
    assert limits.headers(Caller("another", "many", "inference"))["x-ratelimit-remaining-tokens"] == "3"
    [other] = await drawings(limits, 1, Caller("a", "single", "inference"))
    assert other.is_admitted
    for one in [*running, other]:
        await one.end()
    # Each drew 4 in fact.
    assert limits.headers(Caller("key-0", "many", "inference"))["x-ratelimit-remaining-tokens"] == str(30 - 3 * 4)


async def test_what_a_tenants_limit_refuses_its_key_has_not_used():
    limits = tenant_limits(1000, tokens_in_flight=9)
    [running] = await drawings(limits, 1)
    with pytest.raises(RateLimited, match="this tenant may have 9 tokens under way"):
        await Drawing(limits, OTHER).task
    assert limits.headers(OTHER)["x-ratelimit-remaining-tokens"] == "1000"
    await running.end()


async def test_a_shadow_is_charged_to_no_tenant():
    limits = tenant_limits(1000, tokens_per_minute=30)
    [shadow] = await drawings(limits, 1, Caller(SHADOW_KEY, "default", "inference"))
    assert limits.headers(GREEDY)["x-ratelimit-remaining-tokens"] == "30"
    await shadow.end()


async def test_many_keys_of_one_tenant_and_one_of_another_get_equal_shares_under_load():
    """S7. Fifty keys with two requests each, and one with a hundred, one place: whoever was begun, in its order."""
    limits, begun = limits_of(budget=9), list[str]()

    async def request(caller: Caller) -> None:
        async with limits.admitted(caller, ONE, ONE.requested, monotonic() + 60):
            begun.append(caller.tenant)
            await asyncio.sleep(0)

    many = [Caller(f"key-{number // 2}", "many", "inference") for number in range(100)]
    await asyncio.gather(*(request(caller) for caller in [*many, *[Caller("a", "single", "inference")] * 100]))
    assert abs(begun[:100].count("many") - begun[:100].count("single")) <= 2


async def test_refusals_are_counted_by_their_kind():
    limits = limits_of(budget=1000, requests_per_minute=1, tokens_in_flight=10)
    [running] = await drawings(limits, 1)
    with pytest.raises(RateLimited):
        await Drawing(limits).task
    with pytest.raises(OverBudget):
        await Drawing(limits, OTHER, group([(0.0, 3)] * 2)).task
    assert limits.status["refused"] == {"overloaded": 0, "rate_limited": 1, "over_budget": 1}
    await running.end()


# --- what a request costs --------------------------------------------------------------------------------


def test_nothing_but_the_most_is_expected_until_lengths_are_known():
    lengths = CompletionLengths()
    asked = group([(0.0, 2)] * (FEWEST - 1))
    lengths.note(asked)
    assert lengths.cost_of(asked, asked.requested) == (1 + (FEWEST - 1) * 8, 1 + (FEWEST - 1) * 8)


def test_the_expected_cost_follows_the_lengths_of_the_route():
    """90 of 100 candidates have at most 3 tokens."""
    lengths = CompletionLengths()
    lengths.note(group([(0.0, 3)] * 90 + [(0.0, 7)] * 10))
    assert lengths.cost_of(group([(0.0, 1)] * 4), 4) == (1 + 4 * 3, 1 + 4 * 8)
    lengths.note(group([(0.0, 7)] * 2))
    assert lengths.cost_of(group([(0.0, 1)] * 4), 4) == (1 + 4 * 7, 1 + 4 * 8)
    lengths.note(group([(0.0, 2)] * 512))
    assert lengths.cost_of(group([(0.0, 1)] * 4), 4) == (1 + 4 * 2, 1 + 4 * 8)


def test_where_rewards_decide_how_many_are_drawn_the_aim_is_expected_and_the_most_is_charged():
    lengths, aimed_at_four = CompletionLengths(), group([(0.0, 1)] * 4)
    assert lengths.cost_of(aimed_at_four, 16) == (1 + 4 * 8, 1 + 16 * 8)
    assert lengths.cost_of(aimed_at_four, 2) == (1 + 2 * 8, 1 + 2 * 8)


def test_candidates_cut_at_max_tokens_say_nothing_of_how_long_they_would_have_been():
    lengths = CompletionLengths()
    filled = group([(0.0, 3)] * 100)
    cut = tuple(one.model_copy(update={"finish_reason": "length"}) for one in filled.candidates)
    lengths.note(filled.model_copy(update={"candidates": cut}))
    assert lengths.cost_of(ONE, 1) == (9, 9)


def test_a_candidate_that_the_deadline_cut_counts_in_full():
    filled = group([(0.0, 3), (0.0, 3)])
    [done, unfinished] = filled.candidates
    cut = unfinished.model_copy(update={"finish_reason": None, "failure": "deadline"})
    assert drawn_tokens(filled) == 1 + 3 + 3
    assert drawn_tokens(filled.model_copy(update={"candidates": (done, cut)})) == 1 + 3 + 8

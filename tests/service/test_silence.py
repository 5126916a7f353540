"""What a reward model's silence tells, and what its callers' impatience does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bon_algos.contracts import HttpMember, RewardConfig
from bon_algos.scoring import open_readers
from service.breaker import FAILED_CALLS, LAST_CALLS
from service.errors import RewardModelUnavailable
from service.reward import RewardModel
from service.silence import Silence
from tests.fixtures.waiting import wait_until
from tests.service.test_breaker import Clock
from tests.stubs.reward import StubScore
from tests.stubs.server import running
from worker.job_process import read_tokenizer

pytestmark = pytest.mark.anyio
SECONDS = 0.05


def test_what_counts_is_time_in_which_somebody_waits_and_of_two_at_once_it_counts_once():
    clock = Clock()
    silence = Silence(clock)
    silence.call_begins()
    clock.now += 2
    silence.call_begins()
    clock.now += 3
    silence.call_ends()
    clock.now += 4
    silence.call_ends()
    assert silence.seconds == 9
    clock.now += 100
    assert silence.seconds == 9
    silence.call_begins()
    clock.now += 1
    assert silence.seconds == 10


def test_an_answer_to_one_ends_the_silence_for_all_who_wait():
    clock = Clock()
    silence = Silence(clock)
    for _ in range(2):
        silence.call_begins()
    clock.now += 5
    silence.broken()
    silence.call_ends()
    assert silence.seconds == 0
    clock.now += 1
    assert silence.seconds == 1


@pytest.fixture
def judge() -> StubScore:
    stub = StubScore("judge")
    stub.script.fault = "silent"
    return stub


@pytest.fixture
async def model(judge: StubScore) -> AsyncIterator[Callable[[float], RewardModel]]:
    """model(seconds) -> a reward model that hangs, and may be silent for so long."""
    with running(judge.app()) as url:
        config = RewardConfig(members=(HttpMember(url=url, model="judge"),))
        readers = open_readers(config, lambda member: read_tokenizer(Path()))
        async with AsyncExitStack() as stack:

            def opened(seconds: float) -> RewardModel:
                reward_model = RewardModel(config, readers, hung_after=seconds)
                stack.push_async_callback(reward_model.close)
                return reward_model

            yield opened


async def given_up(reward_model: RewardModel) -> None:
    """A call that waits for its deadline in vain."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SECONDS):
            await reward_model.score("hi", None, ["a"])


def is_up(reward_model: RewardModel) -> bool:
    try:
        reward_model.require_up()
    except RewardModelUnavailable:
        return False
    return True


async def given_up_until_it_is_closed(reward_model: RewardModel) -> int:
    """How many calls it took."""
    for calls in range(1, 30):
        await given_up(reward_model)
        if not is_up(reward_model):
            return calls
    raise AssertionError("it is asked for ever")


@pytest.mark.slow
async def test_a_reward_model_that_answers_nobody_is_asked_no_more(model: Callable[[float], RewardModel]):
    """Each deadline that passes counts once the silence is as long as twelve of them. What was waited before is not
    held against the next try: it is followed by another at once."""
    reward_model = model(12 * SECONDS)
    assert FAILED_CALLS <= await given_up_until_it_is_closed(reward_model) <= 12 + FAILED_CALLS
    wait_until(lambda: is_up(reward_model))
    await given_up(reward_model)
    assert is_up(reward_model)


async def test_callers_without_patience_do_not_close_it_to_others(model: Callable[[float], RewardModel]):
    reward_model = model(600.0)
    for _ in range(LAST_CALLS):
        await given_up(reward_model)
    assert is_up(reward_model)


async def test_who_is_answered_shows_that_it_does_not_hang(judge: StubScore, model: Callable[[float], RewardModel]):
    """Between two impatient callers a patient one gets his rewards."""
    reward_model = model(6 * SECONDS)
    for _ in range(6 + FAILED_CALLS):
        judge.script.fault = "silent"
        await given_up(reward_model)
        judge.script.fault = "none"
        await reward_model.score("hi", None, ["a"])
    assert is_up(reward_model)

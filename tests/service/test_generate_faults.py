"""`POST /generate` when time runs out and when engines fail: what is answered, and what the ledger keeps."""

from __future__ import annotations

import time

import pytest

from service.breaker import FAILED_CALLS, LAST_CALLS
from tests.fixtures.waiting import wait_until
from tests.service.bad_input import CHAT, GENERATE, PLAIN
from tests.service.records import BASE

HI = {"prompt": "hi"}


# --- the deadline -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_at_the_deadline_a_quorum_is_enough(world):
    """10 of 16 are quick, 6 never finish: the best of 10 before the deadline, and the call is closed."""
    world.engine.script.completions = ["x" * (i + 1) for i in range(16)]
    world.engine.script.delays = [0.0] * 10 + [60.0] * 6
    started = time.monotonic()
    body = world.client.post("/generate?n=16", {**HI, "timeout_ms": 1000}).json
    assert time.monotonic() - started < 1.0
    assert body["completion"] == "x" * 10
    assert body["selection"]["status"] == "deadline"
    assert body["candidates"] == {"requested": 16, "finished": 10, "scored": 10, "failed": {"deadline": 6}}
    wait_until(lambda: len(world.engine.aborted_at) == 1)
    [group] = world.groups()
    assert not group.is_unbiased


@pytest.mark.slow
def test_below_the_quorum_it_is_504_with_what_was_finished_and_the_group_is_logged_unserved(world):
    world.engine.script.delays = [0.0, 0.0] + [60.0] * 14
    started = time.monotonic()
    reply = world.client.post("/generate?n=16", {**HI, "timeout_ms": 500})
    assert 0.45 < time.monotonic() - started < 1.5
    assert reply.status == 504
    assert reply.json["error"]["code"] == "deadline_exceeded"
    counts = {"requested": 16, "finished": 2, "scored": 0, "failed": {"deadline": 14}}
    assert reply.json["candidates"] == counts
    assert world.reward.requests == []
    [group] = world.groups()
    assert (group.selected, group.status) == (None, "deadline")


@pytest.mark.slow
def test_after_the_slice_for_scoring_began_the_quorum_ends_the_drawing(world):
    """Deadline 2 s, scoring slice 0.4 s: at 1.6 s one of 2 is there, at 1.7 s the second of the quorum comes."""
    world.engine.script.delays = [0.0, 1.7, 60.0]
    body = world.client.post("/generate?n=3", {**HI, "timeout_ms": 2000, "quorum": 2}).json
    assert body["selection"]["status"] == "deadline"
    assert body["candidates"]["scored"] == 2


@pytest.mark.slow
def test_a_quorum_of_the_caller_is_kept(world):
    world.engine.script.delays = [0.0, 60.0, 60.0, 60.0]
    assert world.client.post("/generate?n=4", {**HI, "timeout_ms": 300}).status == 504
    assert world.client.post("/generate?n=4", {**HI, "timeout_ms": 1000, "quorum": 1}).status == 200


@pytest.mark.slow
def test_an_engine_that_never_answers_is_504_at_the_deadline_and_is_left(world):
    world.engine.script.fault = "silent"
    started = time.monotonic()
    assert world.client.post("/generate?n=4", {**HI, "timeout_ms": 500}).status == 504
    assert 0.45 < time.monotonic() - started < 1.5
    wait_until(lambda: world.engine.active == 0)


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", [GENERATE, CHAT])
def test_the_header_says_how_long_as_the_body_does(world, endpoint):
    world.engine.script.fault = "silent"
    for fields in ({}, {"timeout_ms": 500}):
        started = time.monotonic()
        reply = world.client.post(endpoint, {**PLAIN[endpoint], **fields}, {"x-bonsai-timeout": "500"})
        assert reply.status == 504
        assert 0.45 < time.monotonic() - started < 1.5


@pytest.mark.slow
def test_a_reward_model_that_never_answers_is_504_at_the_deadline(world):
    world.reward.script.fault = "silent"
    reply = world.client.post("/generate?n=2", {**HI, "timeout_ms": 500})
    assert reply.status == 504
    assert reply.json["candidates"]["failed"] == {"not_scored": 2}
    [group] = world.groups()
    assert (group.selected, group.status) == (None, "deadline")


# --- engines that fail ------------------------------------------------------------------------------------

BROKEN = ["error", "cut", "no_end", "garbage", "error_inside", "one_missing", "wrong_index", "nan_logprob", "endless"]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_engine_is_502_without_a_second_try_and_nothing_is_logged(world, fault):
    world.engine.script.fault = fault
    reply = world.client.post("/generate?n=4", HI)
    assert (reply.status, reply.json["error"]["code"]) == (502, "engine_broken")
    assert b"secret detail" not in reply.body
    assert len(world.engine.requests) == 1
    world.engine.script.fault = "none"
    world.client.post("/generate?n=2", HI)
    assert [group.requested for group in world.groups()] == [2]


def test_an_answer_longer_than_we_read_closes_the_engine_to_nobody(world):
    """The limit is ours: an engine that was asked for much has not failed."""
    world.engine.script.fault = "endless"
    for _ in range(LAST_CALLS):
        assert world.client.post("/generate?n=1", {**HI, "max_tokens": 1}).status == 502
    world.engine.script.fault = "none"
    assert world.client.post("/generate?n=1", HI).status == 200


def test_a_whole_answer_with_every_alternative_is_read(world):
    """20 alternatives of some 36 bytes to each of 254 tokens, all that fit behind the prompt."""
    world.engine.script.completions = ["x" * 254]
    world.engine.script.alternatives = {token: -12.345678901234567 - token for token in range(20, 40)}
    asked = {"model": BASE, "prompt": "hi", "max_tokens": 254, "logprobs": 20, "best_of": 1}
    [choice] = world.client.post("/v1/completions", asked).json["choices"]
    assert [len(of_token) for of_token in choice["logprobs"]["top_logprobs"]] == [20] * 254


def test_a_full_engine_is_503_with_a_time_to_come_back(world):
    world.engine.script.fault = "busy"
    reply = world.client.post("/generate?n=4", HI)
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_unavailable")
    assert reply.headers["retry-after"] == "1"


def test_an_engine_that_forgot_the_policy_is_503(world):
    world.engine.script.models = []
    reply = world.client.post("/generate?n=4", HI)
    assert (reply.status, reply.json["error"]["code"]) == (503, "policy_not_served")


@pytest.mark.parametrize("fault", ["error", "one_missing", "doubled", "two_labels", "garbage"])
def test_a_broken_reward_model_is_502_and_the_candidates_are_logged_unserved(world, fault):
    world.reward.script.fault = fault
    reply = world.client.post("/generate?n=2", HI)
    assert (reply.status, reply.json["error"]["code"]) == (502, "reward_model_broken")
    [group] = world.groups()
    assert (group.selected, group.status) == (None, "reward_failed")


def test_a_reward_model_away_is_503_never_a_random_winner(world):
    world.reward.script.fault = "busy"
    reply = world.client.post("/generate?n=2", HI)
    assert (reply.status, reply.json["error"]["code"]) == (503, "reward_model_unavailable")
    assert reply.headers["retry-after"] == "1"


def test_for_a_reward_model_that_fails_nothing_is_drawn_until_it_is_tried_again(world):
    world.reward.script.fault = "error"
    assert {world.client.post("/generate?n=2", HI).status for _ in range(FAILED_CALLS)} == {502}
    refused, ready = world.client.post("/generate?n=2", HI), world.client.get("/ready")
    assert (refused.status, refused.json["error"]["code"]) == (503, "reward_model_unavailable")
    assert refused.headers["retry-after"] == "1"
    assert (ready.status, ready.json["reward_model"]) == (503, "the reward model fails")
    assert len(world.engine.requests) == FAILED_CALLS
    assert world.client.post("/generate?n=1", HI).status == 200
    world.reward.script.fault = "none"
    wait_until(lambda: world.client.post("/generate?n=2", HI).status == 200)
    assert world.client.get("/ready").json["reward_model"] == "ok"


@pytest.mark.slow
def test_a_try_whose_deadline_passed_is_followed_by_another_at_once(world):
    """The deadline was its caller's: nobody else has to wait for that."""
    world.reward.script.fault = "error"
    for _ in range(FAILED_CALLS):
        world.client.post("/generate?n=2", HI)
    world.reward.script.fault = "silent"
    wait_until(lambda: world.client.post("/generate?n=2", {**HI, "timeout_ms": 300}).status == 504)
    world.reward.script.fault = "none"
    assert world.client.post("/generate?n=2", HI).status == 200


def test_rewards_none_of_which_is_finite_are_502(world):
    world.reward.script.score = lambda text: None
    reply = world.client.post("/generate?n=2", HI)
    assert (reply.status, reply.json["error"]["code"]) == (502, "reward_model_broken")

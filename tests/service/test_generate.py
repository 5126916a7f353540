"""`POST /generate` over real HTTP, against engines that say what the test tells them to say.

The stub's reward is the length of the conversation the reward model reads; for the prompt "hi" that is
"u:hi\\n" + "a:" + completion + "\\n", 8 more than the completion.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest

from bon_algos.contracts import Arm, Exposure, Outcome
from service.best_of_n import choose
from tests.fixtures.gateway import Client
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE

HI = {"prompt": "hi"}
JSON = {"Content-Type": "application/json"}


def test_the_highest_reward_is_served_and_all_candidates_are_logged(world):
    world.engine.script.completions = ["short", "the longest of them all", "middling one"]
    reply = world.client.post("/generate?n=3", {**HI, "return_candidates": True})
    assert reply.status == 200
    body = reply.json
    assert (body["completion"], body["reward"]) == ("the longest of them all", 8 + 23)
    # The runner-up is "middling one" with 8 + 12.
    reward_model = world.reward.model
    assert body["selection"] == {
        "status": "ok",
        "strategy": "fixed",
        "stop_reason": "fixed",
        "reward_model": reward_model,
        "reward": 31.0,
        "margin": 11.0,
        "given_up": 0.0,
        "disagreement": None,
        "tokens_saved": 0,
    }
    assert body["candidates"] == {"requested": 3, "finished": 3, "scored": 3, "failed": {}}
    # One token per byte: 2 of the prompt, 23 of the winner, 5 + 12 thrown away.
    usage = {"prompt_tokens": 2, "completion_tokens": 23, "discarded_tokens": 17, "total_tokens": 42}
    assert body["usage"] == usage
    assert [choice["selected"] for choice in body["choices"]] == [False, True, False]
    assert [choice["logprob"] for choice in body["choices"]] == [-0.5 * 5, -0.5 * 23, -0.5 * 12]
    [group] = world.groups()
    assert group.id == body["id"]
    assert [candidate.text for candidate in group.candidates] == ["short", "the longest of them all", "middling one"]
    assert [candidate.reward for candidate in group.candidates] == [13.0, 31.0, 20.0]
    assert group.is_unbiased
    assert (len(world.engine.requests), len(world.reward.requests)) == (1, 1)


def test_the_headers_say_who_answered_and_how(world):
    headers = world.client.post("/generate?n=2", HI, {"X-Request-Id": "run-7"}).headers
    assert headers["x-request-id"] == "run-7"
    assert headers["x-bonsai-arm"] == f"{BASE}:2"
    assert headers["x-bonsai-policy"] == BASE
    assert headers["x-bonsai-candidates"] == "2/2"
    assert headers["x-bonsai-selection"] == "ok"
    assert 0 <= float(headers["x-bonsai-overhead-duration-ms"]) < 1000


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_reply_says_how_many_tokens_it_cost(world, path):
    """One token per byte: the prompt once, and every candidate whether it is returned or not."""
    world.engine.script.completions = ["one", "three", "fifteen"]
    n = {"n": 3} if path == "/generate" else {"best_of": 3, "model": "default"}
    assert world.client.post(path, {**HI, **n}).headers["x-bonsai-cost"] == str(len("hi" + "one" + "three" + "fifteen"))


def test_the_engine_is_asked_once_with_exactly_what_it_may_be_asked(world):
    world.client.post(
        "/generate",
        {
            **HI,
            "n": 4,
            "max_tokens": 9,
            "temperature": 0.7,
            "stop": "x",
            "seed": 3,
            "user": "u",
            "metadata": {"a": "b"},
        },
        {"X-Request-Id": "mine"},
    )
    [request] = world.engine.requests
    assert request["n"] == 4
    assert request["stream_interval"] == 9
    assert (request["temperature"], request["stop"], request["seed"]) == (0.7, ["x"], 3)
    assert all(isinstance(token, int) for token in request["prompt"])
    assert not {"user", "metadata", "request_id"} & request.keys()
    assert "mine" not in json.dumps(request)


def test_messages_are_rendered_by_the_template_of_each_model(world):
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    world.client.post("/generate?n=2", {"messages": [*conversation, {"role": "user", "content": "so?"}]})
    [group] = world.groups()
    assert group.prompt == "u:hi\na:yo\nu:so?\na:"
    assert world.reward.texts == ["u:hi\na:yo\nu:so?\na:a fine answer\n"] * 2


def test_n_may_stand_in_query_and_body_when_they_agree(world):
    assert world.client.post("/generate?n=5", {**HI, "n": 5}).json["candidates"]["requested"] == 5


def test_the_route_says_how_many_when_the_caller_does_not(world):
    assert world.client.post("/generate", HI).json["candidates"]["requested"] == 16


def test_max_tokens_of_the_route_is_lowered_to_what_fits(world):
    """245 bytes of prompt in a window of 256 leave 11; a caller who names 11 gets them, 12 are refused."""
    prompt = "x" * 245
    world.reward.script.score = lambda text: 1.0
    world.engine.script.completions = ["ok"]
    world.client.post("/generate?n=2", {"prompt": prompt})
    world.client.post("/generate?n=2", {"prompt": prompt, "max_tokens": 11})
    assert [request["max_tokens"] for request in world.engine.requests] == [11, 11]
    assert world.client.post("/generate?n=2", {"prompt": prompt, "max_tokens": 12}).status == 422


# --- what becomes of candidates ---------------------------------------------------------------------------


def test_soft_best_of_n_serves_in_proportion_and_says_what_it_gave_up(world):
    """Rewards 9 and 10, λ = 1: the better one is served with e/(1 + e) = .731. Each group's id decides, so that its
    record gives the same choice again."""
    route = {"strategy": "soft", "softness": 1.0, "default_n": 2}
    assert world.client.request("PUT", "/routes/default", json.dumps(route).encode(), JSON).status == 200
    world.engine.script.completions = ["a", "bb"]
    bodies = [world.client.post("/generate", HI).json for _ in range(120)]
    assert {body["selection"]["strategy"] for body in bodies} == {"soft"}
    served = [body["completion"] for body in bodies]
    assert 0.731 - 0.14 < served.count("bb") / len(served) < 0.731 + 0.14  # 3.5 standard deviations
    assert all(body["selection"]["given_up"] == (1.0 if body["completion"] == "a" else 0.0) for body in bodies)
    for group in world.groups(120):
        assert group.softness == 1.0
        again = choose(group.model_copy(update={"selected": None}), quorum=1).group
        assert again.selected == group.selected
    assert all(group.is_unbiased for group in world.groups(120))


def test_softness_belongs_to_soft(world):
    for route in ({"strategy": "soft"}, {"softness": 1.0}, {"strategy": "soft", "softness": 0}):
        refused = world.client.request("PUT", "/routes/default", json.dumps(route).encode(), JSON)
        assert (refused.status, refused.json["error"]["param"]) == (422, "softness")


def test_ties_go_to_the_earliest(world):
    world.engine.script.completions = ["one", "two", "six"]
    body = world.client.post("/generate?n=3", HI).json
    assert body["completion"] == "one"
    assert body["selection"]["margin"] == 0.0


def test_scores_are_matched_by_index_not_by_place(world):
    world.engine.script.completions = ["a", "bbbb", "cc"]
    world.reward.script.is_reversed = True
    assert world.client.post("/generate?n=3", HI).json["completion"] == "bbbb"


def test_empty_candidates_are_failures_and_make_the_group_partial(world):
    """3 of 16 come back empty (fault F5): the best of 13, and reply and row say so."""
    world.engine.script.completions = [" " if i in (2, 5, 7) else "x" * (i + 1) for i in range(16)]
    body = world.client.post("/generate?n=16", HI).json
    assert body["completion"] == "x" * 16
    assert body["candidates"] == {"requested": 16, "finished": 16, "scored": 13, "failed": {"empty": 3}}
    assert body["selection"]["status"] == "partial"
    [group] = world.groups()
    assert [i for i, candidate in enumerate(group.candidates) if candidate.failure == "empty"] == [2, 5, 7]
    assert not group.is_unbiased


def test_an_empty_completion_is_served_only_when_all_are_empty(world):
    world.engine.script.completions = [""]
    body = world.client.post("/generate?n=2", HI).json
    assert body["completion"] == ""
    assert body["selection"]["status"] == "ok"
    assert body["warnings"] == ["the completion is empty"]


def test_a_truncated_candidate_wins_only_without_a_complete_one(world):
    world.engine.script.completions = ["truncated but longest", "whole"]
    world.engine.script.finish_reasons = ["length", "stop"]
    body = world.client.post("/generate?n=2", HI).json
    assert (body["completion"], body["warnings"]) == ("whole", [])
    world.engine.script.finish_reasons = ["length"]
    body = world.client.post("/generate?n=2", HI).json
    assert body["completion"] == "truncated but longest"
    assert body["finish_reason"] == "length"
    assert body["warnings"] == ["the completion was cut at max_tokens"]


def test_rewards_that_are_not_finite_never_rank(world):
    world.engine.script.completions = ["good", "broken but long"]
    world.reward.script.score = lambda text: None if "broken" in text else 1.0
    body = world.client.post("/generate?n=2", HI).json
    assert body["completion"] == "good"
    assert body["candidates"]["failed"] == {"reward_not_finite": 1}
    assert body["selection"] == {
        "status": "partial",
        "reward_model": world.reward.model,
        "reward": 1.0,
        "margin": None,
        "strategy": "fixed",
        "stop_reason": "fixed",
        "given_up": 0.0,
        "disagreement": None,
        "tokens_saved": 0,
    }


def test_what_is_too_long_for_the_reward_model_fails_and_is_not_cut(world):
    """Its window is 256; "u:hi\\na:" + completion + "\\n" has 8 more than the completion: 248 fit, 249 do not."""
    world.engine.script.completions = ["x" * 248, "y" * 249]
    body = world.client.post("/generate?n=2", {**HI, "max_tokens": 250}).json
    assert body["completion"] == "x" * 248
    assert body["candidates"]["failed"] == {"too_long": 1}
    world.engine.script.completions = ["y" * 249]
    reply = world.client.post("/generate?n=2", {**HI, "max_tokens": 250})
    assert reply.status == 422
    assert reply.json["error"]["code"] == "too_long_for_reward_model"


def test_temperature_0_is_served_with_a_warning(world):
    body = world.client.post("/generate?n=2", {**HI, "temperature": 0}).json
    assert body["warnings"] == ["temperature 0 makes all candidates alike: n buys nothing"]
    assert not world.groups()[0].is_unbiased


# --- one sample -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_sample_is_answered_before_it_is_scored_and_its_reward_follows(world):
    world.reward.script.delay = 1.0
    started = time.monotonic()
    body = world.client.post("/generate?n=1", HI).json
    assert time.monotonic() - started < 1.0
    assert (body["reward"], body["selection"]["status"]) == (None, "single")
    wait_until(lambda: len(world.records()) == 2)
    group, outcome = world.records()
    assert (group.id, group.scored) == (body["id"], ())
    assert isinstance(outcome, Outcome)
    assert (outcome.group_id, outcome.rewards) == (body["id"], (8.0 + 13,))


def test_one_sample_is_scored_first_when_its_caller_waits(world):
    body = world.client.post("/generate?n=1", {**HI, "wait_for_reward": True}).json
    assert (body["reward"], body["selection"]["status"]) == (21.0, "single")
    [group] = world.groups()
    assert group.candidates[0].reward == 21.0


def test_one_sample_survives_a_reward_model_that_is_away(world):
    world.reward.script.fault = "error"
    body = world.client.post("/generate?n=1", {**HI, "wait_for_reward": True}).json
    assert (body["reward"], body["selection"]["status"]) == (None, "reward_failed")
    assert body["warnings"] == ["the reward model did not answer: the completion has no reward"]


@pytest.mark.slow
def test_a_measurement_is_tried_again(world):
    world.reward.script.fault = "busy"
    world.client.post("/generate?n=1", HI)
    wait_until(lambda: len(world.reward.requests) >= 1)
    world.reward.script.fault = "none"
    wait_until(lambda: len(world.records()) == 2)
    assert world.records()[1].rewards == (21.0,)


# --- the client -------------------------------------------------------------------------------------------


def test_G41_text_that_turns_around_is_kept_as_it_was_said(world):
    """Bidirectional controls and joiners are text: served, logged, refused nowhere."""
    turned = "a\u202eb\u200d\u2066c"
    assert world.client.post("/generate?n=2", {"prompt": turned}).status == 200
    assert world.groups()[0].prompt == turned


def send_and_leave(client: Client, path: str, seen: Callable[[], bool]) -> None:
    with socket.create_connection(client.address, timeout=10) as connection:
        connection.sendall(client.written("POST", path, json.dumps(HI).encode()))
        wait_until(seen)


def test_a_client_that_leaves_while_drawing_stops_the_engine_within_200_ms(world):
    world.engine.script.delays = [60.0]
    send_and_leave(world.client, "/generate?n=4", lambda: world.engine.active == 1)
    left = time.monotonic()
    wait_until(lambda: len(world.engine.aborted_at) == 1)
    assert world.engine.aborted_at[0] - left < 0.2
    world.engine.script.delays = [0.0]
    world.client.post("/generate?n=2", HI)
    # What nobody waited for is not in the ledger; what came after it is.
    assert [group.requested for group in world.groups()] == [2]


def test_a_client_that_leaves_while_scoring_leaves_nothing_behind(world):
    world.reward.script.fault = "silent"
    send_and_leave(world.client, "/generate?n=4", lambda: len(world.reward.requests) == 1)
    world.reward.script.fault = "none"
    world.client.post("/generate?n=2", HI)
    assert [group.requested for group in world.groups()] == [2]


# --- store, arms, experiments -----------------------------------------------------------------------------


def test_store_false_keeps_rewards_and_counts_and_no_text(world):
    world.engine.script.completions = ["confidential", "also confidential"]
    body = world.client.post("/generate?n=2", {**HI, "store": False}).json
    assert body["completion"] == "also confidential"
    [group] = world.groups()
    assert [candidate.reward for candidate in group.candidates] == [20.0, 25.0]
    assert (group.prompt, group.messages, group.prompt_token_ids) == ("", None, ())
    assert all(c.text == "" and c.token_ids == () and c.logprobs == () for c in group.candidates)
    assert not group.is_unbiased


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_key_says_whether_texts_are_kept_where_a_request_does_not(world, path):
    made = world.client.post("/keys", {"name": "n", "role": "inference", "store": False}).json
    assert (made["store"], world.client.get(f"/keys/{made['id']}").json["store"]) == (False, False)
    silent = world.client.with_key(made["key"])
    asked = HI if path == "/generate" else {"model": "default", **HI}
    for body in (asked, {**asked, "store": True}):
        assert silent.post(path, body).status == 200
    assert world.client.post(path, asked).status == 200
    assert [(group.store, bool(group.prompt)) for group in world.groups(3)] == [
        (False, False),
        (True, True),
        (True, True),
    ]
    # The reply is kept nowhere, so it cannot be replayed.
    refused = silent.post(path, asked, {"Idempotency-Key": "one"})
    assert (refused.status, refused.json["error"]["param"]) == (422, "Idempotency-Key")


def test_a_forced_arm_answers_and_is_no_exposure(world):
    body = world.client.post("/generate", HI, {"x-bonsai-arm": "base:3"}).json
    assert (body["arm"], body["arm_reason"], body["experiment"]) == (f"{BASE}:3", "forced", None)
    [group] = world.groups()
    assert group.arm == Arm(policy=BASE, n=3)


def test_an_experiment_assigns_stickily_and_its_exposure_comes_first(world):
    # The route draws 16 when the caller does not say: no arm may draw fewer at most.
    arms = [{"policy": "base", "n": 2, "weight": 5000}, {"policy": "base", "n": 16, "weight": 5000}]
    body, content = json.dumps({"arms": arms}).encode(), {"Content-Type": "application/json"}
    # Until the engine has been seen to serve the base, nothing may be tested on it.
    wait_until(lambda: world.client.request("PUT", "/experiments/default", body, content).status < 300)
    experiment = world.client.get("/experiments/default").json["id"]
    warm_up = {**HI, "user": "warm-up"}
    wait_until(lambda: world.client.post("/generate", warm_up).json["experiment"] == experiment)
    seen = {world.client.post("/generate", {**HI, "user": "ada"}).json["arm"] for _ in range(5)}
    assert len(seen) == 1
    # 20 fair draws miss one of two arms with probability 2 / 2^20.
    many = {world.client.post("/generate", HI, {"x-bonsai-unit": f"u{i}"}).json["arm"] for i in range(20)}
    assert many == {f"{BASE}:2", f"{BASE}:16"}
    # One warm-up, five of ada's, twenty others: an exposure and a group each.
    wait_until(lambda: len([record for record in world.records() if record.experiment]) >= 52)
    records = [record for record in world.records() if record.experiment == experiment]
    for exposure, group in zip(records[::2], records[1::2], strict=True):
        assert isinstance(exposure, Exposure)
        assert (exposure.group_id, exposure.arm) == (group.id, group.arm)
    shown = world.client.get("/experiments/default").json["arms"]
    assert sum(arm["exposures"] for arm in shown) == sum(arm["answers"] for arm in shown) == len(records) // 2


def test_one_sample_is_answered_also_when_its_prompt_is_too_long_for_the_reward_model(world):
    """250 bytes and a template of 8 leave no room in 256: with n = 1 that only costs the measurement."""
    long = {"prompt": "x" * 250}
    refused = world.client.post("/generate?n=2", long)
    assert (refused.status, refused.json["error"]["param"]) == (422, "prompt")
    assert world.client.post("/generate?n=1", long).status == 200
    wait_until(lambda: len(world.records()) == 2)
    assert world.records()[1].rewards == (None,)

"""Waves that stop by rewards, and what can go wrong in a later one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from zlib import compress

import numpy as np
import pytest
import redis

from archive.reading import Archive
from archive.storage import archive_url
from bon_algos.contracts import LEDGER_STREAM, CandidateGroup
from service.catalogue import Catalogue
from service.errors import StoreUnavailable
from service.learned import GROUPS_NEEDED, Learned, LearnedStrategies
from service.store import open_redis
from tests.fixtures.gateway import World
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, policy, route
from tests.service.strategy_world import (
    FIRST,
    HI,
    ROUTE,
    N,
    chunks_of,
    from_the_second_wave,
    gateway,
    known,
    log_history,
)
from tests.service.test_admin_routes import send
from tests.service.test_curve import ALL_TRIMMED, archived
from tests.service.test_generate import send_and_leave
from tests.stubs.tokenizer import token_ids

__all__ = ["gateway"]


@pytest.fixture
def adaptive(gateway: Callable[..., World]) -> World:
    """A gateway that knows the rewards of every prompt to be standard normal, more or less."""
    world = gateway()
    log_history(world, np.random.default_rng(0).normal(size=(150, N)))
    assert send(world, "PUT", "/routes/default", ROUTE).status == 200
    wait_until(lambda: known(world)["adaptive"] is not None, seconds=60)
    return world


def served(world: World) -> CandidateGroup:
    """The group of the last request; the first 150 are the history."""
    wait_until(lambda: len(world.records()) == 151)
    found = world.records()[-1]
    assert isinstance(found, CandidateGroup)
    return found


# --- adaptive --------------------------------------------------------------------------------------------


def test_a_reward_far_above_what_is_known_ends_the_drawing(adaptive):
    adaptive.engine.script.completions = ["6.0", "0.0"]
    reply = adaptive.client.post("/generate", HI)
    body = reply.json
    assert (body["completion"], body["reward"], body["arm"]) == ("6.0", 6.0, f"{BASE}:{N}")
    assert [request["n"] for request in adaptive.engine.requests] == [FIRST]
    assert body["candidates"] == {"requested": FIRST, "finished": FIRST, "scored": FIRST, "failed": {}}
    assert reply.headers["x-bonsai-candidates"] == f"{FIRST}/{FIRST}"
    selection = body["selection"]
    assert (selection["status"], selection["strategy"], selection["stop_reason"]) == (
        "ok",
        "adaptive",
        "gain_below_price",
    )
    # Three tokens each (one per byte): six candidates of the eight were never drawn.
    assert selection["tokens_saved"] == 3 * (N - FIRST)
    assert 0 <= selection["given_up"] < 0.01
    assert body["usage"]["discarded_tokens"] == 3 * (FIRST - 1)
    assert body["warnings"] == []


def test_low_rewards_are_followed_by_waves_that_continue_the_numbering(adaptive):
    adaptive.engine.script.completions = ["-1.5", "-1.25"]
    body = adaptive.client.post("/generate", {**HI, "seed": 5, "return_candidates": True}).json
    drawn = [request["n"] for request in adaptive.engine.requests]
    assert len(drawn) > 1
    # A seed goes on where the last wave ended: the engine adds the candidate's place to it.
    starts = [sum(drawn[:i]) for i in range(len(drawn))]
    assert [request["seed"] for request in adaptive.engine.requests] == [5 + start for start in starts]
    assert len(adaptive.reward.requests) == len(drawn)
    assert [choice["text"] for choice in body["choices"]] == ["-1.5", "-1.25"] * (sum(drawn) // 2)
    assert body["candidates"]["scored"] == body["candidates"]["requested"] == sum(drawn)
    assert body["usage"]["total_tokens"] == 2 + sum(len(choice["text"]) for choice in body["choices"])
    group = served(adaptive)
    assert (len(group.candidates), group.requested, group.selected) == (sum(drawn), sum(drawn), 1)
    assert group.stop_reason in ("gain_below_price", "cap")
    assert not group.is_unbiased


def test_what_stopped_by_its_rewards_is_in_no_curve_and_is_not_learned_from(adaptive):
    adaptive.engine.script.completions = ["6.0", "0.0"]
    before = adaptive.client.get("/routes/default/curve").json
    assert adaptive.client.post("/generate", HI).status == 200
    served(adaptive)
    after = adaptive.client.get("/routes/default/curve").json
    assert after["skipped"] == {"not_fixed": 1}
    assert after["points"] == before["points"]
    log_history(adaptive, np.random.default_rng(1).normal(size=(20, N)), first=150)
    wait_until(lambda: known(adaptive)["groups"] != 150)
    assert known(adaptive)["groups"] == 170


def test_a_larger_n_is_worth_more_tokens(adaptive):
    """The same prompt, whose rewards are about the best of four: enough for fixed 4, not for fixed 15."""
    adaptive.engine.script.completions = ["1.0", "0.0"]
    few, many = (adaptive.client.post(f"/generate?n={n}", HI).json["candidates"]["requested"] for n in (4, 15))
    assert few == FIRST < many


def test_another_law_than_the_one_that_is_known_is_drawn_in_full(adaptive):
    body = adaptive.client.post("/generate", {**HI, "temperature": 0.5}).json
    assert (body["candidates"]["requested"], body["selection"]["strategy"]) == (N, "fixed")
    assert "temperature 1" in body["warnings"][0]


def test_a_forced_arm_is_drawn_in_full(adaptive):
    adaptive.engine.script.completions = ["6.0", "0.0"]
    body = adaptive.client.post("/generate", HI, {"x-bonsai-arm": f"base:{N}"}).json
    assert (body["candidates"]["requested"], body["selection"]["stop_reason"]) == (N, "fixed")


def test_until_enough_is_known_all_n_are_drawn_and_the_reply_says_so(gateway):
    world = gateway()
    log_history(world, np.random.default_rng(0).normal(size=(GROUPS_NEEDED - 1, N)))
    world.engine.script.completions = ["6.0", "0.0"]
    assert send(world, "PUT", "/routes/default", ROUTE).status == 200
    wait_until(lambda: known(world)["groups"] == GROUPS_NEEDED - 1)
    body = world.client.post("/generate", HI).json
    assert body["candidates"]["requested"] == N
    [warning] = body["warnings"]
    assert f"{GROUPS_NEEDED - 1} of the {GROUPS_NEEDED} groups" in warning
    drawn = world.groups(GROUPS_NEEDED)[-1]
    assert (drawn.stop_reason, drawn.is_unbiased) == ("fixed", True)


def test_a_record_that_cannot_be_read_stops_no_learning(gateway):
    world = gateway()
    with redis.Redis.from_url(world.redis_url) as store:
        for data in (compress(b"{}"), b"no zlib"):
            store.xadd(LEDGER_STREAM, {"kind": "group", "id": "x", "data": data})
    log_history(world, np.random.default_rng(0).normal(size=(GROUPS_NEEDED, N)))
    send(world, "PUT", "/routes/default", ROUTE)
    wait_until(lambda: known(world)["adaptive"] is not None, seconds=60)
    assert known(world)["groups"] == GROUPS_NEEDED


@pytest.mark.parametrize("behind", [0, 7], ids=["all of it", "but the newest"])
def test_what_the_stream_has_no_more_is_learned_from_the_archive(gateway, tmp_path, behind):
    world = gateway()
    log_history(world, np.random.default_rng(0).normal(size=(GROUPS_NEEDED, N)))
    assert archived(world.redis_url, Archive.at(archive_url("", tmp_path / "artefacts")), ALL_TRIMMED) == 0
    if behind:
        log_history(world, np.random.default_rng(1).normal(size=(behind, N)), first=GROUPS_NEEDED)
    send(world, "PUT", "/routes/default", ROUTE)
    wait_until(lambda: known(world)["adaptive"] is not None, seconds=60)
    assert known(world)["groups"] == GROUPS_NEEDED + behind


def test_without_its_archive_a_gateway_learns_from_the_stream(gateway, tmp_path):
    world = gateway()
    root = tmp_path / "artefacts" / "ledger" / "_manifest"
    root.mkdir(parents=True, exist_ok=True)
    (root / "root.e1.json").write_text("damaged")
    log_history(world, np.random.default_rng(0).normal(size=(GROUPS_NEEDED, N)))
    send(world, "PUT", "/routes/default", ROUTE)
    wait_until(lambda: known(world)["adaptive"] is not None, seconds=60)


def test_without_redis_what_is_learned_waits(unused_port, tmp_path):
    async def run() -> bool:
        url = f"redis://127.0.0.1:{unused_port}"
        async with open_redis(url) as texts, open_redis(url, in_bytes=True) as in_bytes:
            learned = LearnedStrategies(
                in_bytes, Archive.at(str(tmp_path)), Catalogue(texts, policy(BASE), route()), seconds=0.01
            )
            with pytest.raises(StoreUnavailable):
                await learned.look()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await learned.run()
            return learned.of(route()) == Learned()

    assert asyncio.run(run())


def test_at_a_ceiling_nothing_more_is_drawn(gateway):
    """Right or wrong: a first right answer is the best there is, wrong ones are followed by more."""
    world = gateway()
    rng = np.random.default_rng(1)
    log_history(world, (rng.random((150, N)) < rng.random((150, 1))).astype(float))
    send(world, "PUT", "/routes/default", ROUTE)
    wait_until(lambda: known(world)["adaptive"] is not None, seconds=60)
    world.engine.script.completions = ["1.0", "0.0"]
    assert world.client.post("/generate", HI).json["candidates"]["requested"] == FIRST
    world.engine.script.completions = ["0.0"]
    assert world.client.post("/generate", HI).json["candidates"]["requested"] > FIRST


# --- what can go wrong in a later wave -------------------------------------------------------------------


def test_a_wave_that_the_deadline_cuts_leaves_the_best_of_the_first(adaptive):
    from_the_second_wave(adaptive, lambda: setattr(adaptive.engine.script, "delays", [30.0]))
    started = time.monotonic()
    reply = adaptive.client.post("/generate", {**HI, "timeout_ms": 2000})
    assert time.monotonic() - started < 2.0
    body = reply.json
    assert (reply.status, body["completion"]) == (200, "-1.25")
    assert (body["selection"]["status"], body["selection"]["stop_reason"]) == ("deadline", "no_time")
    assert body["candidates"] == {"requested": 4, "finished": 2, "scored": 2, "failed": {"deadline": 2}}
    assert served(adaptive).stop_reason == "no_time"


def test_a_wave_that_cannot_end_in_time_is_not_begun(adaptive):
    adaptive.engine.script.completions, adaptive.engine.script.delays = ["-1.5", "-1.25"], [0.6]
    body = adaptive.client.post("/generate", {**HI, "timeout_ms": 1000}).json
    assert [request["n"] for request in adaptive.engine.requests] == [FIRST]
    assert (body["selection"]["status"], body["selection"]["stop_reason"]) == ("ok", "no_time")


def test_a_first_wave_without_its_quorum_is_an_error(adaptive):
    adaptive.engine.script.delays = [30.0]
    reply = adaptive.client.post("/generate", {**HI, "timeout_ms": 300})
    assert (reply.status, reply.json["error"]["code"]) == (504, "deadline_exceeded")


def test_a_reward_model_that_fails_in_a_later_wave_leaves_the_best_of_the_first(adaptive):
    from_the_second_wave(adaptive, lambda: setattr(adaptive.reward.script, "fault", "error"))
    body = adaptive.client.post("/generate", HI).json
    assert body["completion"] == "-1.25"
    assert (body["selection"]["status"], body["selection"]["stop_reason"]) == ("partial", "wave_failed")
    assert body["candidates"] == {"requested": 4, "finished": 4, "scored": 2, "failed": {"reward_error": 2}}


def test_an_engine_that_fails_in_a_later_wave_leaves_the_best_of_the_first(adaptive):
    from_the_second_wave(adaptive, lambda: setattr(adaptive.engine.script, "fault", "busy"))
    body = adaptive.client.post("/generate", HI).json
    assert body["completion"] == "-1.25"
    assert (body["selection"]["status"], body["selection"]["stop_reason"]) == ("partial", "wave_failed")
    assert body["candidates"] == {"requested": 4, "finished": 2, "scored": 2, "failed": {"engine_error": 2}}


def test_an_engine_that_fails_in_the_first_wave_is_an_error(adaptive):
    adaptive.engine.script.fault = "busy"
    assert adaptive.client.post("/generate", HI).status == 503


def test_a_client_that_leaves_in_a_later_wave_stops_the_engine(adaptive):
    from_the_second_wave(adaptive, lambda: setattr(adaptive.engine.script, "delays", [60.0]))
    send_and_leave(
        adaptive.client,
        "/generate",
        lambda: len(adaptive.engine.requests) == 2 and adaptive.engine.active == 1,
    )
    left = time.monotonic()
    wait_until(lambda: len(adaptive.engine.aborted_at) == 1)
    assert adaptive.engine.aborted_at[0] - left < 0.5
    assert len(adaptive.records()) == 150


def test_progress_is_streamed_over_waves(adaptive):
    adaptive.engine.script.completions = ["-1.5", "-1.25"]
    asked = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 16}
    reply = adaptive.client.post("/v1/chat/completions", asked)
    events = reply.body.decode().strip().split("\n\n")
    drawn = [request["n"] for request in adaptive.engine.requests]
    assert len(drawn) > 1
    of_stop = [stop for i, n in enumerate(drawn) for stop in [sum(drawn[: i + 1])] * n]
    told = [f": bonsai candidates={finished}/{stop}" for finished, stop in enumerate(of_stop, start=1)]
    assert [event for event in events if event.startswith(": bonsai")] == told
    chunks = chunks_of(reply)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1]) == "-1.25"
    assert chunks[-1]["bonsai"]["selection"]["strategy"] == "adaptive"
    assert chunks[-1]["bonsai"]["candidate_tokens"] == sum(drawn) // 2 * (4 + 5)


@pytest.mark.parametrize("is_stream", [False, True])
def test_log_probs_of_a_winner_from_a_later_wave(adaptive, is_stream):
    """Every token once, with its alternatives."""
    adaptive.engine.script.alternatives = {token_ids("9")[0]: -1.0}
    from_the_second_wave(adaptive, lambda: setattr(adaptive.engine.script, "completions", ["2.0"]))
    asked = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16, "logprobs": True}
    reply = adaptive.client.post("/v1/chat/completions", {**asked, "top_logprobs": 1, "stream": is_stream})
    assert len(adaptive.engine.requests) > 1
    assert {request["logprobs"] for request in adaptive.engine.requests} == {1}
    replies = chunks_of(reply) if is_stream else [reply.json]
    spoken = [choice["logprobs"]["content"] for part in replies for choice in part["choices"] if choice["logprobs"]]
    told = [one for tokens in spoken for one in tokens]
    assert [(one["token"], one["logprob"]) for one in told] == [("2", -0.5), (".", -0.5), ("0", -0.5)]
    assert [[other["token"] for other in one["top_logprobs"]] for one in told] == [["9"]] * 3

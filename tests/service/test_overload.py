"""More requests than there is room for, over HTTP: who is told what, and that nothing is spent on a refusal.

The prompt is "hi" with 2 tokens and at most 10 are drawn: n candidates cost 2 + 10 n, and are 13 tokens long in fact
("a fine answer").
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import openai
import pytest

from bon_algos.contracts import Exposure
from tests.fixtures.gateway import WINDOW, Reply, World, gateway_settings, running_gateway
from tests.fixtures.waiting import wait_until
from tests.stubs.server import running

ASKED = {"prompt": "hi", "max_tokens": 10}
OF_OPENAI = {"model": "default", **ASKED}
CHAT: Any = [{"role": "user", "content": "hi"}]
WorldWith = Callable[..., World]


@pytest.fixture
def world_with(tmp_path, engine, reward, redis_url) -> Iterator[WorldWith]:
    """Opens a gateway with these settings; its engines are the stubs."""
    with ExitStack() as stack:

        def opened(**settings: Any) -> World:
            engine_url, reward_url = (stack.enter_context(running(stub.app())) for stub in (engine, reward))
            told = gateway_settings(tmp_path, engine_url, reward_url, redis_url, **settings)
            client = stack.enter_context(running_gateway(told))
            return World(client, engine, reward, redis_url)

        yield opened


@contextmanager
def sent(world: World, path: str, body: dict[str, object]) -> Iterator[socket.socket]:
    """A request under way; its client goes away at the end of the block."""
    request = world.client.written("POST", path, json.dumps(body).encode())
    with closing(socket.create_connection(world.client.address, timeout=10)) as connection:
        connection.sendall(request)
        yield connection


def limits_told(world: World) -> dict[str, Any]:
    told: dict[str, Any] = world.client.get("/ready").json["limits"]
    return told


def assert_refused(reply: Reply, status: int, code: str) -> None:
    assert (reply.status, reply.json["type"]) == (status, f"urn:bonsai:error:{code}")
    assert int(reply.headers["retry-after"]) >= 1


# --- the whole process is full ---------------------------------------------------------------------------


def test_a_full_gateway_refuses_and_nothing_is_spent(world_with):
    """Not on an engine, not in the ledger, also with an experiment, whose exposure comes first otherwise."""
    world = world_with(max_tokens_in_flight=22, max_tokens_waiting=0)
    arms = [{"policy": "base", "n": 2, "weight": 5000}, {"policy": "base", "n": 16, "weight": 5000}]
    body, content = json.dumps({"arms": arms}).encode(), {"Content-Type": "application/json"}
    wait_until(lambda: world.client.request("PUT", "/experiments/default", body, content).status < 300)
    world.engine.script.fault = "silent"
    with sent(world, "/generate", ASKED):
        wait_until(lambda: world.engine.active == 1)
        for path, asked in (("/generate", ASKED), ("/generate?n=1", ASKED), ("/v1/completions", OF_OPENAI)):
            assert_refused(world.client.post(path, asked), 503, "overloaded")
        assert limits_told(world)["refused"]["overloaded"] == 3
    assert len(world.engine.requests) == 1
    assert world.reward.requests == []
    wait_until(lambda: limits_told(world)["tokens_in_flight"] == 0)
    world.engine.script.fault = "none"
    served = world.client.post("/generate", ASKED).json["id"]
    assert [group.id for group in world.groups()] == [served]
    # Exposed were the one who went away and the one who was served.
    assert len([record for record in world.records() if isinstance(record, Exposure)]) == 2


def test_whoever_waits_is_served_in_turn(world_with):
    world = world_with(max_tokens_in_flight=22)
    world.engine.script.fault = "silent"
    with ThreadPoolExecutor(1) as pool:
        with sent(world, "/generate?n=2", ASKED):
            wait_until(lambda: world.engine.active == 1)
            waiting = pool.submit(world.client.post, "/generate?n=2", ASKED)
            wait_until(lambda: limits_told(world)["tokens_waiting"] == 22)
            assert len(world.engine.requests) == 1
            world.engine.script.fault = "none"
        # The first client has gone away.
        assert waiting.result(timeout=10).status == 200


def test_waiting_for_a_turn_is_not_the_gateways_own_time(world_with):
    """Two that each take the engine 0.4 s, one after the other."""
    world = world_with(max_tokens_in_flight=22)
    world.engine.script.delays = [0.4]
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: world.client.post("/generate?n=2", ASKED), range(2)))
    assert world.engine.most_active == 1
    assert max(float(reply.headers["x-bonsai-overhead-duration-ms"]) for reply in replies) < 400
    assert max(group.total_seconds or 0.0 for group in world.groups(2)) > 0.8


def test_a_stream_waits_with_comments_and_leaving_it_frees_the_place(world_with):
    world = world_with(max_tokens_in_flight=12)
    world.engine.script.fault = "silent"
    streamed = {"model": "default", "messages": CHAT, "stream": True, "best_of": 1, "max_tokens": 10}
    with sent(world, "/generate?n=1", ASKED):
        wait_until(lambda: world.engine.active == 1)
        with sent(world, "/v1/chat/completions", streamed) as stream:
            with stream.makefile("rb") as lines:
                assert lines.readline().startswith(b"HTTP/1.1 200 ")
                while lines.readline() != b": ping\n":
                    pass
            assert limits_told(world)["requests_waiting"] == 1
        wait_until(lambda: limits_told(world)["requests_waiting"] == 0)
    assert len(world.engine.requests) == 1


def test_a_stream_that_is_refused_at_once_has_the_status_of_its_refusal(world_with):
    world = world_with(max_tokens_in_flight=12, max_tokens_waiting=0)
    world.engine.script.fault = "silent"
    with sent(world, "/generate?n=1", ASKED):
        wait_until(lambda: world.engine.active == 1)
        body = {"model": "default", "messages": CHAT, "stream": True}
        assert_refused(world.client.post("/v1/chat/completions", body), 503, "overloaded")


def test_ten_times_more_than_there_is_room_for(world_with):
    """300 requests at once for 5 places of 0.1 s each: the engine never has more than 5, whoever is answered is in the
    ledger, and all others are refused with a time to come back, at no cost."""
    world = world_with(max_tokens_in_flight=5 * 22, max_tokens_waiting=40 * 22)
    world.engine.script.delays = [0.1]
    with ThreadPoolExecutor(60) as pool:
        replies = list(pool.map(lambda _: world.client.post("/generate?n=2", ASKED), range(300)))
    counts = Counter(reply.status for reply in replies)
    assert counts.keys() <= {200, 503}
    # One key may fill half of the queue: 20 wait, 5 run, and at most 60 are there at once.
    assert counts[200] >= 25
    assert counts[503] >= 1
    for reply in replies:
        if reply.status == 503:
            assert_refused(reply, 503, "overloaded")
    assert world.engine.most_active <= 5
    assert len(world.engine.requests) == counts[200] == len(world.groups(counts[200]))
    told = limits_told(world)
    assert told["refused"]["overloaded"] == counts[503]
    assert (told["tokens_in_flight"], told["tokens_waiting"]) == (0, 0)


# --- one key ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), [("/generate", ASKED), ("/v1/completions", OF_OPENAI)])
def test_a_request_above_the_keys_budget_is_429_with_its_cost_before_any_engine(world_with, path, body):
    """G12, G13: the route's 16 candidates, each as long as the window allows; the key has 100."""
    world = world_with(key_tokens_per_minute=100)
    reply = world.client.post(path, {**body, "max_tokens": WINDOW - 2})
    assert_refused(reply, 429, "over_budget")
    assert (reply.json["tokens"], reply.json["limit"]) == (2 + 16 * (WINDOW - 2), 100)
    assert world.engine.requests == world.reward.requests == world.records() == []


def test_the_headers_tell_what_is_left_on_every_kind_of_reply(world_with):
    world = world_with(key_tokens_per_minute=100, key_requests_per_minute=50)
    first = world.client.post("/generate?n=2", ASKED)
    # 2 of the prompt and 13 of each candidate.
    assert first.headers["x-ratelimit-limit-tokens"] == "100"
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == (
        "50",
        "49",
    )
    assert world.client.post("/generate?n=2", ASKED).headers["x-ratelimit-remaining-tokens"] == str(100 - 2 * 28)
    streamed = world.client.post("/v1/completions", {**OF_OPENAI, "max_tokens": 5, "stream": True, "best_of": 1})
    assert (streamed.status, streamed.headers["x-ratelimit-remaining-requests"]) == (200, "47")
    refused = world.client.post("/generate?n=9", ASKED)
    assert_refused(refused, 429, "rate_limited")
    for name in ("limit", "remaining", "reset"):
        assert {f"x-ratelimit-{name}-tokens", f"x-ratelimit-{name}-requests"} <= refused.headers.keys()
    assert "x-ratelimit-limit-tokens" not in world.client.get("/health").headers


def test_without_limits_no_header_tells_of_any(world):
    assert not [name for name in world.client.post("/generate?n=2", ASKED).headers if name.startswith("x-ratelimit")]


def test_openais_client_raises_its_rate_limit_error(world_with):
    world = world_with(key_requests_per_minute=1)
    host, port = world.client.address
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=world.client.key, max_retries=0) as client:
        client.chat.completions.create(model="default", messages=CHAT)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="default", messages=CHAT)
    assert refused.value.code == refused.value.type == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 61
    assert len(world.engine.requests) == 1


def test_a_replay_costs_nothing(world_with):
    world = world_with(key_requests_per_minute=1)
    key = {"Idempotency-Key": "one"}
    first = world.client.post("/generate?n=2", ASKED, key)
    again = world.client.post("/generate?n=2", ASKED, key)
    assert (first.status, again.status, again.headers["idempotent-replayed"]) == (200, 200, "true")
    assert_refused(world.client.post("/generate?n=2", ASKED), 429, "rate_limited")


def test_no_key_gets_more_than_its_limit_under_load(world_with):
    """S7. The most counts until a request has ended, so however many come at once, what is drawn stays below."""
    world = world_with(key_tokens_per_minute=500)
    world.engine.script.delays = [0.02]
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: world.client.post("/generate?n=2", {**ASKED, "max_tokens": 20}), range(100)))
    served = [reply.json["usage"]["total_tokens"] for reply in replies if reply.status == 200]
    assert {reply.status for reply in replies} == {200, 429}
    # One more of 2 + 2 × 20 must not have fitted.
    assert 500 - 42 < sum(served) <= 500
    assert len(world.engine.requests) == len(served)


def test_another_key_buys_a_tenant_no_more(world_with):
    """S7. Its admin may make as many as it likes."""
    world = world_with(tenant_requests_per_minute=1)
    made = world.client.post("/keys", {"name": "another", "role": "inference"})
    assert world.client.post("/generate?n=2", ASKED).headers["x-ratelimit-remaining-requests"] == "0"
    another = world.client.with_key(made.json["key"])
    assert_refused(another.post("/generate?n=2", ASKED), 429, "rate_limited")

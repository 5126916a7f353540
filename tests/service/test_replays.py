"""A completion under an `Idempotency-Key`: drawn once, answered as often as it is asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fixtures.gateway import gateway_settings, running_gateway, wait_until
from tests.stubs.server import running

GENERATE = ("/generate?n=2", {"prompt": "hi"})
CHAT = ("/v1/chat/completions", {"model": "default", "messages": [{"role": "user", "content": "hi"}], "best_of": 2})


def ask(world, path, body, key="once", **headers):
    return world.client.post(path, body, {"Idempotency-Key": key, **headers})


@pytest.mark.parametrize(("path", "body"), [GENERATE, CHAT])
def test_the_same_request_is_drawn_once(world, path, body):
    first, second = ask(world, path, body), ask(world, path, body)
    assert (first.status, second.status) == (200, 200)
    assert first.json == second.json
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    told = ("x-bonsai-arm", "x-bonsai-candidates", "x-bonsai-selection", "x-bonsai-overhead-duration-ms")
    assert [first.headers[name] for name in told] == [second.headers[name] for name in told]
    assert len(world.engine.requests) == 1
    assert ask(world, path, body, "another").json["id"] != first.json["id"]


@pytest.mark.parametrize(
    ("path", "body"), [(GENERATE[0], {"prompt": "ho"}), ("/generate?n=3", GENERATE[1]), CHAT], ids=["body", "n", "path"]
)
def test_the_same_key_for_another_request_is_refused(world, path, body):
    ask(world, *GENERATE)
    refused = ask(world, path, body)
    assert (refused.status, refused.json["error"]["code"]) == (422, "idempotency_conflict")
    assert len(world.engine.requests) == 1


@pytest.mark.parametrize("header", [{"x-bonsai-arm": "base:1"}, {"x-bonsai-unit": "u"}, {"x-bonsai-timeout": "9000"}])
@pytest.mark.parametrize(("path", "body"), [GENERATE, CHAT], ids=["generate", "chat"])
def test_a_header_that_decides_about_the_answer_makes_another_request(world, path, body, header):
    first = ask(world, path, body, **header)
    assert ask(world, path, body, **header).json == first.json
    refused = ask(world, path, body)
    assert (refused.status, refused.json["error"]["code"]) == (422, "idempotency_conflict")
    assert len(world.engine.requests) == 1


def test_while_the_first_is_under_way_the_second_is_told_so(world):
    world.engine.script.delays = [1.0]
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(ask, world, *GENERATE)
        wait_until(lambda: world.engine.active == 1)
        second = ask(world, *GENERATE)
        assert (second.status, second.json["error"]["code"]) == (409, "idempotency_in_flight")
        assert first.result().status == 200
    assert ask(world, *GENERATE).json == first.result().json
    assert len(world.engine.requests) == 1


def test_after_an_error_the_key_is_free(world):
    world.engine.script.fault = "busy"
    assert ask(world, *GENERATE).status == 503
    world.engine.script.fault = "none"
    assert ask(world, *GENERATE).status == 200


def test_what_is_refused_before_it_is_drawn_takes_no_key(world):
    assert ask(world, "/generate?n=2", {"prompt": ""}).status == 422
    assert ask(world, *GENERATE).status == 200


def test_a_reply_that_must_not_be_kept_is_not_promised(world):
    for path, body in (GENERATE, CHAT):
        refused = ask(world, path, {**body, "store": False})
        assert (refused.status, refused.json["error"]["param"]) == (422, "Idempotency-Key")
    refused = ask(world, CHAT[0], {**CHAT[1], "stream": True})
    assert (refused.status, refused.json["error"]["param"]) == (422, "Idempotency-Key")
    assert world.engine.requests == []


def test_without_redis_nothing_is_promised_and_the_rest_is_served(tmp_path: Path, engine, reward, own_redis):
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(tmp_path, engine_url, reward_url, own_redis.url)
        with running_gateway(settings) as client:
            own_redis.kill()
            path, body = GENERATE
            refused = client.post(path, body, {"Idempotency-Key": "once"})
            assert (refused.status, refused.json["error"]["code"]) == (503, "store_unavailable")
            assert client.post(path, body).status == 200
            assert len(engine.requests) == 1

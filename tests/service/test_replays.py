"""A completion under an `Idempotency-Key`: drawn once, answered as often as it is asked for."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from tests.fixtures.gateway import gateway_settings, running_gateway
from tests.fixtures.waiting import wait_until
from tests.stubs.server import running

GENERATE = ("/generate?n=2", {"prompt": "hi"})
HI = [{"role": "user", "content": "hi"}]
CHAT = ("/v1/chat/completions", {"model": "default", "messages": HI, "best_of": 2})
STREAMED = (CHAT[0], {**CHAT[1], "stream": True})


ONCE = {"Idempotency-Key": "once"}


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
    ("first", "second"),
    [
        (GENERATE, (GENERATE[0], {"prompt": "ho"})),
        (GENERATE, ("/generate?n=3", GENERATE[1])),
        (GENERATE, CHAT),
        (CHAT, STREAMED),
        (STREAMED, CHAT),
    ],
    ids=["body", "n", "path", "streamed", "not streamed"],
)
def test_the_same_key_for_another_request_is_refused(world, first, second):
    ask(world, *first)
    refused = ask(world, *second)
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


@pytest.mark.parametrize(("path", "body"), [GENERATE, STREAMED], ids=["whole", "streamed"])
def test_while_the_first_is_under_way_the_second_is_told_so(world, path, body):
    world.engine.script.delays = [1.0]
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(ask, world, path, body)
        wait_until(lambda: world.engine.active == 1)
        second = ask(world, path, body)
        assert (second.status, second.json["error"]["code"]) == (409, "idempotency_in_flight")
        assert first.result().status == 200
    assert ask(world, path, body).headers["idempotent-replayed"] == "true"
    assert len(world.engine.requests) == 1


@pytest.mark.parametrize("asked", [GENERATE, STREAMED], ids=["whole", "streamed"])
def test_after_an_error_the_key_is_free(world, asked):
    world.engine.script.fault = "busy"
    assert ask(world, *asked).status == 503
    world.engine.script.fault = "none"
    assert ask(world, *asked).status == 200


def test_what_is_refused_before_it_is_drawn_takes_no_key(world):
    assert ask(world, "/generate?n=2", {"prompt": ""}).status == 422
    assert ask(world, *GENERATE).status == 200


def test_a_reply_that_must_not_be_kept_is_not_promised(world):
    for path, body in (GENERATE, CHAT, STREAMED):
        refused = ask(world, path, {**body, "store": False})
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


# --- streams ---------------------------------------------------------------------------------------------


ONE = (CHAT[0], {**CHAT[1], "stream": True, "best_of": 1})
"""Said as the engine says it."""


@pytest.fixture
def client(world) -> Iterator[openai.OpenAI]:
    host, port = world.client.address
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=world.client.key, max_retries=0) as opened:
        yield opened


class Heard(NamedTuple):
    """What OpenAI's client makes of a stream."""

    ids: set[str]
    text: str
    ends: list[str]
    logprobs: list[float]
    last: Any


def chat(client: Any, **more: Any) -> tuple[Mapping[str, str], Heard]:
    """The headers, and what is said under the one key."""
    raw = client.chat.completions.with_raw_response.create(
        model="default", messages=HI, logprobs=True, stream=True, extra_headers=ONCE, **more
    )
    chunks = list(raw.parse())
    parts = [choice for chunk in chunks for choice in chunk.choices]
    assert [part.delta.role for part in parts] == ["assistant", *[None] * (len(parts) - 1)]
    return raw.headers, Heard(
        {chunk.id for chunk in chunks},
        "".join(part.delta.content or "" for part in parts),
        [part.finish_reason for part in parts if part.finish_reason],
        [token.logprob for part in parts if part.logprobs for token in part.logprobs.content],
        chunks[-1].to_dict(),
    )


def complete(client: Any, **more: Any) -> tuple[Mapping[str, str], Heard]:
    raw = client.completions.with_raw_response.create(
        model="default", prompt="hi", logprobs=0, stream=True, extra_headers=ONCE, **more
    )
    chunks = list(raw.parse())
    parts = [choice for chunk in chunks for choice in chunk.choices]
    return raw.headers, Heard(
        {chunk.id for chunk in chunks},
        "".join(part.text for part in parts),
        [part.finish_reason for part in parts if part.finish_reason],
        [logprob for part in parts if part.logprobs for logprob in part.logprobs.token_logprobs],
        chunks[-1].to_dict(),
    )


@pytest.mark.parametrize("best_of", [1, 3])
@pytest.mark.parametrize("stream", [chat, complete])
def test_a_stream_is_drawn_once_and_says_the_same_again(world, client, stream, best_of):
    world.engine.script.completions = ["the longest of them", "short", "middling"]
    options = {"stream_options": {"include_usage": True}, "extra_body": {"best_of": best_of}}
    (first, told), (second, again) = stream(client, **options), stream(client, **options)
    assert told == again
    # One token per byte, each of log-prob -0.5; the longest has the highest reward.
    assert told[1:4] == ("the longest of them", ["stop"], [-0.5] * 19)
    assert told.ids == {told.last["id"]}
    assert (told.last["usage"]["completion_tokens"], told.last["bonsai"]["log_id"]) == (19, told.last["id"])
    assert ("idempotent-replayed" in first, second["idempotent-replayed"]) == (False, "true")
    for name in ("content-type", "x-bonsai-arm", "x-bonsai-policy", "x-accel-buffering"):
        assert second[name] == first[name]
    assert len(world.engine.requests) == 1


def test_every_choice_of_a_stream_is_told_again(world, client):
    world.engine.script.completions = ["the longest of them", "short", "middling"]
    world.engine.script.finish_reasons = ["stop", "length", "stop"]

    def told() -> tuple[dict[int, str], list[tuple[int, str]], Any]:
        *chunks, last = client.chat.completions.create(
            model="default",
            messages=HI,
            n=3,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers=ONCE,
            extra_body={"best_of": 3},
        )
        texts: dict[int, str] = {}
        for [choice] in (chunk.choices for chunk in chunks):
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        ends = [(one.index, one.finish_reason) for chunk in chunks for one in chunk.choices if one.finish_reason]
        return texts, ends, last.to_dict()

    first = told()
    assert told() == first
    assert first[0] == {0: "the longest of them", 1: "middling", 2: "short"}
    assert first[1] == [(0, "stop"), (1, "stop"), (2, "length")]
    assert len(world.engine.requests) == 1


def test_usage_that_was_not_asked_for_is_not_told_again_either(world, client):
    assert [chat(client)[1].last.get("usage") for _ in range(2)] == [None, None]


@pytest.mark.parametrize("seen", [b": ping", b'"content": "h"'], ids=["before a word", "after a word"])
def test_a_stream_whose_client_goes_away_is_drawn_anew(world, seen):
    world.engine.script.completions = ["hello"]
    world.engine.script.fault = "stalls" if seen != b": ping" else "silent"
    content = json.dumps(ONE[1]).encode()
    lines = (f"Content-Length: {len(content)}", "Idempotency-Key: once")
    with socket.create_connection(world.client.address, timeout=10) as connection:
        connection.sendall(world.client.written("POST", ONE[0], content, *lines))
        received = b""
        while seen not in received:
            received += connection.recv(65_536)
        assert ask(world, *ONE).status == 409
    wait_until(lambda: world.engine.active == 0)
    world.engine.script.fault = "none"
    wait_until(lambda: ask(world, *ONE).status == 200)
    assert len(world.engine.requests) == 2


def test_a_stream_that_fails_in_its_middle_is_drawn_anew(world, client):
    world.engine.script.fault = "no_end"
    with pytest.raises(openai.APIError, match="ends in the middle"):
        chat(client, extra_body={"best_of": 1})
    world.engine.script.fault = "none"
    headers, told = chat(client, extra_body={"best_of": 1})
    assert (told.text, "idempotent-replayed" in headers) == ("a fine answer", False)
    assert len(world.engine.requests) == 2

"""W3C trace context: read as the recommendation says, and told to whoever is asked on the request's behalf."""

from __future__ import annotations

import http.client
import json
import logging

import pytest

from service.tracing import MAX_STATE_BYTES, NONE, Trace, trace_of
from tests.fixtures.waiting import wait_until

# The example of the recommendation, 3.2.3.
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
FIELDS = f"{TRACE_ID}-00f067aa0ba902b7-01"
PARENT = f"00-{FIELDS}"


def headers(*parents: str, states: tuple[str, ...] = ()) -> list[tuple[bytes, bytes]]:
    found = [(b"host", b"x"), *((b"traceparent", parent.encode()) for parent in parents)]
    return [*found, *((b"tracestate", state.encode()) for state in states)]


@pytest.mark.parametrize("said", [PARENT, f"cc-{FIELDS}", f"cc-{FIELDS}-what-comes-later"])
def test_a_later_version_is_read_and_told_as_the_known_one(said):
    assert trace_of(headers(said)) == Trace(TRACE_ID, f"traceparent: {PARENT}\r\n")


@pytest.mark.parametrize(
    "said",
    [
        "",
        TRACE_ID,
        PARENT.upper(),
        PARENT[:-1],
        f"{PARENT}0",
        f"{PARENT}-more",
        f"ff-{FIELDS}",
        f"cc-{FIELDS}0",
        PARENT.replace(TRACE_ID, "0" * 32),
        PARENT.replace("00f067aa0ba902b7", "0" * 16),
        PARENT.replace("4b", "\u00fc"),
        f"{PARENT}\n",
    ],
)
def test_a_malformed_parent_is_none_and_its_state_goes_with_it(said):
    assert trace_of(headers(said, states=("a=1",))) == NONE


def test_two_parents_are_none():
    assert trace_of(headers(PARENT, PARENT)) == NONE


@pytest.mark.parametrize(
    ("states", "told"),
    [
        (("a=1",), "tracestate: a=1\r\n"),
        (("a=1", "b=2"), "tracestate: a=1,b=2\r\n"),
        (("a=" + "1" * (MAX_STATE_BYTES - 2),), "tracestate: a=" + "1" * (MAX_STATE_BYTES - 2) + "\r\n"),
        (("a=" + "1" * (MAX_STATE_BYTES - 1),), ""),
        (("a=\u00fc",), ""),
        (("a=1\r\nX: y",), ""),
        (("",), ""),
    ],
    ids=["one", "two lines", "the longest", "too long", "not ASCII", "a line end", "empty"],
)
def test_a_state_that_cannot_be_told_is_left_out(states, told):
    assert trace_of(headers(PARENT, states=states)).lines == f"traceparent: {PARENT}\r\n{told}"


def parents(stub) -> list[str | None]:
    """What came with each request to a stub."""
    return [head.get("traceparent") for head in stub.heads]


def test_engine_and_reward_model_are_told_whose_work_it_is(world):
    """Of n, of a stream, and of one sample, which is measured after its reply."""
    asked = {"traceparent": PARENT, "tracestate": "a=1"}
    assert world.client.post("/generate?n=2", {"prompt": "hi"}, asked).status == 200
    streamed = {"model": "default", "prompt": "hi", "best_of": 2, "stream": True}
    assert world.client.post("/v1/completions", streamed, asked).status == 200
    assert world.client.post("/generate?n=1", {"prompt": "hi"}, asked).status == 200
    wait_until(lambda: len(world.reward.heads) == 3)
    for stub in (world.engine, world.reward):
        assert parents(stub) == [PARENT] * 3
        assert [head["tracestate"] for head in stub.heads] == ["a=1"] * 3


def test_a_trace_ends_with_its_request(world):
    """On the connection of the caller, and on those to the engines."""
    connection = http.client.HTTPConnection(*world.client.address)
    own = {"Content-Type": "application/json", "Authorization": f"Bearer {world.client.key}"}
    for more in ({"traceparent": PARENT}, {}, {"traceparent": "garbage"}):
        connection.request("POST", "/generate?n=2", json.dumps({"prompt": "hi"}), {**own, **more})
        response = connection.getresponse()
        response.read()
        assert response.status == 200
    connection.close()
    assert parents(world.engine) == parents(world.reward) == [PARENT, None, None]


def test_a_refusal_is_logged_with_its_trace(world, caplog):
    caplog.set_level(logging.INFO, logger="bonsai.requests")
    refused = {"X-Request-Id": "mine"}
    assert world.client.post("/generate", {"prompt": ""}, {**refused, "traceparent": PARENT}).status == 422
    assert world.client.post("/generate", {"prompt": ""}, refused).status == 422
    said = [record.getMessage() for record in caplog.records if record.name == "bonsai.requests"]
    assert said == [f"mine trace={TRACE_ID} 422 invalid_field prompt", "mine 422 invalid_field prompt"]

"""Bad input to `POST /generate` (reliability.md 8.0 and 8.1): each is refused with the right status and field, in the
one error body, nothing of it is repeated, and no engine hears of it.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.gateway import WINDOW, World, gateway_settings, running_gateway
from tests.fixtures.redis import RedisServer
from tests.service.records import BASE, REWARD_MODEL
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running

SECRET = "hunter2-do-not-repeat"
MAX_BODY = 4 * 2**20


@pytest.fixture(scope="module")
def still_world(shared_redis: RedisServer) -> Iterator[World]:
    """One gateway for the whole module: nothing here may change it, or reach its engines."""
    engine, reward = StubEngine(BASE), StubReward(REWARD_MODEL)
    with (
        tempfile.TemporaryDirectory() as directory,
        running(engine.app()) as engine_url,
        running(reward.app()) as reward_url,
        running_gateway(gateway_settings(Path(directory), engine_url, reward_url, shared_redis.url)) as client,
    ):
        yield World(client, engine, reward, shared_redis.url)


@pytest.fixture(autouse=True)
def no_engine_hears_of_it(still_world: World) -> Iterator[None]:
    yield
    assert still_world.engine.requests == []
    assert still_world.reward.requests == []


def assert_refused(reply, status: int, param: str | None = None) -> None:
    assert reply.status == status
    assert reply.headers["content-type"] == "application/problem+json"
    assert len(reply.body) <= 4096
    assert SECRET.encode() not in reply.body
    body = reply.json
    assert body["status"] == status
    assert body["error"]["message"] == body["detail"]
    assert reply.headers["x-request-id"] in body["instance"]
    if param is not None:
        assert body["error"]["param"] == param


def prompt(**fields: object) -> bytes:
    return json.dumps({"prompt": "hi", **fields}).encode()


def raw(members: str) -> bytes:
    """A body whose further members are written as they stand."""
    return b'{"prompt":"hi",' + members.encode() + b"}"


UNPARSEABLE = {
    "C44 empty": b"",
    "C49 open brace": b"{",
    "C50 one brace too many": b'{"prompt":"hi"}}',
    "C51 two documents": b'{"prompt":"hi"}{"prompt":"hi"}',
    "C52 trailing comma": b'{"prompt":"hi",}',
    "C53 comment": b'{"prompt":"hi"/*x*/}',
    "C54 single quotes": b"{'prompt':'hi'}",
    "C55 NaN": raw('"temperature":NaN'),
    "C55 Infinity": raw('"temperature":Infinity'),
    "C55 -Infinity": raw('"n":-Infinity'),
    "C57 5,000 digits": raw('"n":' + "9" * 5000),
    "C58 100,000 arrays": b"[" * 100_000,
    "C58 100,000 objects": b'{"a":' * 100_000,
    "C60 duplicate names": raw('"n":1,"n":2'),
    "C60 duplicate names inside": raw('"metadata":{"a":"b","a":"c"}'),
    "C63 UTF-16": '{"prompt":"hi"}'.encode("utf-16"),
    "C63 UTF-16 without mark": '{"prompt":"hi"}'.encode("utf-16-le"),
    "C63 UTF-7": b"+AHsAIg-prompt+ACIAOgAi-hi+ACIAfQ-",
    "C63 BOM": b"\xef\xbb\xbf" + prompt(),
    "C63 invalid UTF-8": b'{"prompt":"\xff\xfe"}',
    "C63 overlong UTF-8": b'{"prompt":"\xc0\xaf"}',
    "C63 surrogate in UTF-8": b'{"prompt":"\xed\xa0\x80"}',
    "raw NUL in a string": b'{"prompt":"a\x00b"}',
    "raw newline in a string": b'{"prompt":"a\nb"}',
    "G61 nested 1,000 deep": raw('"metadata":' + '{"a":' * 1000 + "1" + "}" * 1000),
}


@pytest.mark.parametrize("body", UNPARSEABLE.values(), ids=UNPARSEABLE.keys())
def test_what_is_not_json_for_everybody_is_400(still_world, body):
    assert_refused(still_world.client.post("/generate", body), 400)


WRONG = {
    # the document
    "C45 null": (b"null", "body"),
    "C46 array": (b"[]", "body"),
    "C47 string": (b'"x"', "body"),
    "C48 number": (b"1", "body"),
    "C59 100,000 keys": (b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}", "body"),
    "C61 __proto__": (raw('"__proto__":{}'), "__proto__"),
    "C61 constructor": (raw('"constructor":{}'), "constructor"),
    "C62 unknown": (prompt(temprature=1), "temprature"),
    "unknown, its name not repeated": (raw(f'"{SECRET} {SECRET}":1'), "(unprintable name)"),
    "C64 lone surrogate": (b'{"prompt":"a\\ud800b"}', "prompt"),
    "C64 lone surrogate in a message": (b'{"messages":[{"role":"user","content":"\\udc00"}]}', "messages[0].content"),
    "C64 lone surrogate in a name": (raw('"metadata":{"\\ud800":"a"}'), "metadata.(unprintable name)"),
    "C65 NUL": (b'{"prompt":"a\\u0000b"}', "prompt"),
    "C68 id": (prompt(id="resp_1"), "id"),
    "C68 tenant": (prompt(tenant="other"), "tenant"),
    "C68 created_at": (prompt(created_at=0), "created_at"),
    "C68 score": (prompt(score=1), "score"),
    # n
    "G1 0": (prompt(n=0), "n"),
    "G2 -1": (prompt(n=-1), "n"),
    "G3 above the cap": (prompt(n=65), "n"),
    "G4 16385": (prompt(n=16_385), "n"),
    "1e9 as an integer": (prompt(n=10**9), "n"),
    "1e9": (raw('"n":1e9'), "n"),
    "G5 2^31": (prompt(n=2**31), "n"),
    "G6 2^63": (prompt(n=2**63), "n"),
    "10^23": (prompt(n=10**23), "n"),
    "G7 1.5": (prompt(n=1.5), "n"),
    "G8 empty string": (prompt(n=""), "n"),
    "n as a word": (prompt(n="x"), "n"),
    "G9 null": (prompt(n=None), "n"),
    "C67 true": (prompt(n=True), "n"),
    'C67 "64"': (prompt(n="64"), "n"),
    "C67 64.0": (raw('"n":64.0'), "n"),
    "C67 1e1": (raw('"n":1e1'), "n"),
    "C56 1e400": (raw('"n":1e400'), "n"),
    # tokens
    "G13 n=64 at model length": (prompt(n=64, max_tokens=WINDOW), "max_tokens"),
    "G14 max_tokens 0": (prompt(max_tokens=0), "max_tokens"),
    "G14 max_tokens -1": (prompt(max_tokens=-1), "max_tokens"),
    "G14 max_tokens 1e9": (prompt(max_tokens=10**9), "max_tokens"),
    "max_tokens one above the room": (prompt(max_tokens=WINDOW - 1), "max_tokens"),
    "G15 prompt longer than the window": (prompt(prompt="x" * (WINDOW + 1)), "prompt"),
    "G16 prompt exactly the window": (prompt(prompt="x" * WINDOW), "prompt"),
    "messages longer than the window": (
        json.dumps({"messages": [{"role": "user", "content": "x" * WINDOW}]}).encode(),
        "messages",
    ),
    "G18 min_tokens": (prompt(min_tokens=9, max_tokens=8), "min_tokens"),
    "G19 min_tokens 1e9": (prompt(min_tokens=10**9), "min_tokens"),
    # sampling
    "G20 temperature -0.1": (prompt(temperature=-0.1), "temperature"),
    "G20 temperature 2.1": (prompt(temperature=2.1), "temperature"),
    "G20 temperature -0.0": (prompt(temperature=-0.0), "temperature"),
    "G20 temperature 1e-320": (prompt(temperature=1e-320), "temperature"),
    "temperature 1e400": (raw('"temperature":1e400'), "temperature"),
    "temperature as a word": (prompt(temperature="hot"), "temperature"),
    "temperature true": (prompt(temperature=True), "temperature"),
    "G22 top_p 0": (prompt(top_p=0), "top_p"),
    "G22 top_p 1.1": (prompt(top_p=1.1), "top_p"),
    "G23 top_k -2": (prompt(top_k=-2), "top_k"),
    "G23 top_k 1e9": (prompt(top_k=10**9), "top_k"),
    "G24 min_p 2": (prompt(min_p=2), "min_p"),
    "G25 seed 2^64": (prompt(seed=2**64), "seed"),
    "G25 seed -1": (prompt(seed=-1), "seed"),
    "G25 seed a": (prompt(seed="a"), "seed"),
    "G27 presence 3": (prompt(presence_penalty=3), "presence_penalty"),
    "G27 frequency -3": (prompt(frequency_penalty=-3), "frequency_penalty"),
    "repetition 0": (prompt(repetition_penalty=0), "repetition_penalty"),
    "G28 logit_bias": (prompt(logit_bias={"1": 1000}), "logit_bias"),
    "G29 100 stops": (prompt(stop=["a"] * 100), "stop"),
    "G29 empty stop": (prompt(stop=""), "stop[0]"),
    "G29 empty stop in a list": (prompt(stop=[""]), "stop[0]"),
    "G29 1 MB stop": (prompt(stop="a" * 2**20), "stop[0]"),
    "G29 nested stop": (prompt(stop=[["a"]]), "stop[0]"),
    "G29 number as stop": (prompt(stop=7), "stop"),
    "G30 stop_token_ids": (prompt(stop_token_ids=[-1]), "stop_token_ids"),
    "G31 logprobs": (prompt(logprobs=10**6), "logprobs"),
    # prompt
    "G32 neither": (b"{}", "prompt"),
    "G32 null": (prompt(prompt=None), "prompt"),
    "G33 empty": (prompt(prompt=""), "prompt"),
    "G34 blanks": (prompt(prompt=" \t\r\n\u00a0\u2003"), "prompt"),
    "G35 list": (prompt(prompt=["a", "b"]), "prompt"),
    "a list of 4 MB where a text is due": (b'{"prompt":[' + b"7," * 2_000_000 + b"7]}", "prompt"),
    "G36 number": (prompt(prompt=7), "prompt"),
    "G37 object": (prompt(prompt={"text": "hi"}), "prompt"),
    "G38 1,000,000 spaces": (prompt(prompt=" " * 1_000_000), "prompt"),
    "1,000,000 characters": (prompt(prompt="a" * 1_000_000), "prompt"),
    "G39 300,000 joined emoji": ('{"prompt":"' + "👩\u200d🚀" * 300_000 + '"}', "prompt"),
    "G40 10,000 combining marks": (prompt(prompt="e" + "\u0301" * 10_000), "prompt"),
    "G44 prompt_embeds": (prompt(prompt_embeds="AAAA"), "prompt_embeds"),
    "G45 token ids": (prompt(prompt=[1, -1, 2**40]), "prompt"),
    "G46 both": (prompt(messages=[{"role": "user", "content": "hi"}]), "prompt"),
    "no messages": (b'{"messages":[]}', "messages"),
    "messages as a string": (b'{"messages":"hi"}', "messages"),
    "a message that is a string": (b'{"messages":["hi"]}', "messages[0]"),
    "a blank message": (b'{"messages":[{"role":"user","content":" "}]}', "messages[0].content"),
    "a message without content": (b'{"messages":[{"role":"user"}]}', "messages[0].content"),
    "an unknown role": (b'{"messages":[{"role":"root","content":"hi"}]}', "messages[0].role"),
    "an unknown member of a message": (
        b'{"messages":[{"role":"user","content":"hi","name":"x"}]}',
        "messages[0].name",
    ),
    "G47 image_url": (
        b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"file:///etc/passwd"}}]}]}',
        "messages[0].content",
    ),
    # routing
    "G50 model": (prompt(model="../../etc"), "model"),
    "G52 model": (prompt(model="hf-user/repo"), "model"),
    "unit of 10 KiB": (prompt(unit="u" * 10_240), "unit"),
    "empty unit": (prompt(unit=""), "unit"),
    "G56 unit with NUL": (raw('"unit":"a\\u0000"'), "unit"),
    "user as a number": (prompt(user=7), "user"),
    "G57 experiment": (prompt(experiment="exp_1"), "experiment"),
    # behaviour
    "G58 timeout 0": (prompt(timeout_ms=0), "timeout_ms"),
    "G58 timeout -1": (prompt(timeout_ms=-1), "timeout_ms"),
    "G58 timeout 1e12": (prompt(timeout_ms=10**12), "timeout_ms"),
    "timeout above the route's": (prompt(timeout_ms=60_001), "timeout_ms"),
    "G59 quorum 0": (prompt(quorum=0), "quorum"),
    "G59 quorum above n": (prompt(n=4, quorum=5), "quorum"),
    "G60 accept_unscored": (prompt(accept_unscored="yes"), "accept_unscored"),
    "G61 metadata of 1 MB": (prompt(metadata={"a": "b" * 2**20}), "metadata.a"),
    "G61 metadata with 17 keys": (prompt(metadata={f"k{i}": "v" for i in range(17)}), "metadata"),
    "G61 metadata nested": (prompt(metadata={"a": {"b": "c"}}), "metadata.a"),
    "metadata as a list": (prompt(metadata=["a"]), "metadata"),
    'G62 stream "true"': (prompt(stream="true"), "stream"),
    "store as a word": (prompt(store="no"), "store"),
    "wait_for_reward as 1": (prompt(wait_for_reward=1), "wait_for_reward"),
    "return_candidates null": (prompt(return_candidates=None), "return_candidates"),
    "G63 reward URL": (prompt(reward="http://169.254.169.254/"), "reward"),
    "G64 strategy": (prompt(strategy="oracle"), "strategy"),
    "priority": (prompt(priority=-1), "priority"),
    "cache_salt": (prompt(cache_salt="x"), "cache_salt"),
    "chat_template": (prompt(chat_template="{{ 1 }}"), "chat_template"),
    "a value is never repeated": (prompt(temperature=SECRET), "temperature"),
}


@pytest.mark.parametrize(("body", "param"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_field_is_422_and_named(still_world, body, param):
    reply = still_world.client.post("/generate", body.encode() if isinstance(body, str) else body)
    assert_refused(reply, 422, param)
    assert reply.json["error"]["param"]


def test_the_message_names_the_field_the_limit_and_the_kind(still_world):
    def message(**fields: object) -> str:
        return str(still_world.client.post("/generate", prompt(**fields)).json["error"]["message"])

    assert message(n=0) == "n must be at least 1 and at most 64; got an integer below it"
    assert message(n="x") == "n must be an integer; got a string of 1 characters"
    assert message(temperature=2.5) == "temperature must be at most 2; got a number above it"
    assert message(prompt="") == "prompt must not be empty or blank; got a string of 0 characters"
    assert message(prompt=None, messages=None) == "messages must not be null: leave it out"
    assert message(max_tokens=255) == (
        "max_tokens must be at most 254 behind a prompt of 2 tokens in a window of 256; got an integer above it"
    )


QUERIES = {
    "G10 n differs": ("?n=16", prompt(n=8), "n"),
    "G11 n twice": ("?n=16&n=1", prompt(), "n"),
    "n twice, equal": ("?n=16&n=16", prompt(), "n"),
    "0": ("?n=0", prompt(), "n"),
    "-1": ("?n=-1", prompt(), "n"),
    "+1": ("?n=%2B1", prompt(), "n"),
    "a leading zero": ("?n=016", prompt(), "n"),
    "1.5": ("?n=1.5", prompt(), "n"),
    "1e9": ("?n=1e9", prompt(), "n"),
    "x": ("?n=x", prompt(), "n"),
    "empty": ("?n=", prompt(), "n"),
    "a blank": ("?n=%2016", prompt(), "n"),
    "above the cap": ("?n=65", prompt(), "n"),
    "5,000 digits": ("?n=" + "9" * 5000, prompt(), "n"),
    "Arabic digits": ("?n=%D9%A1%D9%A6", prompt(), "n"),
    "unknown": ("?temperature=1", prompt(), "temperature"),
    "unknown, its name not repeated": (f"?{SECRET}%20{SECRET}=1", prompt(), "(unprintable name)"),
}


@pytest.mark.parametrize(("query", "body", "param"), QUERIES.values(), ids=QUERIES.keys())
def test_the_query_is_read_strictly(still_world, query, body, param):
    assert_refused(still_world.client.post(f"/generate{query}", body), 422, param)


HEADERS = {
    "C30 none": ({"Content-Type": ""}, 415),
    "C30 text": ({"Content-Type": "text/plain"}, 415),
    "C30 form": ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
    "C30 utf-16": ({"Content-Type": "application/json; charset=utf-16"}, 415),
    "C31 gzip": ({"Content-Encoding": "gzip"}, 415),
    "C20 200 headers": ({f"x-h{i}": "1" for i in range(200)}, 431),
    "G56 unit of 10 KiB": ({"x-bonsai-unit": "u" * 10_240}, 422),
    "G56 empty unit": ({"x-bonsai-unit": ""}, 422),
    "G56 unit that is not ASCII": ({"x-bonsai-unit": "\u00fc"}, 422),
    "arm without n": ({"x-bonsai-arm": "base"}, 422),
    "arm with n 0": ({"x-bonsai-arm": "base:0"}, 422),
    "arm above the cap": ({"x-bonsai-arm": "base:65"}, 422),
    "arm of an unknown policy": ({"x-bonsai-arm": "pol-ffffffffffffffff:1"}, 422),
    "arm live without a live policy": ({"x-bonsai-arm": "live:1"}, 422),
    "C38 idempotency key of 300": ({"Idempotency-Key": "k" * 300}, 400),
    "arm as a path": ({"x-bonsai-arm": "../../etc/passwd:1"}, 422),
}


@pytest.mark.parametrize(("headers", "status"), HEADERS.values(), ids=HEADERS.keys())
def test_headers_are_read_strictly(still_world, headers, status):
    assert_refused(still_world.client.post("/generate", prompt(), headers), status)


@pytest.mark.parametrize("name", ["unknown", "../../etc", "default\u200b", "DEFAULT"])
def test_an_unknown_route_is_404(still_world, name):
    reply = still_world.client.post("/generate", prompt(route=name))
    assert_refused(reply, 404, "route")
    assert reply.json["error"]["code"] == "route_not_found"


def test_C66_a_body_over_the_limit_is_413_before_it_is_read(still_world):
    """The length alone is enough: the body never comes."""
    with socket.create_connection(still_world.client.address, timeout=10) as connection:
        connection.sendall(still_world.client.written("POST", "/generate", b"", f"Content-Length: {MAX_BODY + 1}"))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_C66_a_chunked_body_over_the_limit_is_413(still_world):
    with socket.create_connection(still_world.client.address, timeout=10) as connection:
        connection.sendall(still_world.client.written("POST", "/generate", b"", "Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
        for _ in range(MAX_BODY // 65_536):
            connection.sendall(chunk)
        connection.sendall(b"1\r\n \r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_C66_a_body_of_exactly_the_limit_is_read(still_world):
    body = b'{"prompt":""' + b" " * (MAX_BODY - 13) + b"}"
    assert len(body) == MAX_BODY
    assert_refused(still_world.client.post("/generate", body), 422, "prompt")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_C14_another_method_is_405_with_allow(still_world, method):
    reply = still_world.client.request(method, "/generate")
    assert_refused(reply, 405)
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path",
    ["/generate/", "//generate", "/./generate", "/x/../generate", "/%2e%2e/generate", "/generate%00", "/docs",
     "/v1/foo", "/%252e%252e", "/" + "a" * 9 * 1024],
)  # fmt: skip
def test_C15_a_path_that_is_not_ours_is_404(still_world, path):
    assert_refused(still_world.client.request("POST", path, prompt(), {"Content-Type": "application/json"}), 404)


def test_C34_a_method_in_a_header_changes_nothing(still_world):
    reply = still_world.client.post("/generate", b"{}", {"X-HTTP-Method-Override": "DELETE"})
    assert_refused(reply, 422)


def test_C35_no_other_origin_is_granted_anything(still_world):
    reply = still_world.client.post("/generate", b"{}", {"Origin": "https://evil.example"})
    assert not any(name.startswith("access-control-") for name in reply.headers)


@pytest.mark.parametrize("given", ["x" * 10_240, "a b", "decode_addr=tcp://10.0.0.1", "\u00fc"])
def test_C37_a_request_id_that_is_no_plain_word_is_replaced(still_world, given):
    reply = still_world.client.post("/generate", b"{}", {"X-Request-Id": given})
    assert_refused(reply, 422)
    assert reply.headers["x-request-id"].startswith("req_")


def test_a_plain_request_id_is_echoed(still_world):
    reply = still_world.client.post("/generate", b"{}", {"X-Request-Id": "Run-7.step_3"})
    assert reply.headers["x-request-id"] == "Run-7.step_3"


@pytest.mark.parametrize(
    "head",
    [
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: -1\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: +5\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nx-long: " + b"a" * 70 * 1024 + b"\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        b"GARBAGE\r\n\r\n",
    ],
    ids=["C24 negative length", "C24 signed length", "C19 header of 70 KiB", "C18 no host", "C29 no HTTP"],
)
def test_malformed_http_ends_before_a_handler_runs(still_world, head):
    with socket.create_connection(still_world.client.address, timeout=10) as connection:
        connection.sendall(head)
        answer = connection.recv(65_536)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


@pytest.mark.slow
def test_C26_C27_a_body_that_does_not_come_is_408_within_10_s(still_world):
    """One socket is held with half a body; nothing is read of it for ever."""
    with socket.create_connection(still_world.client.address, timeout=15) as connection:
        connection.sendall(still_world.client.written("POST", "/generate", b'{"prompt":', "Content-Length: 99"))
        answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()

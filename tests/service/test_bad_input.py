"""Bad input to the endpoints that complete: every row of bad_input.py has its status and field in the one error body,
nothing of it is repeated or written down, no engine and no ledger hears of it.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import redis as blocking_redis

from bon_algos.contracts import POLICIES_INDEX, policy_key
from tests.fixtures.gateway import Client, Reply, World
from tests.fixtures.waiting import wait_until
from tests.service.bad_input import (
    CANARY,
    CHAT,
    COMPLETIONS,
    ELSEWHERE,
    GENERATE,
    MALFORMED,
    MAX_BODY,
    PLAIN,
    REFUSED,
    SERVED,
    Row,
    Served,
    user,
)
from tests.service.records import STUDENT, policy
from tests.stubs.tokenizer import text_of

SECONDS = 10.0
"""No answer may take longer."""
OF_THE_HEAD = {"content-type", "content-length", "date", "connection", "x-request-id", "allow", "cache-control",
               "x-content-type-options", "content-security-policy"}  # fmt: skip


class Log(logging.Handler):
    """All that reaches the root logger."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[str, str]] = []
        """The logger's name, and what was said."""

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, self.format(record)))


@pytest.fixture(scope="module")
def log() -> Iterator[Log]:
    found, root = Log(), logging.getLogger()
    level = root.level
    root.addHandler(found)
    root.setLevel(logging.DEBUG)
    yield found
    root.setLevel(level)
    root.removeHandler(found)


@pytest.fixture(scope="module")
def answered(still_world: World) -> Iterator[list[str]]:
    """Ids of the replies that were no refusals: nothing else is in the ledger when all is over. Records of one gateway
    keep their order, so what came before the last of them is there when that is."""
    ids: list[str] = []
    yield ids
    ids.append(still_world.client.post(GENERATE, {"prompt": "the last one", "n": 2}).json["id"])
    wait_until(lambda: ids[-1] in {record.id for record in still_world.records()})
    groups = [record for record in still_world.records() if record.kind == "group"]
    assert {group.id for group in groups} == set(ids)


@pytest.fixture(autouse=True)
def nobody_hears_of_it(request: pytest.FixtureRequest, still_world: World, log: Log, answered: list[str]):
    """No engine, unless it is served; and the log has nothing of what was sent."""
    before, said = (len(still_world.engine.requests), len(still_world.reward.requests)), len(log.lines)
    yield
    if "served" not in request.fixturenames:
        assert (len(still_world.engine.requests), len(still_world.reward.requests)) == before
    assert not [line for _, line in log.lines[said:] if CANARY in line]


# --- what is refused -------------------------------------------------------------------------------------

CASES = [(row, endpoint) for row in REFUSED for endpoint in row.on]


@pytest.mark.parametrize(("row", "endpoint"), CASES, ids=[f"{row.name} {endpoint[:30]}" for row, endpoint in CASES])
def test_it_is_refused_with_its_status_and_field(still_world, log, row: Row, endpoint: str):
    before, began = len(log.lines), time.monotonic()
    reply = sent(still_world.client, row, endpoint)
    assert time.monotonic() - began < SECONDS
    assert_refused(reply, row.status, row.param)
    if row.code is not None:
        assert reply.json["error"]["code"] == row.code
    if row.status == 405:
        assert reply.headers["allow"] == "POST"
    if "X-Request-Id" in row.headers:
        assert re.fullmatch(r"req_[0-9a-f]{32}", reply.headers["x-request-id"])
    [line] = [line for name, line in log.lines[before:] if name == "bonsai.requests"]
    assert line.startswith(f"{reply.headers['x-request-id']} {row.status} {reply.json['error']['code']} ")


def sent(client: Client, row: Row, endpoint: str) -> Reply:
    body = None if row.method == "GET" else row.content(endpoint)
    headers = {"Content-Type": "application/json", "User-Agent": CANARY, **row.headers}
    return client.request(row.method, endpoint + row.query, body, headers)


def assert_refused(reply: Reply, status: int, param: str | None) -> None:
    """In the form of RFC 9457 and of OpenAI's API, short, with nothing of what was sent but the field's name."""
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers.keys() <= OF_THE_HEAD
    assert len(reply.body) <= 4096
    body = reply.json
    assert body.keys() >= {"type", "title", "status", "detail", "instance", "error"}
    assert (body["status"], body["instance"]) == (status, f"urn:bonsai:request:{reply.headers['x-request-id']}")
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] == body["detail"]
    assert body["error"]["type"] == "invalid_request_error"
    assert body["type"] == f"urn:bonsai:error:{body['error']['code']}"
    assert body["error"]["param"] == param
    if param is None or CANARY not in param:
        assert CANARY.encode() not in reply.body


def test_the_message_names_the_field_the_limit_and_the_kind(still_world):
    def message(**fields: object) -> str:
        return str(still_world.client.post(GENERATE, {"prompt": "hi", **fields}).json["error"]["message"])

    assert message(n=0) == "n must be at least 1 and at most 64; got an integer below it"
    assert message(n="x") == "n must be an integer; got a string of 1 characters"
    assert message(temperature=2.5) == "temperature must be at most 2; got a number above it"
    assert message(prompt="") == "prompt must not be empty or blank; got a string of 0 characters"
    assert message(prompt_token_ids=[1] * (2**20 + 1)) == (
        "prompt_token_ids must have at most 1048576 characters or items; got an array of 1048577 items"
    )
    assert message(prompt=None, messages=None) == "messages must not be null: leave it out"
    assert message(max_tokens=255) == (
        "max_tokens must be at most 254 behind a prompt of 2 tokens in a window of 256; got an integer above it"
    )


def test_of_what_may_be_several_things_the_nearest_is_meant(still_world):
    def message(endpoint: str, **fields: object) -> str:
        return str(still_world.client.post(endpoint, {**PLAIN[endpoint], **fields}).json["error"]["message"])

    image = {"type": "image_url", "image_url": {"url": "x"}}
    assert message(CHAT, messages=[user([image])]) == (
        "messages[0].content[0].type must be one of 'text'; got a string of 9 characters that is none of them"
    )
    assert message(COMPLETIONS, prompt=[1, -1]) == "prompt[1] must be at least 0; got an integer below it"
    assert message(COMPLETIONS, prompt=["a", "b"]) == (
        "prompt must be one text or one list of token ids; got an array of 2 prompts"
    )


def test_a_plain_request_id_is_echoed(still_world):
    reply = still_world.client.post(GENERATE, b"{}", {"X-Request-Id": "Run-7.step_3"})
    assert reply.headers["x-request-id"] == "Run-7.step_3"


def test_G53_a_retired_policy_is_410(world):
    """It was known, and will not be back: a 503 would have clients come again."""
    retired = policy(STUDENT, state="retired")
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        store.hset(policy_key(STUDENT), mapping={"record": retired.model_dump_json(), "version": 1})
        store.zadd(POLICIES_INDEX, {STUDENT: 1.0})
    wait_until(lambda: world.client.get(f"/policies/{STUDENT}").status == 200)
    for path, body, headers in (
        (GENERATE, PLAIN[GENERATE], {"x-bonsai-arm": f"{STUDENT}:1"}),
        (CHAT, {**PLAIN[CHAT], "model": STUDENT}, {}),
    ):
        reply = world.client.post(path, body, headers)
        assert_refused(reply, 410, None)
        assert reply.json["error"]["code"] == "policy_retired"
    assert world.engine.requests == []


# --- what is served --------------------------------------------------------------------------------------

SERVED_CASES = [(served, endpoint) for served in SERVED for endpoint in served.on]


@pytest.mark.parametrize(("served", "endpoint"), SERVED_CASES, ids=[f"{one.name} {path}" for one, path in SERVED_CASES])
def test_it_is_served_as_it_was_said(still_world, answered, served: Served, endpoint: str):
    drawn = {"n" if endpoint == GENERATE else "best_of": 2}
    reply = still_world.client.post(endpoint, {**PLAIN[endpoint], **drawn, **served.fields})
    assert reply.status == 200, reply.body
    answered.append(reply.json["id"])
    request = still_world.engine.requests[-1]
    said = {**PLAIN[endpoint], **served.fields}
    texts = [said["prompt"]] if "prompt" in said else [message["content"] for message in said["messages"]]
    assert all(text in text_of(request["prompt"]) for text in texts)
    assert not {"metadata", "store", "user"} & request.keys()


# --- bodies that are too large, or never whole -----------------------------------------------------------


def connected(client: Client, seconds: float = SECONDS) -> socket.socket:
    return socket.create_connection(client.address, timeout=seconds)


def test_C66_a_body_over_the_limit_is_413_before_it_is_read(still_world):
    """The length alone is enough: the body never comes."""
    with connected(still_world.client) as connection:
        connection.sendall(still_world.client.written("POST", GENERATE, b"", f"Content-Length: {MAX_BODY + 1}"))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_C66_a_chunked_body_over_the_limit_is_413(still_world):
    with connected(still_world.client) as connection:
        connection.sendall(still_world.client.written("POST", GENERATE, b"", "Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
        for _ in range(MAX_BODY // 65_536):
            connection.sendall(chunk)
        connection.sendall(b"1\r\n \r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_C66_a_body_of_exactly_the_limit_is_read(still_world):
    body = b'{"prompt":""' + b" " * (MAX_BODY - 13) + b"}"
    assert len(body) == MAX_BODY
    assert_refused(still_world.client.post(GENERATE, body), 422, "prompt")


@pytest.mark.parametrize("path", ["/v1/chat/completions", GENERATE])
def test_C66_a_message_of_10_MB_is_413(still_world, path):
    """A client that goes on sending, as clients do, still gets to read why that is in vain."""
    body = json.dumps({"model": "default", "messages": [user(CANARY * 950_000)]}).encode()
    assert len(body) > 10**7
    with connected(still_world.client) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(still_world.client.written("POST", path, body))
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert CANARY.encode() not in answer


def test_C23_a_chunk_without_end_is_413(still_world):
    """A size that no memory has is believed by nobody: what comes is counted."""
    with connected(still_world.client) as connection:
        connection.sendall(still_world.client.written("POST", GENERATE, b"", "Transfer-Encoding: chunked"))
        connection.sendall(b"FFFFFFFFFFFFFFFF\r\n" + b" " * (MAX_BODY + 1))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_C25_what_follows_a_body_is_no_part_of_it(still_world):
    """It is another request (HTTP/1.1 9.3.2), and where it is none the connection ends at once."""
    with connected(still_world.client) as connection:
        two = b'{}{"prompt":"hi"}\r\n\r\n'
        connection.sendall(still_world.client.written("POST", GENERATE, two, "Content-Length: 2"))
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"400"]


@pytest.mark.slow
def test_C26_C27_C28_a_body_that_does_not_come_is_408_within_10_s(still_world):
    """Half a body; one that comes a byte at a time; one that waits to be asked for, and then does not come."""
    with ExitStack() as stack:
        half, dripping, mute = (stack.enter_context(connected(still_world.client, 15)) for _ in range(3))
        half.sendall(still_world.client.written("POST", GENERATE, b'{"prompt":', "Content-Length: 99"))
        dripping.sendall(still_world.client.written("POST", GENERATE, b"", "Content-Length: 999999"))
        mute.sendall(still_world.client.written("POST", GENERATE, b"", "Content-Length: 99", "Expect: 100-continue"))
        assert mute.recv(65_536).startswith(b"HTTP/1.1 100 ")
        dripping.setblocking(False)
        wait_until(lambda: _is_refused_while_dripping(dripping), seconds=15)
        for connection in (half, mute):
            answer = connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in answer.lower()


def _is_refused_while_dripping(connection: socket.socket) -> bool:
    try:
        return connection.recv(100).startswith(b"HTTP/1.1 408 ")
    except BlockingIOError:
        connection.send(b" ")
        return False


# --- what is no HTTP -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent_bytes", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_http_ends_before_a_handler_runs(still_world, sent_bytes):
    with connected(still_world.client) as connection:
        connection.sendall(sent_bytes.replace(b"KEY", (still_world.client.key or "").encode()))
        answer = connection.recv(65_536)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505"))
    assert b"set-cookie" not in answer.lower()
    assert CANARY.encode() not in answer


@pytest.mark.parametrize("name", ["Idempotency-Key", "x-bonsai-arm", "x-bonsai-timeout", "x-bonsai-unit"])
def test_a_header_that_decides_about_the_answer_comes_once(still_world, name):
    """Though both say the same: whoever sent it did not mean to."""
    body = json.dumps(PLAIN[GENERATE]).encode()
    lines = (f"Content-Length: {len(body)}", f"{name}: 1", f"{name.upper()}: 1")
    with connected(still_world.client) as connection:
        connection.sendall(still_world.client.written("POST", GENERATE, body, *lines))
        with connection.makefile("rb") as reply:
            head, _, answer = reply.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer)["error"]["param"] == name


# --- nothing is forgotten --------------------------------------------------------------------------------


def test_every_line_of_the_three_sections_is_here():
    listed = {f"{letter}{i}" for letter, last in (("C", 68), ("G", 64), ("O", 56)) for i in range(1, last + 1)}
    names = [*(row.name for row in REFUSED), *(one.name for one in SERVED), *MALFORMED]
    here = {found for name in names for found in re.findall(r"\b[CGO]\d+\b", name)}
    assert here | ELSEWHERE.keys() == listed
    assert all(re.match(r"[CGO]\d+ ", name) for name in names)


@pytest.mark.parametrize(("line", "test"), ELSEWHERE.items(), ids=ELSEWHERE.keys())
def test_a_line_that_is_tested_elsewhere_is(line, test):
    file, _, name = test.partition("::")
    functions = ast.parse((Path(__file__).parent / file).read_text()).body
    assert name in {one.name for one in functions if isinstance(one, ast.FunctionDef)}

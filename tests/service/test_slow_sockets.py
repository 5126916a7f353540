"""Connections that take their time (F48): headers that never end, bodies that never come, replies that nobody reads."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from service.server import server_config
from tests.fixtures.gateway import Client, World, gateway_settings, running_gateway
from tests.fixtures.process import gateway_process
from tests.fixtures.waiting import wait_until
from tests.stubs.server import running

HALF_HEADERS = b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Half: "
WHOLE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
MANY = 100


@pytest.fixture
def world(tmp_path, engine, reward, redis_url) -> Iterator[World]:
    """A gateway that waits half a second for headers."""
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(tmp_path, engine_url, reward_url, redis_url, header_seconds=0.5)
        with running_gateway(settings) as client:
            yield World(client, engine, reward, redis_url)


def connected(client: Client) -> socket.socket:
    return socket.create_connection(client.address, timeout=10)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    answer = b""
    while piece := connection.recv(65_536):
        answer += piece
    return answer


# --- headers ---------------------------------------------------------------------------------------------


def test_headers_that_never_end_are_408_and_the_connection_is_closed(world):
    with connected(world.client) as connection:
        connection.sendall(HALF_HEADERS)
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"urn:bonsai:error:headers_timeout" in answer
    assert b"connection: close" in answer.lower()


def test_a_byte_now_and_then_buys_no_time(world):
    with connected(world.client) as connection:
        connection.sendall(HALF_HEADERS)
        connection.setblocking(False)
        wait_until(lambda: _answered_while_dripping(connection))


def _answered_while_dripping(connection: socket.socket) -> bool:
    try:
        return connection.recv(100).startswith(b"HTTP/1.1 408 ")
    except BlockingIOError:
        connection.send(b"a")
        return False


def test_the_headers_of_a_later_request_have_no_more_time(world):
    with connected(world.client) as connection:
        connection.sendall(WHOLE)
        first = b""
        while not first.endswith(b'{"status":"ok"}'):
            first += connection.recv(65_536)
        connection.sendall(HALF_HEADERS)
        assert all_of(connection).startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_says_nothing_is_closed_without_a_word(world):
    with connected(world.client) as connection:
        assert all_of(connection) == b""


def test_a_request_that_takes_longer_than_its_headers_may_is_not_cut(world):
    world.engine.script.delays = [0.8]
    assert world.client.post("/generate?n=2", {"prompt": "hi"}).status == 200


def test_slow_connections_delay_nobody(world):
    """100 in the middle of their headers, 100 in the middle of their bodies: others are answered meanwhile, and every
    one of the first is told 408."""
    with ExitStack() as stack:
        half_body = world.client.written("POST", "/generate", b'{"pro', "Content-Length: 99")

        def begun(half: bytes) -> socket.socket:
            connection = stack.enter_context(connected(world.client))
            connection.sendall(half)
            return connection

        in_headers = [begun(HALF_HEADERS) for _ in range(MANY)]
        for _ in range(MANY):
            begun(half_body)
        assert [world.client.post("/generate?n=2", {"prompt": "hi"}).status for _ in range(5)] == [200] * 5
        assert [all_of(connection)[:13] for connection in in_headers] == [b"HTTP/1.1 408 "] * MANY
    assert world.client.get("/ready").json["limits"]["requests_in_flight"] == 0


# --- requests behind one that runs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b'{"prompt": "hi"}', b'{"prompt": "' + b"x" * 200_000 + b'"}'], ids=["small", "large"]
)
@pytest.mark.parametrize("is_at_once", [True, False])
def test_a_client_that_leaves_behind_a_second_request_stops_the_engine(world, body, is_at_once):
    """Whatever it has sent behind the one that runs, and whenever."""
    world.engine.script.fault = "silent"
    first, second = (world.client.written("POST", "/generate?n=2", one) for one in (b'{"prompt": "hi"}', body))
    with connected(world.client) as connection:
        connection.sendall(first + second if is_at_once else first)
        wait_until(lambda: world.engine.active == 1)
        if not is_at_once:
            connection.sendall(second)
    wait_until(lambda: world.engine.active == 0, seconds=1)
    assert len(world.engine.aborted_at) == len(world.engine.requests) == 1


@pytest.mark.parametrize("behind", [WHOLE, HALF_HEADERS], ids=["whole", "half"])
def test_what_comes_behind_a_request_that_runs_is_for_another_connection(world, behind):
    """The first answer says so, and nothing follows it."""
    request = world.client.written("POST", "/generate?n=2", b'{"prompt": "hi"}')
    with connected(world.client) as connection:
        connection.sendall(request + behind)
        answer = all_of(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["candidates"]["requested"] == 2
    assert len(world.engine.requests) == 1


def test_a_second_request_after_the_first_answer_is_answered_on_the_same_connection(world):
    with connected(world.client) as connection:
        for _ in range(2):
            connection.sendall(world.client.written("POST", "/generate?n=2", b'{"prompt": "hi"}'))
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" not in answer.lower()


async def lifespan(receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    for done in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{done}.complete"})


class Lingerer:
    """Answers at once and whole; of /slow it ends when it is told to."""

    def __init__(self, status: int, body: bytes) -> None:
        self._status = status
        self._body = body
        self.has_answered, self.may_end = threading.Event(), threading.Event()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        length = [(b"content-length", str(len(self._body)).encode())] if self._body else []
        await send({"type": "http.response.start", "status": self._status, "headers": length})
        await send({"type": "http.response.body", "body": self._body, "more_body": True})
        self.has_answered.set()
        if scope["path"] == "/slow":
            await asyncio.to_thread(self.may_end.wait, 10)
        await send({"type": "http.response.body"})


@pytest.mark.parametrize(
    ("method", "status", "body"), [("GET", 200, b"whole"), ("HEAD", 200, b"whole"), ("DELETE", 204, b"")]
)
def test_whoever_has_all_of_an_answer_may_ask_for_the_next_before_it_has_ended(tmp_path, method, status, body):
    app = Lingerer(status, body)
    with served(app, tmp_path, unread_seconds=5) as client, connected(client) as connection:
        connection.sendall(client.written(method, "/slow", b""))
        assert app.has_answered.wait(10)
        connection.sendall(client.written(method, "/", b"", "Connection: close"))
        client.request(method, "/")  # by now the server has read what was sent before
        app.may_end.set()
        answer = all_of(connection)
    assert answer.count(b"HTTP/1.1 %d " % status) == 2


# --- replies that nobody reads ---------------------------------------------------------------------------


class Sender:
    """Sends chunks for ever, or one and the end; knows how many it got rid of and when its client was gone."""

    def __init__(self, chunk: bytes, *, is_endless: bool) -> None:
        self._chunk = chunk
        self._is_endless = is_endless
        self.num_sent = 0
        self.is_left = threading.Event()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sending = asyncio.create_task(self._sent(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_left.set()
        sending.cancel()
        await asyncio.wait({sending})

    async def _sent(self, send: Callable[..., Any]) -> None:
        while True:
            await send({"type": "http.response.body", "body": self._chunk, "more_body": self._is_endless})
            self.num_sent += 1
            if not self._is_endless:
                return


@contextmanager
def served(sender: Sender | Lingerer, tmp_path, unread_seconds: float) -> Iterator[Client]:
    """The sender behind our server."""
    urls = ("http://127.0.0.1:1", "http://127.0.0.1:2", "redis://127.0.0.1:3")
    settings = gateway_settings(tmp_path, *urls, unread_seconds=unread_seconds)
    server = uvicorn.Server(server_config(sender, settings))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    yield Client(f"http://{host}:{port}", None)
    server.should_exit = True
    thread.join(30)


def test_a_reply_that_nobody_reads_is_given_up_and_takes_no_memory(tmp_path):
    """Chunks of 1 MiB: what the kernel takes, and one that waits. Then the connection is cut."""
    sender = Sender(b"x" * 2**20, is_endless=True)
    with served(sender, tmp_path, unread_seconds=0.5) as client, closing(connected(client)) as connection:
        connection.sendall(WHOLE)
        wait_until(sender.is_left.is_set)
        assert sender.num_sent < 20


def test_whoever_reads_a_byte_at_a_time_is_given_up(tmp_path):
    """Some 200 bytes a second, and one a second all the more: less than 16 KiB in the time is no reading."""
    sender = Sender(b"x" * 2**20, is_endless=True)
    with served(sender, tmp_path, unread_seconds=0.5) as client, closing(connected(client)) as connection:
        connection.sendall(WHOLE)
        wait_until(lambda: len(connection.recv(1)) == 1 and sender.is_left.is_set())
        assert sender.num_sent < 20


@pytest.mark.slow
def test_whoever_reads_slowly_but_reads_is_served_to_the_end(tmp_path):
    """32 MiB in one piece, read at 6 MB/s at most: more than ten times as long as a reply may be left unread."""
    size = 2**25
    with (
        served(Sender(b"x" * size, is_endless=False), tmp_path, unread_seconds=0.4) as client,
        closing(connected(client)) as connection,
    ):
        connection.sendall(WHOLE)
        got = 0

        def is_read() -> bool:
            nonlocal got
            piece = len(connection.recv(32_768))
            got += piece
            return piece == 0 or got >= size

        wait_until(is_read, seconds=60)
    assert got >= size


# --- no descriptors left ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gateway_without_descriptors_recovers_when_connections_end(tmp_path, engine, reward, redis_url, unused_port):
    """F50. 200 connections that say nothing, with descriptors for about 20: they are closed in their time, and then
    others are answered again by the same process."""
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url, ExitStack() as stack:
        settings = gateway_settings(tmp_path, engine_url, reward_url, redis_url, header_seconds=1)
        process, client = stack.enter_context(gateway_process(settings, unused_port))
        in_use = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (in_use + 20, in_use + 20))
        for _ in range(200):
            stack.enter_context(connected(client))
        wait_until(lambda: len(list(Path(f"/proc/{process.pid}/fd").iterdir())) == in_use + 20)
        wait_until(lambda: _is_answered(client), seconds=60)
        assert process.poll() is None


def _is_answered(client: Client) -> bool:
    try:
        return client.post("/generate?n=2", {"prompt": "hi"}).status == 200
    except OSError:
        return False

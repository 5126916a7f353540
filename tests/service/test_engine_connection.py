"""An engine's bytes, as they come over a socket: where an answer ends, and what becomes of the connection."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from service.engine_connection import IDLE_SECONDS, Connections
from service.engine_http import EngineHttp, Events
from service.errors import EngineBroken, EngineUnavailable, PolicyNotServed

OK = b"HTTP/1.1 200 OK\r\n"
HI = OK + b'Content-Length: 8\r\n\r\n{"hi":1}'
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Wire:
    """A program that says these bytes, a piece at a time, for each request that it reads. None: it hangs up."""

    def __init__(self, *said: bytes | None) -> None:
        self.said = said
        self.num_connections = 0
        self.requests: list[bytes] = []
        self.left = asyncio.Event()
        """One of its connections was closed."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
                self.requests.append(head + await reader.readexactly(int(length.split(b":")[1])))
                for piece in self.said:
                    if piece is None:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left.set()
        finally:
            writer.close()


def with_engine(wire_of: Callable[[], Wire], ask: Callable[[EngineHttp, Wire], Awaitable[object]]) -> object:
    """What `ask` gives, with an engine at the other end of a real socket."""

    async def run() -> object:
        wire = wire_of()
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(await asyncio.start_server(wire, "127.0.0.1", 0))
            http = EngineHttp(
                f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
                title="engine",
                unavailable=EngineUnavailable,
                not_served=PolicyNotServed,
                broken_code="engine_broken",
            )
            stack.push_async_callback(http.close)
            return await ask(http, wire)

    return asyncio.run(run())


async def streamed(http: EngineHttp, most: int) -> list[bytes]:
    async with http.stream("/", {}, most, lambda: None) as events:
        return await all_of(events)


async def all_of(events: Events) -> list[bytes]:
    found: list[bytes] = []
    while (more := await events.more()) is not None:
        found += more
    return found


@pytest.mark.parametrize(
    "said",
    [
        (HI,),
        (HI[:9], HI[9:20], HI[20:]),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{\"h\r\n", b"5\r\ni\":1}\r\n0\r\n\r\n"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"hi"', b":1}", None),
        (OK + b'Connection: close\r\n\r\n{"hi":1}', None),
        (b"HTTP/1.1 100 Continue\r\n\r\n", HI),
    ],
    ids=["at once", "in pieces", "chunked", "HTTP/1.0", "without a length", "continue"],
)  # fmt: skip
def test_an_answer_is_read_to_its_end_however_it_is_told(said):
    assert with_engine(lambda: Wire(*said), lambda http, _: http.post("/", {})) == b'{"hi":1}'


def test_a_request_is_what_was_asked_and_the_connection_carries_the_next():
    async def ask(http: EngineHttp, wire: Wire) -> None:
        await http.post("/classify", {"n": 1})
        await http.get("/v1/models", 10)
        assert wire.num_connections == 1
        first, second = wire.requests
        assert first.startswith(b"POST /classify HTTP/1.1\r\nHost: 127.0.0.1:")
        assert first.endswith(b'\r\nContent-Length: 7\r\nContent-Type: application/json\r\n\r\n{"n":1}')
        assert second.startswith(b"GET /v1/models HTTP/1.1\r\n")

    with_engine(lambda: Wire(HI), ask)


@pytest.mark.parametrize("closing", [b"Connection: close\r\n", b""], ids=["announced", "HTTP/1.0"])
def test_a_connection_that_its_peer_gives_up_carries_no_other_request(closing):
    said = b"HTTP/1.%d 200 OK\r\nContent-Length: 2\r\n%s\r\n{}" % (1 if closing else 0, closing)

    async def ask(http: EngineHttp, wire: Wire) -> int:
        for _ in range(2):
            await http.post("/", {})
        return wire.num_connections

    assert with_engine(lambda: Wire(said), ask) == 2


def test_what_nobody_asked_for_is_no_answer_to_the_next_request():
    async def ask(http: EngineHttp, wire: Wire) -> list[bytes]:
        with pytest.raises(EngineBroken):
            await http.post("/", {})
        wire.said = (HI,)
        return [await http.post("/", {})]

    assert with_engine(lambda: Wire(HI + OK + b"Content-Length: 2\r\n\r\n{}"), ask) == [b'{"hi":1}']


@pytest.mark.parametrize(
    "said",
    [
        (HI[:-1], None),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{\"h\r\n", None),
        (OK[:8], None),
        (None,),
        (b"SSH-2.0-OpenSSH_9.6\r\n",),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",),
        (OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",),
    ],
    ids=["cut", "cut chunk", "cut headers", "nothing", "no HTTP", "upgrade", "two lengths"],
)  # fmt: skip
def test_what_is_no_whole_answer_is_a_broken_engine(said):
    with pytest.raises(EngineBroken):
        with_engine(lambda: Wire(*said), lambda http, _: http.post("/", {}))


def test_what_was_left_of_a_refusal_is_in_no_other_answer():
    async def ask(http: EngineHttp, wire: Wire) -> bytes:
        async with http.stream("/", {}, 1000, lambda: None) as events:
            await events.whole(asyncio.get_running_loop().time() + 60)
            with pytest.raises(PolicyNotServed):
                await events.more()
        wire.said = (HI,)
        answer = await http.post("/", {})
        assert wire.num_connections == 1
        return answer

    assert with_engine(lambda: Wire(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}"), ask) == b'{"hi":1}'


def test_where_nobody_listens_nothing_was_asked():
    async def ask(http: EngineHttp, _: Wire) -> None:
        away = EngineHttp(
            "unix:///nowhere/engine.sock",
            title="engine",
            unavailable=EngineUnavailable,
            not_served=PolicyNotServed,
            broken_code="engine_broken",
        )
        with pytest.raises(EngineUnavailable):
            await away.post("/", {})

    with_engine(lambda: Wire(HI), ask)


def test_an_answer_without_end_is_left():
    async def ask(http: EngineHttp, wire: Wire) -> None:
        with pytest.raises(EngineBroken, match="longer than 1000 bytes"):
            await streamed(http, most=1000)
        await wire.left.wait()

    endless = [OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"64\r\n" + b" " * 100 + b"\r\n"] * 50]
    with_engine(lambda: Wire(*endless), ask)


@pytest.mark.parametrize("reads_as_it_comes", [True, False])
def test_a_refusal_of_a_stream_is_told_though_it_never_ends(reads_as_it_comes):
    async def ask(http: EngineHttp, _: Wire) -> None:
        async with asyncio.timeout(5), http.stream("/", {}, 1000, lambda: None) as events:
            if not reads_as_it_comes:
                await events.whole(asyncio.get_running_loop().time() + 60)
            await events.more()

    with pytest.raises(PolicyNotServed):
        with_engine(lambda: Wire(b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\n"), ask)


def test_every_piece_is_told_of_also_where_it_is_not_looked_at():
    """The first sign of life must not wait for the last token."""
    first, rest = b"7\r\ndata: 1\r\n2\r\n\n\n\r\n", b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    told = []

    async def ask(http: EngineHttp, _: Wire) -> list[bytes]:
        async with http.stream("/", {}, 1000, lambda: told.append(1)) as events:
            await events.whole(asyncio.get_running_loop().time() + 60)
            assert len(told) == 3
            return await all_of(events)

    found = with_engine(lambda: Wire(OK + b"Transfer-Encoding: chunked\r\n\r\n", first, rest), ask)
    assert found == [b"1"]


@pytest.mark.parametrize("bytes_each", [1, 7, 1000])
def test_events_are_the_same_wherever_their_stream_is_cut(bytes_each):
    told = b": still here\n\ndata: 1\n\nevent: more\ndata:2\n\ndata: 3\r\n\r\ndata: [DONE]\n\ndata: 4\n\n"
    pieces = [told[i : i + bytes_each] for i in range(0, len(told), bytes_each)]
    wire = Wire(OK + b"Content-Length: %d\r\n\r\n" % len(told), *pieces)
    assert with_engine(lambda: wire, lambda http, _: streamed(http, 1000)) == [b"1", b"2", b"3"]


@pytest.mark.slow
def test_a_connection_that_nobody_needs_is_closed():
    async def ask(http: EngineHttp, wire: Wire) -> None:
        await http.post("/", {})
        async with asyncio.timeout(3 * IDLE_SECONDS):
            await wire.left.wait()

    with_engine(lambda: Wire(HI), ask)


def test_closing_waits_until_its_connections_are_gone():
    async def run() -> None:
        wire = Wire(HI)
        async with await asyncio.start_server(wire, "127.0.0.1", 0) as server:
            connections = Connections(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            async with connections.call("GET", "/", b"", max_bytes=1000) as connection:
                await connection.answer()
            await connections.close()
            assert connection.lost.done()

    asyncio.run(run())

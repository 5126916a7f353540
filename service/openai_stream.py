"""Server-sent events of one answer: keep-alive comments, progress, the choices' chunks, and what went wrong.

Owns: what is sent when, that the engine stops when the client goes away, what is kept of a stream for its
`Idempotency-Key`. Does not own: the form of a chunk (openai_replies.py), how the answer comes to be (serving.py), how
it is kept (replays.py).

A single sample is passed on piece by piece as the engine says it. Of n candidates nobody knows the winner before the
last is scored: until then the stream lives on comments, and then has the best in the engine's own pieces, one choice
behind the other. A stream that is asked for again under its key says each in one piece: when it came is nobody's
interest any more.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bon_algos.contracts import CandidateGroup
from bon_algos.vllm_protocol import Listener, Piece
from service.best_of_n import Answer
from service.errors import GatewayError, problem
from service.headers import ARM, POLICY
from service.idempotency import Idempotency
from service.openai_bodies import StreamOptions
from service.openai_replies import Part, Shape, whole
from service.replays import Reply
from service.serving import Prepared, Serving, answer
from service.tracing import named

KEEP_ALIVE_SECONDS: Final = 10.0
"""Load balancers give up a connection that is silent for 60 s, some for 30."""
FIRST_SECONDS: Final = 0.5
"""So long an error may still have a status of its own: then the stream begins."""
PING: Final = b": ping\n\n"
DONE: Final = b"data: [DONE]\n\n"
MEDIA_TYPE: Final = "text/event-stream"
log = logging.getLogger("bonsai.requests")


class Work:
    """An answer that is being made, and what is heard of it. Closing it stops the engine."""

    def __init__(self, make: Callable[[Listener], Coroutine[Any, Any, Answer]]) -> None:
        self._heard: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._task = asyncio.create_task(make(self._heard.put_nowait))
        self._task.add_done_callback(lambda _: self._heard.put_nowait(None))

    async def next(self, seconds: float) -> Piece | None:
        """The next piece, or None when there is an answer or none will come. TimeoutError after so long."""
        async with asyncio.timeout(seconds):
            return await self._heard.get()

    def answer(self) -> Answer:
        """Of a work that has ended. Raises why there is none."""
        return self._task.result()

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


class Streamed(StreamingResponse):
    """The events of a work, which ends with the response: also where the client has gone before the first event, and
    nobody ever asks the generator of events for one."""

    def __init__(self, work: Work, events: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers, media_type=MEDIA_TYPE)
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._work):
            await super().__call__(scope, receive, send)


async def stream(
    serving: Serving,
    prepared: Prepared,
    shape: Shape,
    options: StreamOptions | None,
    request_id: str,
    asked: Idempotency | None,
) -> Response:
    """The response, as soon as there is something to send or `FIRST_SECONDS` have passed. Raises what went wrong until
    then, and as `Replays.begin`."""
    group, options = prepared.group, options or StreamOptions()
    headers = {
        "X-Accel-Buffering": "no",
        ARM: str(group.arm),
        **({} if prepared.policy is None else {POLICY: prepared.policy}),
    }
    if asked is not None and (earlier := await serving.replays.begin(asked, prepared.budget.seconds)) is not None:
        return _again(earlier)

    def kept(filled: Answer) -> Reply:
        return Reply({"chunks": shape.in_one_piece(filled.group, include_usage=options.include_usage)}, headers)

    def make(hear: Listener) -> Coroutine[Any, Any, Answer]:
        draw = partial(answer, serving, prepared, wait_for_reward=False, hear=hear)
        return draw() if asked is None else serving.replays.keep(asked, draw, kept)

    work = Work(make)
    events = _Events(work, shape, options, prepared).all(await _begun(work), request_id)
    return Streamed(work, events, headers)


async def _begun(work: Work) -> list[Piece | None]:
    """What was heard until there is something to send, or in `FIRST_SECONDS`. Raises what went wrong until then."""
    heard: list[Piece | None] = []
    try:
        heard.append(await work.next(FIRST_SECONDS))
        if heard == [None]:
            work.answer()
    except TimeoutError:
        pass
    except BaseException:
        await work.aclose()
        raise
    return heard


def _again(earlier: Reply) -> Response:
    events = [*map(_data, earlier.body["chunks"]), DONE]
    return Response(b"".join(events), headers=earlier.headers, media_type=MEDIA_TYPE)


class _Events:
    def __init__(self, work: Work, shape: Shape, options: StreamOptions, prepared: Prepared) -> None:
        self._work, self._shape, self._options = work, shape, options
        self._group, self._stops = prepared.group, prepared.stops
        self._requested = self._stops[0]
        self._pieces: defaultdict[int, list[Piece]] = defaultdict(list)
        self._finished = 0
        self._is_first = True

    async def all(self, heard: list[Piece | None], request_id: str) -> AsyncGenerator[bytes]:
        for comment in self._comment(PING):
            yield comment
        try:
            async for event in self._said(heard):
                yield event
            for event in self._told(self._work.answer()):
                yield event
            yield DONE
        except GatewayError as error:
            log.warning("%s %d %s after the stream had begun", named(request_id), error.status, error.code)
            yield _data(problem(error, request_id))
        except Exception as error:
            log.error("request %s failed after its stream had begun", named(request_id), exc_info=error)
            yield _data(problem(GatewayError("the gateway failed; its log has the details"), request_id))

    async def _said(self, heard: list[Piece | None]) -> AsyncGenerator[bytes]:
        """While the work is going on. What is heard and not sent does not break the silence."""
        loop = asyncio.get_running_loop()
        silent_since = loop.time()
        while True:
            try:
                left = silent_since + KEEP_ALIVE_SECONDS - loop.time()
                piece = heard.pop() if heard else await self._work.next(left)
            except TimeoutError:
                silent_since, events = loop.time(), self._comment(PING)
            else:
                if piece is None:
                    return
                events = self._events_of(piece)
            for event in events:
                yield event
                silent_since = loop.time()

    def _events_of(self, piece: Piece) -> tuple[bytes, ...]:
        """A single sample's piece is passed on; another is kept until the choice, and may be progress."""
        if self._is_single:
            chunk = self._shape.chunk(0, Part(*piece[1:]), self._group, is_first=self._is_first)
            self._is_first = False
            return (_data(chunk),)
        self._pieces[piece.candidate].append(piece)
        self._requested = next(stop for stop in self._stops if stop > piece.candidate)
        if piece.finish_reason is None:
            return ()
        self._finished += 1
        return self._progress()

    def _told(self, filled: Answer) -> Iterator[bytes]:
        """When there is an answer."""
        unsaid = partial(self._unsaid, filled.group)
        yield from map(_data, self._shape.rest(filled.group, unsaid, include_usage=self._options.include_usage))

    def _unsaid(self, group: CandidateGroup, place: int) -> Sequence[Part]:
        """What the candidate said and the client has not heard."""
        if not self._is_single:
            return [Part(*piece[1:]) for piece in self._pieces[place]]
        return [whole(group.candidates[place])] if self._is_first else []

    @property
    def _is_single(self) -> bool:
        """Whether the one sample that is drawn is the answer, before it has come."""
        return self._stops == (1,)

    def _progress(self) -> tuple[bytes, ...]:
        if self._options.bonsai_progress:
            done = json.dumps({"candidates": {"requested": self._requested, "finished": self._finished}})
            return (f"event: bonsai.progress\ndata: {done}\n\n".encode(),)
        return self._comment(f": bonsai candidates={self._finished}/{self._requested}\n\n".encode())

    def _comment(self, comment: bytes) -> tuple[bytes, ...]:
        return (comment,) if self._options.bonsai_comments else ()


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"

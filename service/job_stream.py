"""A job's events as they happen: server-sent events that begin behind any event and end with the job.

Owns: how a stream is kept alive, ended and limited, and the place of each key's streams. Does not own: what an event is
(job_object.py), who may see the job (routes/distill.py).

Each stream waits inside Redis (`XREAD BLOCK`) on a connection of its own, so their number is bounded, by key and in
all.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bon_algos.contracts import FINAL_JOB_STATES, job_events_key, job_key
from service.errors import Overloaded, RateLimited, StoreUnavailable, problem
from service.job_object import event_object

STREAMS_OF_A_KEY: Final = 16
STREAMS: Final = 256
"""Of one gateway process: each holds a connection to Redis."""
BLOCK_SECONDS: Final = 1.0
"""How long a gateway that shuts down waits for its streams to notice."""
REPLY_SECONDS: Final = BLOCK_SECONDS + 2.0
"""For the connection that waits."""
KEEP_ALIVE_SECONDS: Final = 10.0
PING: Final = b": ping\n\n"
READ_AT_ONCE: Final = 100
log = logging.getLogger("bonsai.requests")


class JobStreams:
    """All streams of one gateway process."""

    def __init__(self, redis: Redis) -> None:
        """redis: a client that waits at least REPLY_SECONDS for a reply."""
        self._redis = redis
        self._open: Counter[str] = Counter()

    @contextmanager
    def place(self, key_id: str) -> Iterator[None]:
        """One more stream of this key. Raises RateLimited where it has all it may have, Overloaded where all have."""
        if self._open[key_id] >= STREAMS_OF_A_KEY:
            raise RateLimited(f"this key follows {STREAMS_OF_A_KEY} jobs already: end one of its streams first")
        if self._open.total() >= STREAMS:
            raise Overloaded(f"this gateway has {STREAMS} streams of events open already")
        self._open[key_id] += 1
        try:
            yield
        finally:
            self._open[key_id] -= 1
            self._open += Counter()  # forgets the keys that have none

    async def follow(
        self, job_id: str, start: str, is_over: Callable[[], bool], request_id: str
    ) -> AsyncGenerator[bytes]:
        """Events behind `start` until the last one of the job, or until the gateway shuts down: whoever comes again
        with the id of the last event it got has missed nothing."""
        last, said_at = start, monotonic()
        yield PING
        try:
            while not is_over():
                rows = await self._next(job_id, last)
                for last, fields in rows:
                    yield f"id: {last}\ndata: {json.dumps(event_object(last, fields))}\n\n".encode()
                    if fields.get("state") in FINAL_JOB_STATES:
                        return
                if rows:
                    said_at = monotonic()
                elif await self._has_ended(job_id):
                    return
                elif monotonic() - said_at >= KEEP_ALIVE_SECONDS:
                    said_at = monotonic()
                    yield PING
        except RedisError as error:
            log.warning("%s the stream of a job's events ended: %s", request_id, type(error).__name__)
            told = problem(StoreUnavailable("Redis did not answer; come again with Last-Event-ID"), request_id)
            yield f"event: error\ndata: {json.dumps(told)}\n\n".encode()

    async def _next(self, job_id: str, last: str) -> list[tuple[str, dict[str, str]]]:
        key = job_events_key(job_id)
        found: Any = await self._redis.xread({key: last}, count=READ_AT_ONCE, block=int(BLOCK_SECONDS * 1000))
        streams = found.items() if isinstance(found, dict) else found or ()
        return [row for _, rows in streams for row in rows]

    async def _has_ended(self, job_id: str) -> bool:
        """Where nothing came: the last event is behind us, or was never there."""
        return cast("str | None", await self._redis.hget(job_key(job_id), "state")) in (*FINAL_JOB_STATES, None)


class EventStream(StreamingResponse):
    """A stream that gives its place back however it ends: at its end, or because the client left."""

    def __init__(self, events: AsyncGenerator[bytes], leave: Callable[[], object]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()

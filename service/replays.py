"""A completion that is asked for twice under one `Idempotency-Key` is drawn once, and answered twice.

Owns: who draws while others are told to wait, what is kept of the answer, and for how long. Does not own: the key and
its digest (idempotency.py), what the answer is.

A retry of best-of-n costs n generations, so the promise is kept in Redis, where every gateway sees it; without Redis a
request with a key is refused rather than perhaps drawn twice. Only answers are kept: after an error the key is free.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, TypeVar, cast

from redis.asyncio import Redis

from bon_algos.crash_points import crash_point
from service.errors import Conflict, GatewayError
from service.headers import REPLAYED
from service.idempotency import KEPT_SECONDS, Idempotency
from service.store import translated

SLACK_SECONDS: Final = 10
"""A gateway that died holds its keys so much longer than its request could have taken."""
T = TypeVar("T")
log = logging.getLogger("bonsai.requests")


class Reply(NamedTuple):
    body: dict[str, Any]
    headers: dict[str, str]


class Replays:
    """The replies that are kept in one Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def once(self, asked: Idempotency | None, seconds: float, make: Callable[[], Awaitable[Reply]]) -> Reply:
        """What `make` gives, or gave to the same request before. seconds: how long it may take. Raises as `begin`."""
        if asked is None:
            return await make()
        earlier = await self.begin(asked, seconds)
        return await self.keep(asked, make, lambda reply: reply) if earlier is None else earlier

    async def begin(self, asked: Idempotency, seconds: float) -> Reply | None:
        """What the same request was answered before. None: it is answered now, by whoever asked, through `keep`.
        seconds: how long that may take.

        Raises Conflict (idempotency_in_flight) while the first request is still under way, InvalidField for a key that
        came with another request, StoreUnavailable.
        """
        with translated():
            is_first = await self._redis.set(asked.key, f"{asked.digest} ", nx=True, ex=round(seconds) + SLACK_SECONDS)
            kept = None if is_first else cast("str | None", await self._redis.get(asked.key))
        crash_point("reply.promised")
        if is_first:
            return None
        answer = "" if kept is None else asked.answer(kept)
        if not answer:
            raise Conflict("the first request with this key is still under way", code="idempotency_in_flight")
        reply = Reply(**json.loads(answer))
        return reply._replace(headers={**reply.headers, REPLAYED: "true"})

    async def keep(self, asked: Idempotency, make: Callable[[], Awaitable[T]], reply_of: Callable[[T], Reply]) -> T:
        """What `make` gives, once it is kept as the reply it becomes; when it fails or is left, the key is free."""
        try:
            made = await make()
            answer = f"{asked.digest} {json.dumps(reply_of(made)._asdict())}"
        except BaseException:
            await asyncio.shield(self._written(lambda: self._redis.delete(asked.key)))
            raise
        # Whoever leaves now leaves the answer behind.
        await asyncio.shield(self._written(lambda: self._redis.set(asked.key, answer, ex=KEPT_SECONDS)))
        crash_point("reply.kept")
        return made

    async def _written(self, write: Callable[[], Awaitable[Any]]) -> None:
        """A write whose failure changes nothing for this caller: a retry finds the key in flight until it expires."""
        try:
            with translated():
                await write()
        except GatewayError as error:
            log.warning("an idempotent reply is not kept: %s", error.message)

"""Calls to one engine, and the one place where its failures get a meaning.

Owns: JSON there and back, server-sent events, refused or dead engines translated into the gateway's errors. Does not
own: what is asked (vllm.py, reward.py), connections (engine_connection.py), deadlines (the caller's `asyncio.timeout`),
retries: there are none, a call that an engine accepted was paid for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from io import BytesIO
from typing import Any, Final

from pydantic_core import to_json

from bon_algos.vllm_protocol import MalformedReply, RefusedReply, json_object
from service.engine_connection import Connection, Connections, TooLong, Unreachable
from service.errors import AnswerTooLong, EngineBroken, EngineRefused, Unavailable

MAX_REPLY_BYTES: Final = 16 * 2**20
_DATA: Final = b"data:"
_END: Final = b"[DONE]"


class EngineHttp:
    """Requests to one engine. Must be made inside a running event loop and closed."""

    def __init__(
        self,
        url: str,
        *,
        title: str,
        unavailable: type[Unavailable],
        not_served: type[Unavailable],
        broken_code: str,
    ) -> None:
        """url: unix:///path or http://127.0.0.1:port. title: what messages call it. unavailable: raised when it
        cannot be reached or has no room. not_served: raised when it does not know the model. broken_code: the
        code of EngineBroken when it did not deliver."""
        self._title = title
        self._unavailable = unavailable
        self._not_served = not_served
        self._broken_code = broken_code
        self._connections = Connections(url)

    async def close(self) -> None:
        await self._connections.close()

    async def get(self, path: str, seconds: float) -> dict[str, Any]:
        """A JSON object; no answer within `seconds` means the engine is away."""
        with self.translated():
            async with asyncio.timeout(seconds):
                status, answer = await self._whole("GET", path)
            self._require_ok(status)
            return json_object(answer)

    async def get_text(self, path: str, seconds: float) -> tuple[int, str]:
        """Status and text; whatever the status, it is an answer."""
        with self.translated():
            async with asyncio.timeout(seconds):
                status, answer = await self._whole("GET", path)
        return status, answer.decode("utf-8", "replace")

    async def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The answer to a JSON object. How long to wait is the caller's affair."""
        with self.translated():
            status, answer = await self._whole("POST", path, to_json(body))
            self._require_ok(status)
            return answer

    async def post_for_status(self, path: str, body: dict[str, Any], seconds: float) -> tuple[int, str]:
        """Status and text of a request whose refusal is an answer."""
        with self.translated():
            async with asyncio.timeout(seconds):
                status, answer = await self._whole("POST", path, to_json(body))
        return status, answer.decode("utf-8", "replace")

    @asynccontextmanager
    async def stream(
        self, path: str, body: dict[str, Any], max_bytes: int, came: Callable[[], None]
    ) -> AsyncGenerator[Events]:
        """A server-sent stream. Leaving before its end closes the connection, which is what makes the engine stop
        working on it. came: told of each piece as it arrives, whenever it is read."""
        with self.translated():
            call = self._connections.call("POST", path, to_json(body), max_bytes=max_bytes, came=came)
            async with call as connection:
                yield Events(connection, self._require_ok)

    async def _whole(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        async with self._connections.call(method, path, body, max_bytes=MAX_REPLY_BYTES) as connection:
            return await connection.answer()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Failures of the connection and malformed answers, in the gateway's words."""
        try:
            yield
        except Unreachable as error:
            raise self._unavailable(f"the {self._title} cannot be reached") from error
        except TimeoutError as error:
            raise self._unavailable(f"the {self._title} does not answer") from error
        except ConnectionError as error:
            raise EngineBroken(f"the {self._title} broke off its answer", code=self._broken_code) from error
        except TooLong as error:
            raise AnswerTooLong(
                f"the {self._title} gave a malformed answer: {error}", code=self._broken_code
            ) from error
        except RefusedReply as error:
            raise EngineRefused(f"the {self._title} refuses the request") from error
        except MalformedReply as error:
            raise EngineBroken(f"the {self._title} gave a malformed answer: {error}", code=self._broken_code) from error

    def _require_ok(self, status: int) -> None:
        if status in (429, 503):
            raise self._unavailable(f"the {self._title} has no room for this request now")
        if status == 404:
            raise self._not_served(f"the {self._title} does not serve this model now")
        if status == 400:
            raise EngineRefused(f"the {self._title} refuses the request")
        if status != 200:
            raise EngineBroken(f"the {self._title} answered with status {status}", code=self._broken_code)


class Events:
    """The data of each event up to `[DONE]`; a stream that ends without it was cut."""

    def __init__(self, connection: Connection, require_ok: Callable[[int], None]) -> None:
        self._connection = connection
        self._require_ok = require_ok
        self._pending = b""
        self._is_over = False

    async def whole(self, until: float) -> None:
        """Wait until everything is here, or for so long; a time of the event loop's clock."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._connection.whole()

    async def more(self) -> list[bytes] | None:
        """What has come since the last time, as soon as something has; None after the end."""
        if self._is_over:
            # To the end of the connection's turn, so that it can be used again.
            await self._connection.whole()
            return None
        self._require_ok(await self._connection.head())
        piece = await self._connection.piece()
        if not piece:
            raise MalformedReply("it ends in the middle")
        # An event is one line here. `BytesIO` finds their ends several times faster than `split` does.
        lines = BytesIO(self._pending + piece).readlines()
        self._pending = b"" if lines[-1].endswith(b"\n") else lines.pop()
        data = [line[len(_DATA) :].strip() for line in lines if line.startswith(_DATA)]
        self._is_over = _END in data
        return [one for one in (data[: data.index(_END)] if self._is_over else data) if one]

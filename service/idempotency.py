"""`Idempotency-Key`: the same key with the same request is answered again, not carried out again.

Owns: what a key may look like, the Redis key it becomes, and how an answer is kept beside the digest of its request
for 24 h. Does not own: the request; an operation recalls and remembers inside its own transaction (`once`) or script.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Self, cast, overload

from redis.asyncio.client import Pipeline

from bon_algos.contracts import DEFAULT_TENANT, idempotency_key
from service.errors import InvalidField, Unparseable
from service.headers import IDEMPOTENCY_KEY
from service.record_reading import RegistryRecord, read_record

KEPT_SECONDS: Final = 86_400
MAX_LENGTH: Final = 255


@dataclass(frozen=True)
class Idempotency:
    """One key and the request it came with. Only hashes are kept."""

    key: str
    """In Redis."""
    digest: str
    """Of the operation and its body."""

    @overload
    @classmethod
    def of(cls, header: str, operation: str, body: str, tenant: str = ...) -> Self: ...

    @overload
    @classmethod
    def of(cls, header: str | None, operation: str, body: str, tenant: str = ...) -> Self | None: ...

    @classmethod
    def of(cls, header: str | None, operation: str, body: str, tenant: str = DEFAULT_TENANT) -> Self | None:
        """None without a header. operation: what is asked of which object. Raises Unparseable (400)."""
        if header is None:
            return None
        if not 1 <= len(header) <= MAX_LENGTH or not all(" " < character <= "~" for character in header):
            raise Unparseable(
                f"{IDEMPOTENCY_KEY} must be 1 to {MAX_LENGTH} printable ASCII characters", param=IDEMPOTENCY_KEY
            )
        return cls(
            key=idempotency_key(sha256(f"{tenant}\0{header}".encode()).hexdigest()),
            digest=sha256(f"{operation}\0{body}".encode()).hexdigest(),
        )

    def answer(self, kept: str) -> str:
        """The earlier answer from what was kept. Raises InvalidField when the key came with another request."""
        digest, _, answer = kept.partition(" ")
        if digest != self.digest:
            raise InvalidField(
                f"this {IDEMPOTENCY_KEY} was used for another request",
                param=IDEMPOTENCY_KEY,
                code="idempotency_conflict",
            )
        return answer

    async def recall(self, pipe: Pipeline) -> str | None:
        """The earlier answer, None when there is none; watches the key, before `multi()`."""
        await pipe.watch(self.key)
        kept = cast("str | None", await pipe.get(self.key))
        return None if kept is None else self.answer(kept)

    def remember(self, pipe: Pipeline, answer: str) -> None:
        """Queue the answer with the writes it belongs to."""
        pipe.set(self.key, f"{self.digest} {answer}", ex=KEPT_SECONDS)


def once(
    idempotency: Idempotency | None,
    kind: type[RegistryRecord],
    change: Callable[[Pipeline], Awaitable[RegistryRecord]],
) -> Callable[[Pipeline], Awaitable[RegistryRecord]]:
    """For `transact`: a change that is carried out once under this key. What it returned is kept with its writes, and
    is what the same request gets again. idempotency: None, and it is carried out whenever it is asked for."""
    if idempotency is None:
        return change

    async def recalled_or_changed(pipe: Pipeline) -> RegistryRecord:
        if (earlier := await idempotency.recall(pipe)) is not None:
            return read_record(kind, earlier)
        changed = await change(pipe)
        idempotency.remember(pipe, changed.model_dump_json())
        return changed

    return recalled_or_changed

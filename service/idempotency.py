"""`Idempotency-Key`: the same key with the same request is answered again, not carried out again.

Owns: what a key may look like, the Redis key it becomes, and how an answer is kept beside the digest of its request
for 24 h. Does not own: the request; each operation recalls and remembers inside its own transaction or script.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Self, cast, overload

from redis.asyncio.client import Pipeline

from bon_algos.contracts import DEFAULT_TENANT, idempotency_key
from service.errors import InvalidField, Unparseable
from service.headers import IDEMPOTENCY_KEY

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

"""Asking for an erasure, and its receipt.

Owns: the record of what was asked. Does not own: the erasing (worker/erasing.py), which begins within seconds and works
until nothing is found any more.
"""

from __future__ import annotations

import re
from time import time
from typing import Annotated, Any, Final, cast

from pydantic import Field
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import ERASURES, Erasure, Record, erasure_id, subject_digest
from service.access import Caller
from service.audit import AuditChain
from service.errors import InvalidField, NotFound
from service.idempotency import Idempotency
from service.store import transact, translated

_ID: Final = re.compile(r"erasure_[0-9a-f]{32}")


class ErasureRequest(Record):
    """Body of `POST /ledger/erasures`."""

    user: Annotated[str, Field(min_length=1, max_length=256)]
    """As it stood in the requests; also the author of feedback."""


class ErasureBook:
    """The erasures of one Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def ask(self, asked: ErasureRequest, by: Caller, *, idempotency: Idempotency | None = None) -> Erasure:
        """The receipt: of one subject always the same. Asked again, but not with the same key, it is about all that was
        made until now, proven or not. Raises InvalidField for what names nobody, StoreUnavailable."""
        if set(asked.user) <= set(" *%?"):
            raise InvalidField("user must be the id of one user: there are no patterns", param="user")
        digest = subject_digest(by.tenant, asked.user)
        fresh = Erasure(
            id=erasure_id(digest),
            tenant=by.tenant,
            subject_digest=digest,
            requested_at=time(),
            requested_by=by.key_id,
        )

        async def change(pipe: Pipeline) -> Erasure:
            earlier = _read(await cast(Any, pipe.hget(ERASURES, fresh.id)))
            if idempotency is not None and await idempotency.recall(pipe) is not None and earlier is not None:
                return earlier
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            erasure = fresh if earlier is None else _again(earlier, fresh)
            pipe.hset(ERASURES, erasure.id, erasure.model_dump_json())
            audit.append(pipe, "erasure", by, erasure=erasure.id)
            if idempotency is not None:
                idempotency.remember(pipe, erasure.id)
            return erasure

        return await transact(self._redis, [ERASURES], change)

    async def get(self, name: str, by: Caller) -> Erasure:
        """Raises NotFound, also for another tenant's."""
        with translated():
            kept = await cast(Any, self._redis.hget(ERASURES, name)) if _ID.fullmatch(name) else None
        found = _read(kept)
        if found is None or found.tenant != by.tenant:
            raise NotFound("no such erasure", code="erasure_not_found")
        return found


def _again(earlier: Erasure, fresh: Erasure) -> Erasure:
    """What was found before stays on the receipt; and the time never goes back, whatever this gateway's clock says."""
    kept = {"erased": earlier.erased, "jobs": earlier.jobs, "policies": earlier.policies}
    return fresh.model_copy(update=kept | {"requested_at": max(earlier.requested_at, fresh.requested_at)})


def _read(kept: str | None) -> Erasure | None:
    return None if kept is None else Erasure.model_validate_json(kept)


def erasure_object(erasure: Erasure) -> dict[str, Any]:
    """The receipt of the API. The digest stays inside: it would tell who it is about to whoever can guess."""
    told = erasure.model_dump(mode="json", exclude={"tenant", "subject_digest"})
    return {"object": "bonsai.erasure", **told}

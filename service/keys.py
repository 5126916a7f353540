"""The API keys: made, listed, revoked, and known to every gateway within a second.

Owns: the record of a key, the rules for making and revoking one, the ring of keys that a request is held against
without I/O, the hour in which a key was last used. Does not own: the text of a key (api_key.py), reading it from a
request (authentication.py), what its holder may (access.py).

With Redis away the last ring serves. The admin key of the gateway's own file is in no Redis: it opens a gateway whose
Redis is empty, and it is replaced with the file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hmac import compare_digest
from pathlib import Path
from time import time
from typing import Annotated, Any, Final, cast

from pydantic import Field, ValidationError
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import (
    DEFAULT_TENANT,
    KEYS,
    KEYS_USED,
    ROUTES_INDEX,
    Record,
    Route,
    RouteName,
    Tenant,
    of_tenant,
    route_key,
)
from service.access import Caller, Role
from service.api_key import key_digest, key_id, new_key, public_part, read_admin_key
from service.audit import AuditChain
from service.errors import Conflict, Forbidden, InvalidField, KeyNotFound, StoreFull, StoreUnavailable, Unauthenticated
from service.store import transact, translated

REFRESH_SECONDS: Final = 1.0
MAX_KEYS: Final = 1000
FORMER_SECONDS: Final = 30 * 86_400
"""How long a key that is good no more is still listed, and told apart from one that never was."""
LONGEST_LIFE_SECONDS: Final = 10 * 366 * 86_400
_HOUR: Final = 3600
_NO_DIGEST: Final = "0" * 64
log = logging.getLogger("bonsai.keys")


class KeyRequest(Record):
    """Body of `POST /keys`."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    role: Role
    tenant: Tenant | None = None
    """None: the caller's own."""
    routes: tuple[RouteName, ...] | None = Field(None, fail_fast=True, min_length=1, max_length=100)
    expires_at: float | None = None
    """Seconds since the epoch."""
    store: bool = True
    """Whether the texts of its requests are kept where a request does not say."""


class KeyRecord(Record):
    """What is known of a key; the key itself is not."""

    id: str
    digest: str
    name: str
    role: Role
    tenant: str
    routes: tuple[str, ...] | None
    created_at: float
    created_by: str
    expires_at: float | None = None
    store: bool = True
    revoked_at: float | None = None

    def state(self, now: float) -> str:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"

    def is_forgotten(self, now: float) -> bool:
        ended = min(time for time in (self.revoked_at, self.expires_at, float("inf")) if time is not None)
        return ended + FORMER_SECONDS < now


def admin_record(file: Path, pepper: bytes) -> KeyRecord:
    """Of the key in the gateway's own file. Raises ValueError."""
    key = read_admin_key(file)
    return KeyRecord(
        id=cast(str, key_id(key)),
        digest=key_digest(key, pepper),
        name="the admin key file",
        role="admin",
        tenant=DEFAULT_TENANT,
        routes=None,
        created_at=file.stat().st_mtime,
        created_by="file",
    )


class KeyRing:
    """The keys as one gateway process knows them."""

    def __init__(self, redis: Redis, pepper: bytes, admin: KeyRecord) -> None:
        self._redis = redis
        self._pepper = pepper
        self._admin = admin
        self._records: Mapping[str, KeyRecord] = {admin.id: admin}
        self._rows: dict[str, str] = {}
        self._was_read = False
        self._refreshing = asyncio.Lock()
        self._used: dict[str, int] = {}
        self._unsaved: dict[str, int] = {}

    def caller(self, key: str) -> Caller:
        """Whose key it is. An unknown key takes the same work as a known one.

        Raises Unauthenticated, and StoreUnavailable for an unknown key before the first answer of Redis. Only who has
        all of the key is told that it is expired or revoked.
        """
        identity = key_id(key)
        record = None if identity is None else self._records.get(identity)
        is_right = compare_digest(key_digest(key, self._pepper), _NO_DIGEST if record is None else record.digest)
        if record is None or not is_right:
            if identity is not None and record is None and not self._was_read:
                raise StoreUnavailable("Redis has not answered yet: which keys there are is not known")
            raise Unauthenticated("the key is not known here", param="Authorization")
        now = time()
        state = record.state(now)
        if state != "active":
            raise Unauthenticated(f"the key is {state}", param="Authorization", code=f"{state}_key")
        self._note_use(record.id, int(now) // _HOUR * _HOUR)
        return Caller(record.id, record.tenant, record.role, record.routes, record.store)

    def _note_use(self, identity: str, hour: int) -> None:
        if self._used.get(identity) != hour:
            self._used[identity] = self._unsaved[identity] = hour

    async def refresh(self) -> None:
        """Read Redis now. Raises StoreUnavailable and leaves the ring as it was."""
        async with self._refreshing:  # a read that began earlier must not bring back what was revoked in between
            with translated():
                rows = cast("dict[str, str]", await self._redis.hgetall(KEYS))
            self._records = {**self._parsed(rows), self._admin.id: self._admin}
            self._rows, self._was_read = rows, True
            await self._save_uses()

    async def _save_uses(self) -> None:
        saving, self._unsaved = self._unsaved, {}
        try:
            with translated():
                if saving:
                    await self._redis.hset(KEYS_USED, mapping=cast("dict[Any, Any]", saving))
        except (StoreUnavailable, StoreFull):
            self._unsaved = {**saving, **self._unsaved}
            raise

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            try:
                await self.refresh()
            except (StoreUnavailable, StoreFull) as error:
                log.warning("the keys are as they were: %s", error.message)
            await asyncio.sleep(REFRESH_SECONDS)

    def _parsed(self, rows: Mapping[str, str]) -> dict[str, KeyRecord]:
        """A record is parsed again only when its text changed."""
        records: dict[str, KeyRecord] = {}
        for identity, row in rows.items():
            if self._rows.get(identity) == row and identity in self._records:
                records[identity] = self._records[identity]
            elif (record := _record(identity, row)) is not None:
                records[identity] = record
        return records


class Keys:
    """The keys of one Redis, and the file's."""

    def __init__(self, redis: Redis, ring: KeyRing, pepper: bytes, admin: KeyRecord, default_route: Route) -> None:
        """default_route: what a tenant's first route is like; a tenant begins with its first key."""
        self._redis = redis
        self._ring = ring
        self._pepper = pepper
        self._admin = admin
        self._default_route = default_route

    async def create(self, asked: KeyRequest, by: Caller) -> tuple[KeyRecord, str]:
        """The record and the key, which nobody will see again. Raises Forbidden, InvalidField, Conflict."""
        now, key = time(), new_key()
        tenant = asked.tenant or by.tenant
        _check(asked, tenant, by, now)
        record = KeyRecord(
            id=cast(str, key_id(key)),
            digest=key_digest(key, self._pepper),
            name=asked.name,
            role=asked.role,
            tenant=tenant,
            routes=asked.routes,
            created_at=now,
            created_by=by.key_id,
            expires_at=asked.expires_at,
            store=asked.store,
        )
        route = self._default_route.model_copy(update={"tenant": tenant})

        async def change(pipe: Pipeline) -> None:
            known = _records(cast("dict[str, str]", await pipe.hgetall(KEYS)))
            former = [one.id for one in known if one.is_forgotten(now)]
            if len(known) - len(former) >= MAX_KEYS:
                raise Conflict(f"there are {MAX_KEYS} keys already: revoke some", code="too_many_keys")
            is_new = tenant != DEFAULT_TENANT and not any(one.tenant == tenant for one in known)
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            for identity in former:
                pipe.hdel(KEYS, identity)
                pipe.hdel(KEYS_USED, identity)
            pipe.hset(KEYS, record.id, record.model_dump_json())
            if is_new:
                pipe.set(route_key(route.name, tenant), route.model_dump_json(), nx=True)
                pipe.sadd(ROUTES_INDEX, of_tenant(tenant, route.name))
            audit.append(pipe, "key_create", by, key=record.id, data=_told(record))

        await transact(self._redis, (KEYS,), change)
        with suppress(StoreUnavailable, StoreFull):
            # What is shown only once is shown, whatever happens to Redis now; the ring reads it within a second.
            await self._ring.refresh()
        return record, key

    async def all(self, by: Caller) -> list[dict[str, Any]]:
        """What the caller may see, newest first: an admin of the tenant `default` the keys of all tenants."""
        with translated():
            rows = cast("dict[str, str]", await self._redis.hgetall(KEYS))
            used = cast("dict[str, str]", await self._redis.hgetall(KEYS_USED))
        seen = [one for one in (*_records(rows), self._admin) if _sees(by, one)]
        newest_first = sorted(seen, key=lambda one: (one.created_at, one.id), reverse=True)
        return [key_object(one, used.get(one.id), time()) for one in newest_first]

    async def get(self, identity: str, by: Caller) -> dict[str, Any]:
        """Raises KeyNotFound."""
        found = next((one for one in await self.all(by) if one["id"] == identity), None)
        if found is None:
            raise KeyNotFound("no such key")
        return found

    async def revoke(self, identity: str, by: Caller) -> dict[str, Any]:
        """The key opens nothing any more, here at once, at other gateways within a second. Raises KeyNotFound, and
        Conflict where nobody could make another key afterwards."""
        if identity == self._admin.id and _sees(by, self._admin):
            raise Conflict("this is the key of the gateway's own file: replace the file", code="admin_key_file")

        async def change(pipe: Pipeline) -> None:
            known = {one.id: one for one in _records(cast("dict[str, str]", await pipe.hgetall(KEYS)))}
            record, now = known.get(identity), time()
            if record is None or not _sees(by, record):
                raise KeyNotFound("no such key")
            if record.revoked_at is not None:
                return
            if identity == by.key_id and not self._admin_left(known, record, now):
                raise Conflict("this is the last admin key of its tenant, and your own", code="last_admin_key")
            revoked = record.model_copy(update={"revoked_at": now})
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hset(KEYS, identity, revoked.model_dump_json())
            audit.append(pipe, "key_revoke", by, key=identity, data=_told(revoked))

        await transact(self._redis, (KEYS,), change)
        await self._ring.refresh()
        return await self.get(identity, by)

    def _admin_left(self, known: Mapping[str, KeyRecord], without: KeyRecord, now: float) -> bool:
        others = [self._admin, *(one for one in known.values() if one.id != without.id)]
        return any(
            one.role == "admin" and one.tenant == without.tenant and one.state(now) == "active" for one in others
        )


def key_object(record: KeyRecord, used: str | None, now: float) -> dict[str, Any]:
    """The key of the API, without the key."""
    return {
        "id": record.id,
        "object": "bonsai.key",
        "prefix": public_part(record.id),
        "status": record.state(now),
        **record.model_dump(mode="json", exclude={"id", "digest"}),
        "last_used_at": None if used is None else int(used),
    }


def _check(asked: KeyRequest, tenant: str, by: Caller, now: float) -> None:
    if tenant != by.tenant and by.tenant != DEFAULT_TENANT:
        raise Forbidden("this needs an admin key of the tenant default", param="tenant", code="tenant_forbidden")
    if asked.role == "admin" and asked.routes is not None:
        raise InvalidField("an admin key is good for all routes: leave routes out", param="routes")
    if asked.expires_at is not None and not now < asked.expires_at <= now + LONGEST_LIFE_SECONDS:
        raise InvalidField(
            "expires_at must lie in the future, at most ten years, in seconds since the epoch", param="expires_at"
        )


def _sees(by: Caller, record: KeyRecord) -> bool:
    return by.tenant in (DEFAULT_TENANT, record.tenant)


def _records(rows: Mapping[str, str]) -> Sequence[KeyRecord]:
    return [record for identity, row in rows.items() if (record := _record(identity, row)) is not None]


def _record(identity: str, row: str) -> KeyRecord | None:
    """One record of another version must not lock out everybody else."""
    try:
        return KeyRecord.model_validate_json(row)
    except ValidationError as error:
        log.error("key %s is unreadable: %d faults", identity, error.error_count())
        return None


def _told(record: KeyRecord) -> str:
    return record.model_dump_json(exclude={"digest"})

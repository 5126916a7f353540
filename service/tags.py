"""Tags: names of a tenant's own for its policies, which it moves as it likes.

Owns: what a tag may be called, moving and removing one, how many there may be. Does not own: what a tag is understood
as (`named_policy` is asked by whoever accepts a policy's id).
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from bon_algos.contracts import POLICIES_INDEX, TAGS, Record, of_tenant, own_names, policy_key
from service.access import Caller
from service.audit import AuditChain
from service.catalogue import Snapshot
from service.errors import Conflict, InvalidField, TagNotFound
from service.preconditions import ANY, Precondition
from service.registry import read_policy
from service.store import transact

MAX_TAGS: Final = 100
"""Of a tenant."""
TAG_PATTERN: Final = r"^(?!pol-)[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$"
RESERVED: Final = ("base", "live", "latest")
"""Words that stand for something else, or that would be believed to."""


class TagRequest(Record):
    """Body of `PUT /tags/{tag}`."""

    policy: str
    """An id, or another tag, which is looked up once."""


def checked_tag(tag: str) -> str:
    """Raises InvalidField."""
    if not re.fullmatch(TAG_PATTERN, tag) or tag in RESERVED:
        raise InvalidField(
            f"a tag is 1 to 64 of a-z, 0-9 and inner dots, hyphens and underscores, not pol-…, {', '.join(RESERVED)}",
            param="tag",
        )
    return tag


def named_policy(name: str, snapshot: Snapshot) -> str:
    """The id of the policy that a tag names, or the id itself."""
    return snapshot.tags.get(name, name)


def tag_object(tag: str, policy_id: str) -> dict[str, Any]:
    """The tag of the API."""
    return {"id": tag, "object": "bonsai.tag", "policy": policy_id}


class Tags:
    """The tags of one Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def put(self, tag: str, policy_id: str, by: Caller, *, precondition: Precondition = ANY) -> bool:
        """Have a tag name this policy; whether it is a new one. precondition: on the policy that it names now. Raises
        PolicyNotFound, Conflict, PreconditionFailed."""
        name = of_tenant(by.tenant, tag)

        async def change(pipe: Pipeline) -> bool:
            await read_policy(pipe, policy_id, by.tenant)
            tags = cast("dict[str, str]", await pipe.hgetall(TAGS))
            former = tags.get(name)
            precondition.require(former)
            if former is None and len(own_names(by.tenant, tags)) >= MAX_TAGS:
                raise Conflict(f"there are {MAX_TAGS} tags already: remove one", code="too_many_tags")
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hset(TAGS, name, policy_id)
            audit.append(pipe, "tag_put", by, tag=tag, policy=policy_id, data=_moved(former, policy_id))
            return former is None

        return await transact(self._redis, [TAGS, POLICIES_INDEX, policy_key(policy_id)], change)

    async def remove(self, tag: str, by: Caller, *, precondition: Precondition = ANY) -> None:
        """Raises TagNotFound, PreconditionFailed."""
        name = of_tenant(by.tenant, tag)

        async def change(pipe: Pipeline) -> None:
            former = cast("str | None", await pipe.hget(TAGS, name))
            if former is None:
                raise TagNotFound("no such tag")
            precondition.require(former)
            audit = await AuditChain.open(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hdel(TAGS, name)
            audit.append(pipe, "tag_remove", by, tag=tag, policy=former, data=_moved(former, None))

        await transact(self._redis, [TAGS], change)


def _moved(before: str | None, after: str | None) -> str:
    return json.dumps({"before": before, "after": after})

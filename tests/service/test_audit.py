"""The audit: a chain that shows where somebody changed, removed or moved an entry."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from bon_algos.audit_entries import GENESIS
from bon_algos.contracts import AUDIT_STREAM
from bonsai.registry.auditing import verified_audit
from service.access import Caller
from service.audit import Audit, AuditBroken, AuditChain, Entry, verified
from service.errors import InvalidField
from service.store import transact

pytestmark = pytest.mark.anyio
ANN, BOB = Caller("key_ann", "default", "admin"), Caller("key_bob", "acme", "admin")


async def note(redis: Redis, event: str, by: Caller = ANN, **fields: str) -> None:
    async def change(pipe):
        audit = await AuditChain.open(pipe)
        pipe.multi()
        audit.append(pipe, event, by, **fields)

    await transact(redis, [], change)


async def entries(redis: Redis) -> list[Entry]:
    return cast("list[Entry]", await redis.xrange(AUDIT_STREAM))


async def test_every_entry_holds_the_digest_of_the_one_before(redis):
    for event in ("one", "two", "three"):
        await note(redis, event, policy="pol-1")
    found = await entries(redis)
    assert [fields["previous"] for _, fields in found] == [GENESIS, *(fields["digest"] for _, fields in found[:2])]
    assert verified(found) == (3, found[-1][1]["digest"])
    assert verified([]) == (0, GENESIS)


async def test_entries_of_many_at_once_are_one_chain(redis):
    await asyncio.gather(*(note(redis, f"event {i}") for i in range(8)))
    assert verified(await entries(redis)).entries == 8


async def test_an_entry_that_was_changed_removed_or_moved_shows(redis):
    for event in ("one", "two", "three"):
        await note(redis, event)
    (a, first), (b, second), (c, third) = await entries(redis)
    with pytest.raises(AuditBroken, match=f"{b} was changed"):
        verified([(a, first), (b, {**second, "event": "nothing"}), (c, third)])
    with pytest.raises(AuditBroken, match=f"{b} was changed"):
        verified([(a, first), (b, {**second, "by": "somebody"}), (c, third)])
    for left in ([(a, first), (c, third)], [(b, second), (c, third)], [(a, first), (c, third), (b, second)]):
        with pytest.raises(AuditBroken, match="does not follow"):
            verified(left)


async def test_that_the_newest_are_gone_shows_to_whoever_kept_a_digest(redis, redis_url):
    await note(redis, "one")
    await note(redis, "two")
    with blocking_redis.Redis.from_url(redis_url, decode_responses=True) as client:
        head = verified_audit(client)
        assert verified_audit(client, contains=head.digest) == head
        [*_, (newest, _)] = await entries(redis)
        client.xdel(AUDIT_STREAM, newest)
        assert verified_audit(client).entries == 1
        with pytest.raises(AuditBroken, match="newest ones were removed"):
            verified_audit(client, contains=head.digest)


async def test_a_tenant_reads_its_own_entries_page_by_page(redis):
    for i in range(3):
        await note(redis, f"ann {i}", ANN, route="chat", data='{"before": null}')
        await note(redis, f"bob {i}", BOB)
    audit = Audit(redis)
    page, has_more = await audit.page("default", 2, None)
    assert ([row["event"] for row in page], has_more) == (["ann 0", "ann 1"], True)
    assert (page[0]["by"], page[0]["about"], page[0]["data"]) == ("key_ann", {"route": "chat"}, {"before": None})
    rest, has_more = await audit.page("default", 2, page[-1]["id"])
    assert ([row["event"] for row in rest], has_more) == (["ann 2"], False)
    with pytest.raises(InvalidField):
        await audit.page("default", 2, "yesterday")


def test_nothing_is_written_to_the_audit_but_through_the_chain():
    service = Path(__file__).parents[2] / "service"
    writers = [file.name for file in service.rglob("*.py") if "xadd(AUDIT_STREAM" in file.read_text()]
    assert writers == ["audit.py"]

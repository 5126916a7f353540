"""Pages of `GET /ledger` behind a busy stretch: each goes on, and late rewards are joined wherever they stand."""

from __future__ import annotations

from pathlib import Path
from zlib import compress

import pytest
import redis as blocking_redis

from archive.reading import Archive
from bon_algos.contracts import LEDGER_STREAM, CandidateGroup, Outcome
from bon_algos.ledger_entries import EntryId
from service.access import GATEWAY
from service.ledger_pages import MOST_ENTRIES, OUTCOME_MILLISECONDS, LedgerPages
from service.ledger_query import LedgerQuery, cursor_text
from service.store import open_redis
from tests.service.records import REWARD_MODEL, group
from worker.compaction import Compaction, Limits

pytestmark = pytest.mark.anyio
SECRET = bytes(32)
ALL = LedgerQuery(limit=10)
NONE_HOT = Limits(entries=2, bytes=2**20, seconds=0.0, hot_groups=0, hot_seconds=0.0)


def numbered(number: int, reward: float | None = 0.0) -> CandidateGroup:
    return group([(reward, 1)]).model_copy(update={"id": f"resp_{number}"})


def outcome(of: CandidateGroup, reward: float) -> Outcome:
    return Outcome(
        id=f"out_{of.id}", created_at=of.created_at, group_id=of.id, route=of.route, arm=of.arm,
        arm_reason=of.arm_reason, reward_model_id=REWARD_MODEL, rewards=(reward,), experiment=None,
    )  # fmt: skip


def deliver(client: blocking_redis.Redis, ms: int, record: CandidateGroup | Outcome, times: int = 1) -> None:
    data = compress(record.model_dump_json().encode())
    with client.pipeline(transaction=False) as pipe:
        for number in range(times):
            pipe.xadd(LEDGER_STREAM, {"kind": record.kind, "id": record.id, "data": data}, id=f"{ms}-{number + 1}")
        pipe.execute()


async def page(redis_url: str, archive: Path, cursor: EntryId | None) -> tuple[dict[str, float | None], str | None]:
    """The ids and rewards of the page behind an entry, and the next cursor."""
    text = None if cursor is None else cursor_text(cursor, ALL, "default", SECRET)
    async with open_redis(redis_url, in_bytes=True) as redis:
        found = await LedgerPages(redis, Archive.at(str(archive)), SECRET).page(ALL, text, GATEWAY)
    return {row.group.id: row.group.candidates[0].reward for row in found.rows}, found.next_cursor


async def test_a_page_goes_on_however_much_was_delivered_right_behind_the_cursor(
    redis_url: str, tmp_path: Path
) -> None:
    with blocking_redis.Redis.from_url(redis_url) as client:
        deliver(client, 1000, numbered(1))
        deliver(client, 2000, numbered(2))
        deliver(client, 2000 + OUTCOME_MILLISECONDS - 1, numbered(3), times=MOST_ENTRIES + 500)
    assert await page(redis_url, tmp_path, EntryId(2000, 1)) == ({"resp_1": 0.0}, None)


@pytest.mark.parametrize("place", ["stream", "archive", "archive, and more arrives"])
async def test_a_reward_that_was_delivered_before_the_cursor_is_joined(
    redis_url: str, tmp_path: Path, place: str
) -> None:
    """In the stream's order: the group, the cursor, the group's outcome."""
    late = numbered(1, reward=None)
    with blocking_redis.Redis.from_url(redis_url) as client:
        deliver(client, 1000, numbered(0))
        deliver(client, 1001, late)
        deliver(client, 2000, numbered(2))
        deliver(client, 2001, outcome(late, 2.5))
        compaction = Compaction(client, Archive.at(str(tmp_path)), NONE_HOT)
        compaction.open()
        if place != "stream":
            while compaction.step(wait_seconds=0.01) is not None:
                pass
        if place == "archive, and more arrives":
            deliver(client, 2002, numbered(3))
    assert await page(redis_url, tmp_path, EntryId(2000, 1)) == ({"resp_1": 2.5, "resp_0": 0.0}, None)

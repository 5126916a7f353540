"""What a gateway tells of its spool while a request is under way: an erasure that trusts it meets no record later."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis as blocking_redis
from redis.asyncio import Redis

from bon_algos.contracts import SPOOLS
from service import spool_report
from service.ledger import Ledger
from service.loops import running_loops
from service.spool import Spool
from service.spool_report import SpoolReport
from tests.fixtures.gateway import World, read_ledger
from tests.fixtures.waiting import wait_until


@pytest.mark.anyio
async def test_nothing_older_is_told_of_before_the_earliest_request_under_way(tmp_path: Path, redis: Redis):
    ledger = Ledger(Spool(tmp_path, 2**20), redis)
    report = SpoolReport(redis, ledger, "mine")

    async def told() -> float:
        await report.tell()
        return float(await redis.hget(SPOOLS, "mine") or 0)

    async with running_loops(ledger.run(lambda unmeasured: None)):
        with ledger.awaits(7.0):
            with ledger.awaits(5.0):
                assert await told() == 5.0
            assert await told() == 7.0
        assert await told() > 7.0


@pytest.fixture
def told_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_report, "SECONDS", 0.01)


@pytest.mark.usefixtures("told_often")
def test_a_reply_arrives_with_no_time_that_was_called_clean_before(redis_url: str, request: pytest.FixtureRequest):
    world: World = request.getfixturevalue("world")  # after the gateway was told to hurry
    world.engine.script.delays = [0.5]
    told: list[float] = []
    with ThreadPoolExecutor(1) as pool, blocking_redis.Redis.from_url(redis_url) as store:

        def latest() -> float:
            return float(next(iter(store.hgetall(SPOOLS).values()), 0.0))

        wait_until(lambda: latest() > 0)
        reply = pool.submit(world.client.post, "/generate", {"prompt": "p", "n": 1})
        while not (arrived := read_ledger(redis_url)):
            told.append(latest())
            if read_ledger(redis_url):  # it may have arrived between the two looks
                told.pop()
        assert reply.result().status == 200
        assert told
        assert max(told) <= arrived[0].created_at
        wait_until(lambda: latest() > arrived[0].created_at)

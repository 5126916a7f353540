"""An erasure that is asked for again while the first is not proven: what was made in between goes as well."""

from __future__ import annotations

from pathlib import Path
from time import time

import pytest
import redis as blocking_redis

from archive.reading import Archive
from bon_algos.contracts import LEDGER_STREAM, SPOOLS
from service.access import GATEWAY
from service.erasures import ErasureBook, ErasureRequest
from service.store import open_redis
from tests.service.records import group
from tests.worker import world
from worker.erasing import Eraser

pytestmark = pytest.mark.anyio
ASKED = ErasureRequest(user="ada")


async def test_a_second_request_is_about_all_that_was_made_until_then(redis_url: str, tmp_path: Path) -> None:
    with blocking_redis.Redis.from_url(redis_url) as client:
        eraser = Eraser(client, Archive.at(str(tmp_path / "ledger")), tmp_path)
        async with open_redis(redis_url) as redis:
            first = await ErasureBook(redis).ask(ASKED, GATEWAY)
            client.hset(SPOOLS, "gateway", str(first.requested_at - 1))
            [held_up] = eraser.work()
            assert (held_up.state, eraser.has_work()) == ("erased", False)
            of_ada = group([(1.0, 2)]).model_copy(update={"id": "resp_later", "user": "ada", "created_at": time()})
            world.deliver(client, of_ada)
            again = await ErasureBook(redis).ask(ASKED, GATEWAY)
        assert (again.id, again.state) == (first.id, "requested")
        assert first.requested_at < of_ada.created_at <= again.requested_at
        client.hset(SPOOLS, "gateway", str(again.requested_at + 1))
        [proven] = eraser.work()
        assert (proven.state, proven.erased.groups) == ("proven", 1)
        assert client.xlen(LEDGER_STREAM) == 0

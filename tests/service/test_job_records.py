"""Jobs beside the artefacts: written whatever happens to them, later where the disk is away, never back in time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from bon_algos.contracts import LEDGER_COUNTS, UNRECORDED_JOBS, job_key
from service.job_records import DIRECTORY, JobFile, JobRecords
from service.job_scripts import Wish
from service.jobs import Jobs
from service.store import open_redis
from tests.service.records import job_spec

pytestmark = pytest.mark.anyio


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with open_redis(redis_url) as client:
        await client.hset(LEDGER_COUNTS, "default", "100")
        yield client


@pytest.fixture
def jobs(redis: Redis) -> Jobs:
    return Jobs(redis, n_cap=64, max_lora_rank=32)


@pytest.fixture
def records(redis: Redis, tmp_path: Path) -> JobRecords:
    return JobRecords(redis, tmp_path)


def recorded(artefacts: Path, job_id: str) -> dict[str, str]:
    return JobFile.model_validate_json((artefacts / DIRECTORY / f"{job_id}.json").read_bytes()).fields


async def test_each_wish_and_move_is_recorded_and_then_forgotten(jobs: Jobs, records: JobRecords, redis, tmp_path):
    job_id = (await jobs.submit(job_spec())).job_id
    steps: list[tuple[Wish | None, str]]
    steps = [(None, "queued"), ("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")]
    for wish, state in steps:
        if wish is not None:
            await jobs.grant(wish, job_id)
        assert await redis.smembers(UNRECORDED_JOBS) == {job_id}
        await records.write()
        assert recorded(tmp_path, job_id) == await redis.hgetall(job_key(job_id))
        assert recorded(tmp_path, job_id)["state"] == state
        assert await redis.smembers(UNRECORDED_JOBS) == set()


async def test_what_the_disk_does_not_take_is_told_and_written_later(
    jobs: Jobs, records: JobRecords, redis, tmp_path, caplog
):
    """Of two jobs one has a directory in its place."""
    hindered, other = [(await jobs.submit(job_spec())).job_id for _ in range(2)]
    in_its_place = tmp_path / DIRECTORY / f"{hindered}.json"
    in_its_place.mkdir(parents=True)
    await records.write_promptly(hindered)
    assert f"job {hindered} is not recorded" in caplog.text
    with pytest.raises(OSError, match="directory"):
        await records.write()
    assert recorded(tmp_path, other)["state"] == "queued"
    assert await redis.smembers(UNRECORDED_JOBS) == {hindered}
    in_its_place.rmdir()
    await records.write()
    assert recorded(tmp_path, hindered)["state"] == "queued"


@pytest.mark.parametrize(
    ("kept", "late"),
    [
        ({"state": "succeeded", "epoch": "1"}, {"state": "running", "epoch": "1"}),
        ({"state": "running", "epoch": "10"}, {"state": "running", "epoch": "9"}),
    ],
)
async def test_a_gateway_that_stood_still_does_not_write_over_what_is_newer(records, redis, tmp_path, kept, late):
    job_id = "job_" + "1" * 32
    for fields in (kept, late):
        await redis.hset(job_key(job_id), mapping=fields)
        await redis.sadd(UNRECORDED_JOBS, job_id)
        await records.write()
    assert recorded(tmp_path, job_id) == kept


async def test_what_happens_while_a_job_is_written_is_written_next(redis_url: str, jobs: Jobs, redis, tmp_path):
    class Slow(Redis):
        """Between the look at a queued job and its record the job is cancelled."""

        async def hgetall(self, name: str) -> Any:  # type: ignore[override]
            found = await super().hgetall(name)
            if found["state"] == "queued":
                await jobs.grant("cancel", name.removeprefix(job_key("")))
            return found

    job_id = (await jobs.submit(job_spec())).job_id
    async with Slow.from_url(redis_url, decode_responses=True) as slow:
        records = JobRecords(slow, tmp_path)
        await records.write()
        assert await redis.smembers(UNRECORDED_JOBS) == {job_id}
        await records.write()
    assert (recorded(tmp_path, job_id)["state"], await redis.smembers(UNRECORDED_JOBS)) == ("cancelled", set())

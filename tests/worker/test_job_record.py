"""What Redis knows of a job, kept beside its files."""

from __future__ import annotations

import json
from pathlib import Path

import redis

from bon_algos.contracts import job_key
from tests.fixtures.redis import RedisServer
from worker.job_record import JOB_FILE, keep

JOB = "job_" + "1" * 32


def kept(artefacts: Path) -> dict[str, str]:
    return dict(json.loads((artefacts / "jobs" / JOB / JOB_FILE).read_text())["fields"])


def test_the_file_holds_every_field_as_it_is_now(redis_url: str, tmp_path: Path):
    with redis.Redis.from_url(redis_url) as client:
        for state in ("running", "succeeded"):
            client.hset(job_key(JOB), mapping={"state": state, "spec": "{}"})
            keep(client, tmp_path, JOB)
            assert kept(tmp_path) == {"state": state, "spec": "{}"}
    assert [file.name for file in (tmp_path / "jobs" / JOB).iterdir()] == [JOB_FILE]


def test_without_redis_or_its_job_the_file_stays_as_it_was(own_redis: RedisServer, tmp_path: Path):
    with redis.Redis.from_url(own_redis.url) as client:
        client.hset(job_key(JOB), mapping={"state": "running"})
        keep(client, tmp_path, JOB)
        client.flushall()
        keep(client, tmp_path, JOB)
        own_redis.kill()
        keep(client, tmp_path, JOB)
    assert kept(tmp_path) == {"state": "running"}

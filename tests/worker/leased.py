"""A job and its lease, without anything that is trained. A real Redis; time passes on its clock."""

import pytest
import redis

from bon_algos.contracts import PolicyRecord, job_key
from worker.lease import Lease, claim

JOB = "job_0"
POLICY = PolicyRecord(id="pol-0123456789abcdef", kind="lora", state="candidate", created_at=7.0, n_equivalent=16)


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        yield connection


def submit(client, state="queued", **fields):
    client.hset(job_key(JOB), mapping={"state": state, "epoch": 0, "attempts": 0, **fields})


def take(client, seconds=60.0, processes=1):
    return claim(client, JOB, lease_seconds=seconds, worker="here:1", processes=processes)


def held(client, own, lease_seconds=60.0, heartbeat_seconds=60.0):
    return Lease(client, JOB, own, lease_seconds=lease_seconds, heartbeat_seconds=heartbeat_seconds)


def expire(client):
    """What the passing of time does to a lease."""
    client.hset(job_key(JOB), "lease_until", 1)


def field(client, name):
    return client.hget(job_key(JOB), name)

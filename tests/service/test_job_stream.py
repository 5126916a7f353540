"""A job's events as they happen: in order, from any event on, until its end, and for nobody who has left."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis as blocking_redis

from bon_algos.contracts import LEDGER_COUNTS
from service import job_stream
from service.job_stream import STREAMS_OF_A_KEY
from tests.fixtures.gateway import World, gateway_settings
from tests.fixtures.process import gateway_process
from tests.fixtures.waiting import wait_until
from tests.service.records import STUDENT, policy
from tests.stubs.server import running
from worker.lease import Lease, claim

JOB = {"n": 2, "method": {"type": "bon_sft", "bon_sft": {"n": 2, "steps": 3}}}


@pytest.fixture
def job_id(world: World, store: blocking_redis.Redis) -> str:
    return str(world.client.post("/distill", JOB).json["id"])


def taken(store: blocking_redis.Redis, job_id: str) -> Lease:
    own = claim(store, job_id, lease_seconds=60, worker="here:1")
    assert not isinstance(own, str)
    return Lease(store, job_id, own, lease_seconds=60, heartbeat_seconds=60)


class Stream:
    """One connection that reads events."""

    def __init__(self, world: World, job_id: str, headers: dict[str, str], query: str = "?stream=true") -> None:
        self._connection = http.client.HTTPConnection(*world.client.address, timeout=10)
        sent = {"Authorization": f"Bearer {world.client.key}", **headers}
        self._connection.request("GET", f"/v1/fine_tuning/jobs/{job_id}/events{query}", headers=sent)
        self.response = self._connection.getresponse()

    def next(self) -> tuple[str, dict[str, Any]]:
        """Id and event."""
        read = self._read()
        assert read is not None, "the stream has ended"
        return read

    def rest(self) -> list[tuple[str, dict[str, Any]]]:
        return list(iter(self._read, None))

    def _read(self) -> tuple[str, dict[str, Any]] | None:
        event_id = ""
        while line := self.response.readline():
            name, _, value = line.decode().rstrip().partition(": ")
            if name == "id":
                event_id = value
            if name == "data":
                return event_id, json.loads(value)
        return None

    def close(self) -> None:
        self.response.close()
        self._connection.close()


@contextmanager
def following(
    world: World, job_id: str, last: str | None = None, query: str = "?stream=true", **headers: str
) -> Iterator[Stream]:
    stream = Stream(world, job_id, headers | ({} if last is None else {"Last-Event-ID": last}), query)
    try:
        yield stream
    finally:
        stream.close()


def test_events_come_as_they_happen_and_the_stream_ends_with_the_job(world, store, job_id):
    with following(world, job_id) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        first = stream.next()
        assert (first[0], first[1]["message"]) == (first[1]["id"], "The job is queued.")
        lease = taken(store, job_id)
        assert stream.next()[1]["message"] == "Attempt 1 has begun."
        lease.progress("training", 2, 3, {"loss": 0.5}, None)
        assert stream.next()[1]["data"]["metrics"] == {"loss": 0.5}
        lease.finish_succeeded(policy(STUDENT), "{}")
        [(_, last)] = stream.rest()
        assert last["data"]["status"] == "succeeded"
    listed = world.client.get(f"/distill/{job_id}/events").json["data"]
    assert listed[-1] == last


def test_a_stream_goes_on_behind_the_last_event_that_was_read(world, store, job_id):
    with following(world, job_id, query="", Accept="text/event-stream") as stream:
        read = stream.next()[0]
    lease = taken(store, job_id)
    lease.finish_failed("code", "words")
    with following(world, job_id, read) as stream:
        rest = stream.rest()
    assert [event["data"]["status"] for _, event in rest] == ["running", "failed"]
    with following(world, job_id, rest[-1][0]) as stream:
        # The answer that tells a browser's EventSource not to come again.
        assert stream.response.status == 204


def test_a_paused_job_keeps_its_followers(world, store, job_id):
    with following(world, job_id) as stream:
        world.client.request("POST", f"/distill/{job_id}/pause")
        assert [stream.next()[1]["data"]["status"] for _ in range(2)] == ["queued", "paused"]
        world.client.request("POST", f"/distill/{job_id}/cancel")
        assert [event["data"]["status"] for _, event in stream.rest()] == ["cancelled"]


@pytest.mark.parametrize(
    ("query", "last", "param"),
    [
        ("?stream=true", "garbage", "after"),
        ("?stream=true", "9" * 19 + "-0", "after"),
        ("?stream=true&after=x", None, "after"),
        ("?stream=true&limit=5", None, "limit"),
        ("?stream=yes", None, "stream"),
        ("?stream=", None, "stream"),
    ],
)
def test_a_stream_from_nowhere_is_refused(world, job_id, query, last, param):
    with following(world, job_id, last, query) as stream:
        body = json.loads(stream.response.read())
        assert (stream.response.status, body["error"]["param"]) == (422, param)


def test_a_key_has_so_many_streams_and_one_that_leaves_makes_room(world, job_id):
    streams = [Stream(world, job_id, {}) for _ in range(STREAMS_OF_A_KEY)]
    try:
        assert {stream.response.status for stream in streams} == {200}
        with following(world, job_id) as refused:
            assert refused.response.status == 429
            assert refused.response.headers["retry-after"] == "1"
            assert json.loads(refused.response.read())["error"]["code"] == "rate_limit_exceeded"
        streams.pop().close()

        def is_let_in() -> bool:
            with following(world, job_id) as stream:
                return stream.response.status == 200

        wait_until(is_let_in)
    finally:
        for stream in streams:
            stream.close()


def test_who_left_holds_no_connection_to_redis(world, store, job_id):
    def waiting() -> int:
        return sum(client["cmd"] == "xread" for client in store.client_list())

    streams = [Stream(world, job_id, {}) for _ in range(3)]
    wait_until(lambda: waiting() == 3)
    for stream in streams:
        stream.close()
    wait_until(lambda: waiting() == 0)


def test_a_silent_stream_is_kept_alive(world, job_id, monkeypatch):
    monkeypatch.setattr(job_stream, "KEEP_ALIVE_SECONDS", 0.0)
    with following(world, job_id) as stream:
        stream.next()
        assert [stream.response.readline() for _ in range(3)] == [b"\n", b": ping\n", b"\n"]


@pytest.fixture
def apart(tmp_path, engine, reward, own_redis, unused_port):
    """A gateway in a process of its own, over a Redis that may be killed, and a job on it."""
    with (
        running(engine.app()) as engine_url,
        running(reward.app()) as reward_url,
        blocking_redis.Redis.from_url(own_redis.url) as store,
    ):
        store.hset(LEDGER_COUNTS, "default", "100")
        settings = gateway_settings(tmp_path, engine_url, reward_url, own_redis.url)
        with gateway_process(settings, unused_port) as (process, client):
            wait_until(lambda: client.post("/distill", JOB).status == 202)
            job_id = client.get("/distill").json["data"][0]["id"]
            yield process, World(client, engine, reward, own_redis.url), job_id


@pytest.mark.slow
def test_a_gateway_that_shuts_down_lets_its_followers_go(apart):
    """They come again elsewhere with the id they have; nothing waits for a job of days."""
    process, world, job_id = apart
    with following(world, job_id) as stream:
        stream.next()
        process.send_signal(signal.SIGTERM)
        assert stream.rest() == []
    assert process.wait(10) == 0


@pytest.mark.slow
def test_redis_going_away_ends_a_stream_with_the_reason(apart, own_redis):
    _, world, job_id = apart
    with following(world, job_id) as stream:
        stream.next()
        own_redis.kill()
        _, told = stream.next()
        assert told["error"]["code"] == "store_unavailable"
        assert stream.rest() == []

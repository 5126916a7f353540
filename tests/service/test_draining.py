"""SIGTERM under load: what was accepted is answered and in the ledger, what comes after is sent elsewhere (F46)."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from bon_algos.contracts import CandidateGroup, Outcome
from tests.fixtures.gateway import Client, Reply, gateway_settings, read_ledger
from tests.fixtures.process import gateway_process
from tests.fixtures.waiting import wait_until
from tests.stubs.server import running

pytestmark = pytest.mark.slow
HI = {"prompt": "hi", "max_tokens": 10}
STREAMED = {"model": "default", "prompt": "hi", "max_tokens": 10, "best_of": 2, "stream": True}


@pytest.fixture
def settings_with(tmp_path, engine, reward, redis_url):
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        yield lambda **more: gateway_settings(tmp_path, engine_url, reward_url, redis_url, **more)


def log_id_of(reply: Reply) -> str:
    """Of a whole reply or of a stream that came to its end."""
    if reply.headers["content-type"].startswith("application/json"):
        return str(reply.json["id"])
    events = [line[6:] for line in reply.body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return str(json.loads(events[-2])["bonsai"]["log_id"])


def asked(client: Client, number: int) -> Reply:
    """By turns best-of-2, a single sample and a stream."""
    paths = [("/generate?n=2", HI), ("/generate?n=1", HI), ("/v1/completions", STREAMED)]
    return client.post(*paths[number % 3])


@contextmanager
def idle_connection(client: Client) -> Iterator[socket.socket]:
    """A keep-alive connection that had one answer."""
    with socket.create_connection(client.address, timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += connection.recv(65_536)
        yield connection


def test_sigterm_under_load_loses_nothing_that_was_accepted(settings_with, engine, redis_url, unused_port):
    """36 requests, of which some run and the others wait; then SIGTERM."""
    engine.script.delays = [2.0]
    settings = settings_with(max_tokens_in_flight=12 * 22)
    with gateway_process(settings, unused_port) as (process, client), ThreadPoolExecutor(36) as pool:
        under_way = [pool.submit(asked, client, number) for number in range(36)]
        wait_until(lambda: _open(client) == 36)
        assert client.get("/ready").json["limits"]["requests_waiting"] > 0
        with idle_connection(client) as idle:
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/ready").status == 503)
            _assert_sent_elsewhere(client, idle)
            assert not all(reply.done() for reply in under_way)
        replies = [reply.result(timeout=60) for reply in under_way]
        assert process.wait(30) == 0
    assert [reply.status for reply in replies] == [200] * 36
    records = read_ledger(redis_url)
    logged = {record.id for record in records if isinstance(record, CandidateGroup)}
    assert logged == {log_id_of(reply) for reply in replies}
    assert len(logged) == 36
    # The rewards of the 12 single samples were measured before the end.
    rewards = [record.rewards for record in records if isinstance(record, Outcome)]
    assert len(rewards) == 12
    assert None not in [reward for measured in rewards for reward in measured]


def _open(client: Client) -> int:
    limits = client.get("/ready").json["limits"]
    return int(limits["requests_in_flight"] + limits["requests_waiting"])


def _assert_sent_elsewhere(client: Client, idle: socket.socket) -> None:
    refused = client.post("/generate?n=2", HI)
    assert refused.json["error"]["code"] == "shutting_down"
    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    assert client.get("/ready").status == 503
    assert client.get("/health").status == 200
    idle.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while piece := idle.recv(65_536):
        answer += piece
    assert answer.startswith(b"HTTP/1.1 503 ")


def test_an_idle_gateway_ends_at_once(settings_with, unused_port):
    with gateway_process(settings_with(), unused_port) as (process, client), idle_connection(client):
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_after_the_shutdown_time_the_rest_is_cut(settings_with, engine, unused_port):
    engine.script.fault = "silent"
    settings = settings_with(shutdown_seconds=1)
    with gateway_process(settings, unused_port) as (process, client), ThreadPoolExecutor(1) as pool:
        cut = pool.submit(client.post, "/generate?n=2", HI)
        wait_until(lambda: engine.active == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        wait_until(lambda: engine.active == 0)
        assert cut.result(timeout=10).status == 500


def test_a_second_sigterm_ends_it_at_once(settings_with, engine, unused_port):
    engine.script.fault = "silent"
    with gateway_process(settings_with(), unused_port) as (process, client), ThreadPoolExecutor(1) as pool:
        pool.submit(client.post, "/generate?n=2", HI)
        wait_until(lambda: engine.active == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/ready").status == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


def test_without_redis_what_was_accepted_waits_on_the_disk(tmp_path, engine, reward, own_redis, unused_port):
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(tmp_path, engine_url, reward_url, own_redis.url)
        with gateway_process(settings, unused_port) as (process, client):
            own_redis.kill()
            served = client.post("/generate?n=2", HI).json["id"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        own_redis.start()
        with gateway_process(settings, unused_port):
            wait_until(lambda: [record.id for record in read_ledger(own_redis.url)] == [served])

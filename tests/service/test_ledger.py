"""From the spool into Redis: once, in order, whoever dies in between."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from bon_algos.contracts import (
    LEDGER_COUNTS,
    Arm,
    CandidateGroup,
    Message,
    Outcome,
    Sampling,
    ToolCall,
    experiment_stats_key,
)
from service.ledger import Ledger
from service.settings import GatewaySettings
from service.spool import Spool
from service.store import open_redis
from tests.fixtures.gateway import environment_of, gateway_settings, read_ledger, running_gateway
from tests.fixtures.process import gateway_process
from tests.fixtures.waiting import wait_until
from tests.service.records import group
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running

HI = {"prompt": "hi"}


def numbered_groups(count: int) -> list[CandidateGroup]:
    one = group([(1.0, 3), (2.0, 4)])
    return [one.model_copy(update={"id": f"resp_{i}"}) for i in range(count)]


def deliver(directory: Path, redis_url: str, records: Sequence[CandidateGroup]) -> float:
    """Append the records, drain everything the directory holds, as one gateway process; seconds the draining took."""

    async def process() -> float:
        spool = Spool(directory, 2**30)
        async with open_redis(redis_url) as connection:
            ledger = Ledger(spool, connection)
            for record in records:
                assert ledger.append(record)
            started = time.monotonic()
            drainer = asyncio.create_task(ledger.run(lambda unmeasured: None))
            await ledger.drain(60)
            assert ledger.status.pending_bytes == 0
            drainer.cancel()
        spool.close()
        return time.monotonic() - started

    return asyncio.run(process())


def ids(redis_url: str) -> list[str]:
    return [record.id for record in read_ledger(redis_url)]


# --- the drainer ------------------------------------------------------------------------------------------


def test_records_arrive_as_they_were_in_their_order(tmp_path, redis_url):
    groups = numbered_groups(300)
    deliver(tmp_path, redis_url, groups)
    assert read_ledger(redis_url) == groups


def test_a_group_arrives_with_all_that_it_has_but_alternatives(tmp_path, redis_url):
    call = ToolCall(id="call_1", name="find", arguments='{"é": "\\ud83c\\udfac\\n"}')
    sampling = Sampling(max_tokens=4, stop=("\n",), logit_bias=((5, -1e-7),), seed=2**63 - 1, json_schema='{"a": 1}')
    messages = (Message(role="assistant", content="🎬", tool_calls=(call,)),)
    logged = group([(1e-7, 3), (-1e22, 4)]).model_copy(
        update={"messages": messages, "sampling": sampling, "tags": ("a", "b"), "gain_missed": 0.1}
    )
    drawn = [one.model_copy(update={"alternatives": (((7, -1.0),),)}) for one in logged.candidates]
    deliver(tmp_path, redis_url, [logged.model_copy(update={"candidates": tuple(drawn)})])
    assert read_ledger(redis_url) == [logged]


def test_what_is_read_twice_is_delivered_once_and_counted_once(tmp_path, redis_url):
    """The process died between delivering and writing its cursor down."""
    arm = Arm(policy=numbered_groups(1)[0].policy_id, n=2)
    counted = group([(1.0, 3), (2.0, 4)], arm, experiment="exp_1", arm_reason="experiment", selected=1)
    deliver(tmp_path, redis_url, [counted])
    (tmp_path / "cursor").unlink()
    deliver(tmp_path, redis_url, [])
    assert ids(redis_url) == [counted.id]
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        statistics = connection.hgetall(experiment_stats_key("exp_1"))
        counts = connection.hgetall(LEDGER_COUNTS)
    assert (statistics[f"{arm}|answers"], statistics[f"{arm}|reward_sum"]) == ("1", "2")
    assert counts == {"default": "1"}


def test_only_groups_a_method_can_learn_from_are_counted(tmp_path, redis_url):
    usable, lost, single, unstored = numbered_groups(4)
    failed = lost.candidates[0].model_copy(update={"reward": None, "failure": "empty"})
    groups = [
        usable,
        lost.model_copy(update={"candidates": (failed, lost.candidates[1])}),
        single.model_copy(update={"requested": 1, "candidates": single.candidates[:1]}),
        unstored.model_copy(update={"store": False}),
    ]
    deliver(tmp_path, redis_url, groups)
    assert len(ids(redis_url)) == 4
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        assert connection.hget(LEDGER_COUNTS, "default") == "1"


def test_nobody_waits_for_a_redis_that_is_away(tmp_path):
    async def process() -> None:
        spool = Spool(tmp_path / "spool", 2**30)
        async with open_redis(f"unix://{tmp_path}/no-redis.sock") as connection:
            ledger = Ledger(spool, connection)
            ledger.append(numbered_groups(1)[0])
            drainer = asyncio.create_task(ledger.run(lambda unmeasured: None))
            async with asyncio.timeout(10):
                while ledger.status.redis != "away":
                    await asyncio.sleep(0.005)
            async with asyncio.timeout(1):
                await ledger.drain(60)
            assert ledger.status.pending_bytes > 0
            drainer.cancel()
        spool.close()

    asyncio.run(process())


@pytest.mark.slow
def test_10_000_groups_drain_within_10_s(tmp_path, redis_url):
    assert deliver(tmp_path, redis_url, numbered_groups(10_000)) < 10
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.xlen("bonsai:ledger") == 10_000


# --- a gateway in this process, Redis coming and going ----------------------------------------------------


@contextmanager
def stubs(tmp_path: Path, redis_url: str, **more: object) -> Iterator[tuple[GatewaySettings, StubEngine, StubReward]]:
    engine, reward = StubEngine("pol-" + "0" * 16), StubReward("rm-" + "2" * 16)
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        yield gateway_settings(tmp_path, engine_url, reward_url, redis_url, **more), engine, reward


@pytest.mark.slow
def test_without_redis_serving_goes_on_and_everything_arrives_once_in_order(tmp_path, own_redis):
    with stubs(tmp_path, own_redis.url) as (settings, _, _), running_gateway(settings) as client:
        wait_until(lambda: client.get("/ready").json["status"] == "ready")
        own_redis.kill()
        served = [client.post("/generate?n=2", HI).json["id"] for _ in range(100)]
        ready = client.get("/ready")
        assert (ready.status, ready.json["status"], ready.json["redis"]) == (200, "degraded", "away")
        own_redis.start()
        wait_until(lambda: len(ids(own_redis.url)) >= 100)
        wait_until(lambda: client.get("/ready").json["status"] == "ready")
    assert ids(own_redis.url) == served


def test_a_redis_that_hangs_delays_no_answer(tmp_path, own_redis):
    with stubs(tmp_path, own_redis.url) as (settings, _, _), running_gateway(settings) as client:
        wait_until(lambda: client.get("/ready").json["status"] == "ready")
        own_redis.freeze()
        try:
            for _ in range(5):
                started = time.monotonic()
                assert client.post("/generate?n=2", HI).status == 200
                # Redis is given 2 s for an answer; a request that waited for it would take at least that.
                assert time.monotonic() - started < 1
        finally:
            own_redis.thaw()
        wait_until(lambda: len(ids(own_redis.url)) == 5)


@pytest.mark.slow
def test_a_full_spool_drops_whole_groups_counts_them_and_says_so(tmp_path, own_redis):
    with stubs(tmp_path, own_redis.url, spool_max_bytes=2**20) as (settings, engine, _):
        # Text that hardly compresses: 64 candidates of 200 characters take at least 6.4 kB of the 1 MiB.
        engine.script.completions = [os.urandom(100).hex() for _ in range(64)]
        with running_gateway(settings) as client:
            wait_until(lambda: client.get("/ready").json["status"] == "ready")
            own_redis.kill()
            many = {**HI, "n": 64, "max_tokens": 250}
            wait_until(lambda: client.post("/generate", many).json["warnings"] != [], seconds=60)
            reply = client.post("/generate", many).json
            assert reply["warnings"] == ["the ledger has no room: these candidates were not logged"]
            ready = client.get("/ready").json
            assert ready["status"] == "degraded"
            assert ready["spool"]["dropped"] >= 2
            assert not ready["spool"]["has_room"]
            own_redis.start()
            wait_until(lambda: client.get("/ready").json["spool"]["pending_bytes"] == 0)
            assert len(set(ids(own_redis.url))) == len(ids(own_redis.url)) > 0


# --- a gateway process of its own, killed -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("is_redis_away", [False, True], ids=["redis up", "redis away"])
def test_an_answer_that_went_out_has_its_group_once_after_kill_9(tmp_path, own_redis, unused_port, is_redis_away):
    with stubs(tmp_path, own_redis.url) as (settings, _, _):
        if is_redis_away:
            own_redis.kill()
        with gateway_process(settings, unused_port) as (process, client):
            served = [client.post("/generate?n=2", HI).json["id"] for _ in range(10)]
            process.send_signal(signal.SIGKILL)
            process.wait()
        if is_redis_away:
            own_redis.start()
            assert ids(own_redis.url) == []
        with gateway_process(settings, unused_port) as (_, client):
            served.append(client.post("/generate?n=2", HI).json["id"])
            wait_until(lambda: served[-1] in ids(own_redis.url))
        assert ids(own_redis.url) == served


@pytest.mark.slow
def test_a_reward_that_was_not_measured_before_kill_9_is_measured_after(tmp_path, own_redis, unused_port):
    with stubs(tmp_path, own_redis.url) as (settings, _, reward):
        own_redis.kill()
        reward.script.fault = "silent"
        with gateway_process(settings, unused_port) as (process, client):
            served = client.post("/generate?n=1", HI).json["id"]
            wait_until(lambda: len(reward.requests) == 1)
            process.send_signal(signal.SIGKILL)
            process.wait()
        own_redis.start()
        reward.script.fault = "none"
        with gateway_process(settings, unused_port):
            wait_until(lambda: len(ids(own_redis.url)) == 2)
        group, outcome = read_ledger(own_redis.url)
        assert isinstance(group, CandidateGroup)
        assert isinstance(outcome, Outcome)
        # "u:hi\na:a fine answer\n" has 21 characters.
        assert (group.id, outcome.group_id, outcome.rewards) == (served, served, (21.0,))


@pytest.mark.slow
def test_sigterm_ends_the_process_cleanly_with_everything_delivered(tmp_path, redis_url, unused_port):
    with (
        stubs(tmp_path, redis_url) as (settings, _, reward),
        gateway_process(settings, unused_port) as (process, client),
    ):
        reward.script.delay = 0.5
        served = client.post("/generate?n=1", HI).json["id"]
        process.terminate()
        assert process.wait(20) == 0
        # The outcome was written a moment before the end.
        group, outcome = read_ledger(redis_url)
        assert isinstance(outcome, Outcome)
        assert (group.id, outcome.group_id, outcome.rewards) == (served, served, (21.0,))


@pytest.mark.slow
def test_a_second_gateway_on_the_same_spool_refuses_to_start(tmp_path, redis_url, unused_port):
    with stubs(tmp_path, redis_url) as (settings, _, _), gateway_process(settings, unused_port):
        given = environment_of(settings)
        second = subprocess.run(
            [sys.executable, "-m", "service"], env={**os.environ, **given}, capture_output=True, text=True, timeout=30
        )
        assert second.returncode != 0
        assert "another gateway process writes into" in second.stderr


@pytest.mark.slow
def test_an_engine_on_a_network_is_refused_in_one_line(tmp_path, redis_url):
    settings = gateway_settings(tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:2", redis_url)
    given = environment_of(settings)
    started = subprocess.run(
        [sys.executable, "-m", "service"],
        env={**os.environ, **given, "BONSAI_POLICY_ENGINE_URLS": '["http://10.0.0.1:8000"]'},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert started.returncode == 2
    assert started.stderr.startswith("BONSAI_POLICY_ENGINE_URLS: ")
    assert "never over a network" in started.stderr

"""Rows F34 to F40 of the fault matrix: whatever happens to a worker, the job ends once, and its owner alone writes.
Real processes, a real Redis, an engine over HTTP. That each write may be the last is test_crash_points."""

import asyncio
import os
import signal
import time

import pytest
import redis

from bon_algos.contracts import OPEN_JOBS, POLICIES_INDEX, job_events_key, policy_key
from bon_algos.crash_points import CRASH_AT
from service.dispatch import Dispatcher
from service.jobs import Jobs
from service.store import open_redis
from tests.fixtures.disk import own_disk
from tests.fixtures.fault_proxy import FaultProxy
from tests.worker.forks import is_alive, training_of, until
from tests.worker.small_job import LEASE_SECONDS
from worker import attempts, checkpoint

pytestmark = pytest.mark.slow
UNHURRIED = {"LEASE_SECONDS": 300}
"""For those that are frozen and woken in time: who is late to wake them would find another owner."""
ROOM_FOR_A_POLICY = 150_000
"""Bytes: for all but its report's figure."""


@pytest.fixture
def small_disk(tmp_path):
    with own_disk(tmp_path) as disk:
        yield disk


def cancel(job):
    async def asked():
        async with open_redis(job.redis_url) as client:
            await client.hset(f"bonsai:job:{JOB}", "spec", job.spec.model_dump_json())
            return await Jobs(client, n_cap=64, max_lora_rank=32).grant("cancel", JOB)

    return asyncio.run(asked())


def reconcile(job, sent=None):
    """What a gateway's reconciler does in one pass."""
    woken = [] if sent is None else sent

    async def one_pass():
        async with open_redis(job.redis_url) as client:
            return await Dispatcher(client, lambda job_id, *_: woken.append(job_id), seconds=0.001).reconcile()

    return asyncio.run(one_pass())


JOB = "job_" + "0" * 32


def ends_once_with(job, digest):
    assert job.the_policy().manifest.digest == digest
    assert (job.ends(), job.leftovers()) == (["succeeded"], [])


@pytest.mark.parametrize("point", ["window.written", "checkpoint.written:2"])
def test_F18_links_that_go_silent_under_a_job_cost_it_nothing(point, small, undisturbed, own_redis):
    """While it reads, and while it trains."""
    with FaultProxy(own_redis.socket) as proxy:
        job = small(redis_url=own_redis.url, settings={"REDIS_URL": proxy.url})
        worker, training = job.frozen_at(point)
        proxy.go_silent()
        os.kill(training, signal.SIGCONT)
        worker.join(60)
        ends_once_with(job, undisturbed)
        assert job.attempts == 1


@pytest.mark.parametrize(("hours", "attempts"), [(-1, 1), (1, 2)])
def test_F26_a_clock_that_jumps_costs_a_running_job_at_most_a_hand_over(
    hours, attempts, small, undisturbed, clocked_redis
):
    """An hour later its lease is over, and who takes it up is the owner; an hour earlier it is as it was."""
    job = small(redis_url=clocked_redis.url)
    first, training = job.frozen_at("checkpoint.renamed:2")
    clocked_redis.set_clock(3600 * hours)
    second = job.deliver()
    until(lambda: job.attempts == 2 or not second.is_alive(), "a second worker had its answer")
    os.kill(training, signal.SIGCONT)
    for delivery in (first, second):
        delivery.join(60)
    ends_once_with(job, undisturbed)
    assert job.attempts == attempts


def test_F26_a_worker_that_dies_as_the_clock_is_set_back_is_replaced_within_its_lease(
    small, undisturbed, clocked_redis
):
    job = small(redis_url=clocked_redis.url)
    worker, _ = job.frozen_at("checkpoint.renamed:2")
    clocked_redis.set_clock(-3600)
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: reconcile(job) == {job.job_id: "dispatch"}, "woken again", seconds=2 * LEASE_SECONDS)
    job.run_to_its_end()
    ends_once_with(job, undisturbed)
    assert job.attempts == 2


def test_F34_a_message_delivered_twice_late_and_after_the_end_has_no_second_effect(small, undisturbed):
    job = small()
    first = job.deliver()
    until(lambda: job.is_held, "the first delivery owns the job")
    second = job.deliver()
    second.join(30)
    assert (second.exitcode, job.state, first.is_alive()) == (0, "running", True)
    first.join(60)
    ends_once_with(job, undisturbed)
    told = job.client.xlen(job_events_key(job.job_id))
    assert job.run() == 0
    assert (job.attempts, job.client.xlen(job_events_key(job.job_id))) == (1, told)
    ends_once_with(job, undisturbed)


def test_F35_training_dies_with_its_worker_and_another_goes_on_from_its_state(small, undisturbed):
    job = small()
    worker = job.deliver()
    training = until(lambda: training_of(worker), "training")
    until(lambda: checkpoint.newest(job.directory) is not None, "a state")
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: not is_alive(training), "training dies with its worker", seconds=2)
    kept = max(int(state.name.removeprefix("step-")) for state in job.directory.glob("*/step-*"))
    until(lambda: not job.is_held, "the lease runs out")
    job.run_to_its_end()
    assert f"resumed at step {kept}" in (job.directory / "2.log").read_text()
    ends_once_with(job, undisturbed)


def test_F36_a_job_that_kills_its_process_three_times_is_given_up_with_the_end_of_its_log(small):
    job = small()
    for attempt in (1, 2, 3):
        assert reconcile(job) != {job.job_id: "failed"}
        job.run(**{CRASH_AT: "progress.recorded:2"})
        assert (job.attempts, job.state) == (attempt, "running")
    assert reconcile(job) == {job.job_id: "failed"}
    assert (job.state, job.value("error_code")) == ("failed", "dead_letter")
    assert "training process ended with -9" in job.value("error_message")
    assert (job.leftovers(), job.published()) == ([], [])
    assert job.client.smembers(OPEN_JOBS) == set()


WRITES = ("progress.asked:3", "checkpoint.written", "policy.written", "policy.renamed", "finish.asked")


@pytest.mark.parametrize("point", WRITES)
def test_F37_who_wakes_after_its_lease_changes_nothing(point, small, undisturbed):
    """Frozen right before or after a write, awake when another has finished the job."""
    job = small()
    sleeper, training = job.frozen_at(point)
    until(lambda: not job.is_held, "the lease runs out")
    job.run_to_its_end()
    ends_once_with(job, undisturbed)
    before = world_of(job)
    os.kill(training, signal.SIGCONT)
    sleeper.join(30)
    assert sleeper.exitcode == 0
    assert world_of(job) == before
    ends_once_with(job, undisturbed)
    assert job.attempts == 2


def world_of(job):
    """All that others see of a job and its policy."""
    (policy,) = job.client.zrange(POLICIES_INDEX, 0, -1)
    fields = job.client.hgetall(f"bonsai:job:{job.job_id}")
    home = job.artefacts / "policies" / job.published()[0]
    files = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in home.iterdir()}
    return fields, job.client.xlen(job_events_key(job.job_id)), job.client.hgetall(policy_key(policy.decode())), files


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_F38_a_torn_state_costs_the_steps_since_the_one_before(file, small, undisturbed):
    job = small()
    job.run(**{CRASH_AT: "checkpoint.forgotten:3"})
    newest = max(job.directory.glob("*/step-*"))
    torn = (newest / file).read_bytes()
    (newest / file).write_bytes(torn[: len(torn) // 2])
    job.run_to_its_end()
    assert "resumed at step 2" in (job.directory / "2.log").read_text()
    ends_once_with(job, undisturbed)


@pytest.mark.parametrize(
    ("phase", "point", "room"),
    [
        ("freezing", "progress.recorded", 0),
        ("training", "checkpoint.renamed", 0),
        ("publishing", "adapter.lent:5", 0),
        ("publishing", "adapter.lent:5", ROOM_FOR_A_POLICY),
    ],
    ids=["window", "state", "policy", "report"],
)
def test_F38_a_disk_that_is_full_costs_an_attempt(phase, point, room, small, undisturbed, engine, small_disk):
    """Nothing half-written has a name; once there is room the job ends well."""
    job = small(artefacts=small_disk.directory, settings=UNHURRIED)
    worker, training = job.frozen_at(point)
    small_disk.fill(training, room)
    os.kill(training, signal.SIGCONT)
    worker.join(60)
    assert (worker.exitcode, job.state, job.is_held) == (0, "running", False)
    assert job.value("last_error").startswith("no room on the disk: "), job.told()
    assert job.value("phase") == phase
    assert (job.client.zcard(POLICIES_INDEX), job.published(), engine.adapters) == (0, [], {})
    assert not list((job.artefacts / "reports").glob("*"))
    small_disk.empty()
    job.run_to_its_end()
    ends_once_with(job, undisturbed)
    assert job.attempts == 2


def test_F38_where_no_process_can_be_started_the_job_is_given_back_with_the_reason(small):
    job = small()
    (job.artefacts / "jobs").write_text("in the way")
    job.run()
    assert "no training process could be started" in job.value("last_error")
    assert not job.is_held


def test_F39_a_policy_of_a_cancelled_job_is_registered_by_nobody_and_swept_in_the_end(small):
    job = small(job_id=JOB)
    job.run(**{CRASH_AT: "policy.renamed"})
    cancel(job)
    assert reconcile(job) == {JOB: "cancelled"}
    job.run()
    (orphan,) = job.published()
    assert job.client.zcard(POLICIES_INDEX) == 0
    a_day_ago = time.time() - attempts.ORPHAN_SECONDS - 1
    os.utime(job.artefacts / "policies" / orphan, (a_day_ago, a_day_ago))
    assert (job.leftovers(), job.published()) == ([], [])


def test_F39_a_registered_policy_is_swept_however_old_it_is_never(small, undisturbed):
    job = small()
    job.run()
    os.utime(job.artefacts / "policies" / undisturbed, (0, 0))
    ends_once_with(job, undisturbed)


@pytest.mark.parametrize(
    ("phase", "point"),
    [
        ("freezing", "window.written"),
        ("training", "checkpoint.renamed"),
        ("evaluating", "adapter.lent:5"),
        ("publishing", "policy.written"),
        ("publishing", "finish.asked"),
    ],
)
def test_F40_a_job_cancelled_in_any_phase_stops_within_a_step_and_publishes_nothing(phase, point, small, engine):
    job = small(job_id=JOB, settings=UNHURRIED)
    worker, training = job.frozen_at(point)
    assert job.value("phase") == phase
    state = checkpoint.newest(job.directory)
    done = 0 if state is None else state.step
    cancel(job)
    os.kill(training, signal.SIGCONT)
    worker.join(30)
    assert (worker.exitcode, job.state, job.ends()) == (0, "cancelled", ["cancelled"])
    assert job.step <= done + 1
    assert (job.client.zcard(POLICIES_INDEX), job.leftovers(), engine.adapters) == (0, [], {})


@pytest.mark.parametrize("point", ["checkpoint.written:2", "adapter.lent:5", "finish.asked"])
def test_F21_a_redis_that_is_killed_and_comes_back_costs_a_running_job_nothing(point, small, undisturbed, own_redis):
    """While it trains, while its policy is judged, and at the very script that ends it."""
    job = small(redis_url=own_redis.url, settings=UNHURRIED)
    worker, training = job.frozen_at(point)
    own_redis.kill()
    os.kill(training, signal.SIGCONT)
    until(lambda: "Redis is away" in (job.directory / "1.log").read_text() or not is_alive(training), "it is missed")
    own_redis.start()
    worker.join(60)
    with redis.Redis.from_url(own_redis.url) as client:
        assert client.ping()
    ends_once_with(job, undisturbed)
    assert job.attempts == 1

"""One owner per job: claim, keep, report, end. A real Redis; time passes on its clock."""

import json
import time

import pytest
import redis

from bon_algos.contracts import (
    job_checkpoints_key,
    job_key,
    policy_key,
)
from tests.fixtures.fault_proxy import FaultProxy
from tests.worker.leased import JOB, POLICY, client, expire, field, held, submit, take
from worker import lease as leases
from worker import tasks
from worker.erased_windows import fail_jobs
from worker.errors import JobCancelled, JobParked, LeaseLost

__all__ = ["client"]


def test_a_queued_job_is_claimed_once(client):
    submit(client)
    assert take(client).epoch == 1
    assert take(client) == "held"
    assert field(client, "state") == "running"
    assert field(client, "attempts") == "1"


def test_a_claim_whose_reply_is_lost_is_asked_again_and_is_one_attempt(client, shared_redis, tmp_path):
    """What runs then is the epoch that Redis knows."""
    ran = []

    def train(job_id, own, _):
        ran.append((job_id, own.epoch, take(client)))
        return 0

    submit(client)
    with FaultProxy(shared_redis.socket) as proxy:
        proxy.lose_reply_to(b"EVAL")
        tasks.distill(
            JOB,
            redis_url=proxy.url,
            artefacts=tmp_path,
            lease_seconds=60,
            processes=1,
            run=train,
        )
    assert ran == [(JOB, 1, "held")]
    assert [field(client, name) for name in ("epoch", "attempts")] == ["1", "1"]


def test_an_expired_lease_is_taken_over_with_a_new_epoch_and_the_first_start_stays(client):
    submit(client)
    take(client)
    started = field(client, "started_at")
    expire(client)
    assert take(client).epoch == 2
    assert field(client, "started_at") == started


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_a_finished_job_is_not_run_again_whenever_its_message_arrives(client, state):
    submit(client, state=state)
    assert take(client) == "final"


def test_a_message_for_a_job_nobody_submitted_does_nothing(client):
    assert take(client) == "final"
    assert not client.exists(job_key(JOB))


def test_a_job_cancelled_before_its_claim_ends_there(client):
    submit(client, cancel=1)
    assert take(client) == "cancelled"
    assert field(client, "state") == "cancelled"


def test_the_lease_is_counted_on_redis_clock(client):
    submit(client)
    before = client.time()[0]
    take(client, seconds=60)
    assert before + 60 <= int(field(client, "lease_until")) / 1000 <= client.time()[0] + 61


@pytest.mark.slow
def test_the_thread_keeps_a_lease_alive_longer_than_itself(client):
    submit(client)
    with held(client, take(client, seconds=0.6), lease_seconds=0.6, heartbeat_seconds=0.1) as lease:
        first = int(field(client, "lease_until"))
        deadline = time.monotonic() + 10
        while int(field(client, "lease_until")) < first + 1200 and time.monotonic() < deadline:
            lease.wait(0.05)  # raises if the lease were lost
        assert take(client) == "held"


def test_a_newer_epoch_stops_the_older_one_and_refuses_all_it_writes(client):
    submit(client)
    old = held(client, take(client))
    expire(client)
    new = held(client, take(client))
    new.progress("training", 5, 10, {"loss": 1.0}, 3.0)
    for write in (
        old.beat,
        lambda: old.progress("training", 9, 10, {}, None),
        lambda: old.finish_failed("late", "late"),
        lambda: old.finish_succeeded(POLICY, "{}"),
        old.finish_cancelled,
    ):
        with pytest.raises(LeaseLost):
            write()
    assert not leases.release(client, JOB, old.claim, "late")
    assert (field(client, "state"), field(client, "step")) == ("running", "5")
    assert not client.exists(policy_key(POLICY.id))
    new.check()


def test_F22_of_two_that_were_given_the_same_epoch_the_later_alone_writes(client):
    """Redis loses its last second, and with it the first claim: the job is queued again as it was."""
    submit(client)
    before = client.dump(job_key(JOB))
    old = held(client, take(client))
    client.restore(job_key(JOB), 0, before, replace=True)
    new = held(client, take(client))
    assert old.epoch == new.epoch
    new.progress("training", 5, 10, {"loss": 1.0}, 3.0)
    for write in (
        old.beat,
        lambda: old.progress("training", 9, 10, {}, None),
        old.park,
        lambda: old.finish_failed("late", "late"),
        lambda: old.finish_succeeded(POLICY, "{}"),
    ):
        with pytest.raises(LeaseLost):
            write()
    old.tell_checkpoint(9, {}, kept=2)
    assert not leases.release(client, JOB, old.claim, "late")
    assert (field(client, "state"), field(client, "step")) == ("running", "5")
    assert not client.exists(job_checkpoints_key(JOB))
    new.beat()


def test_who_slept_past_the_lease_stops_before_asking_anybody(client):
    """A frozen process wakes with a clock that went on: its next check fails even if nobody took the job."""
    submit(client)
    lease = held(client, take(client, seconds=0.05), lease_seconds=0.05)
    deadline = time.monotonic() + 0.06
    while time.monotonic() < deadline:
        pass
    with pytest.raises(LeaseLost):
        lease.check()


def test_cancellation_arrives_with_the_next_word_from_redis(client):
    submit(client)
    lease = held(client, take(client))
    client.hset(job_key(JOB), "cancel", 1)
    with pytest.raises(JobCancelled):
        lease.progress("training", 1, 10, {}, None)
    lease.finish_cancelled()
    assert field(client, "state") == "cancelled"


def test_a_wish_to_pause_stops_the_steps_and_lets_the_state_be_kept(client):
    """What asks before a state is written is answered: the lease is held until the job is parked."""
    submit(client)
    lease = held(client, take(client))
    client.hset(job_key(JOB), "pause", 1)
    with pytest.raises(JobParked):
        lease.progress("training", 1, 10, {}, None)
    with pytest.raises(JobParked):
        lease.check()
    lease.confirm()
    lease.park()
    assert (field(client, "state"), field(client, "pause")) == ("paused", None)
    assert take(client) == "paused"


def test_a_job_that_is_to_go_on_before_it_has_stopped_is_queued_again(client):
    submit(client)
    lease = held(client, take(client))
    client.hset(job_key(JOB), mapping={"pause": 1, "dispatched_at": 1})
    lease.beat()
    client.hdel(job_key(JOB), "pause")
    lease.park()
    assert (field(client, "state"), field(client, "dispatched_at")) == ("queued", None)
    assert take(client).epoch == 2


def test_the_newest_states_are_told_of(client):
    submit(client)
    lease = held(client, take(client))
    for step in (5, 10, 100):
        lease.tell_checkpoint(step, {"loss": 1 / step}, kept=2)
    kept = client.hgetall(job_checkpoints_key(JOB))
    assert {step: json.loads(told)["metrics"]["loss"] for step, told in kept.items()} == {"10": 0.1, "100": 0.01}


def test_time_is_spent_while_somebody_works_on_the_job(client):
    """Until the worker is last heard of, over all attempts; not while the job waits for the next one."""
    submit(client)

    def as_if_seen(seconds_ago):
        now = client.time()
        client.hset(job_key(JOB), "seen_at", now[0] * 1000 + now[1] // 1000 - int(seconds_ago * 1000))

    first = held(client, take(client))
    as_if_seen(10)
    first.beat()
    expire(client)
    as_if_seen(1000)
    second = held(client, take(client, processes=4))
    as_if_seen(5)
    second.finish_failed("code", "message")
    assert 15_000 <= int(field(client, "spent_ms")) < 20_000
    # 10 s of one process, 5 s of four.
    assert 30_000 <= int(field(client, "gpu_ms")) < 50_000


def test_a_clock_that_is_set_forward_is_not_spent(client):
    """An hour, in the middle of a lease of a minute: no more than that minute can have passed."""
    submit(client)
    lease = held(client, take(client))
    for name in ("seen_at", "lease_until"):
        client.hincrby(job_key(JOB), name, -3_600_000)
    lease.beat()
    assert int(field(client, "spent_ms")) <= 60_000
    assert leases.release(client, JOB, lease.claim, "later")
    client.hincrby(job_key(JOB), "seen_at", -3_600_000)
    fail_jobs(client, [JOB])  # an hour after it was given back
    assert int(field(client, "spent_ms")) <= 61_000


def test_a_job_given_back_may_be_claimed_at_once_and_says_why(client):
    submit(client)
    assert leases.release(client, JOB, take(client), "the engine is away")
    assert field(client, "last_error") == "the engine is away"
    assert take(client).epoch == 2


def test_a_beat_that_comes_after_the_job_was_given_back_does_not_hold_it_again(client):
    """The thread that keeps the lease runs until the process ends."""
    submit(client)
    lease = held(client, take(client))
    assert leases.release(client, JOB, lease.claim, "no room on the disk")
    with pytest.raises(LeaseLost):
        lease.beat()
    assert field(client, "lease_until") == "0"
    assert take(client).epoch == 2


def test_who_is_to_leave_may_keep_its_state_first(client):
    submit(client)
    lease = held(client, take(client))
    lease.leave()
    lease.confirm()
    for stop in (lease.check, lambda: lease.wait(60), lambda: lease.progress("training", 1, 2, {}, None)):
        with pytest.raises(JobParked):
            stop()


def test_a_job_whose_worker_leaves_is_queued_and_woken_for_at_once_and_has_failed_no_attempt(client):
    submit(client, dispatched_at=7)
    lease = held(client, take(client))
    lease.leave()
    lease.park()
    fields = ("state", "dispatched_at", "last_error", "attempts", "parked")
    assert [field(client, name) for name in fields] == ["queued", None, None, "1", "1"]
    assert take(client).epoch == 2
    with pytest.raises(LeaseLost):
        lease.park()
    assert take(client) == "held"


@pytest.mark.slow
def test_without_redis_a_lease_ends_by_itself(own_redis):
    with redis.Redis.from_url(own_redis.url, decode_responses=True) as client:
        submit(client)
        lease = held(client, take(client, seconds=1), lease_seconds=1, heartbeat_seconds=0.2)
        with lease:
            own_redis.kill()
            lease.progress("training", 1, 2, {}, None)  # no reason to stop yet
            with pytest.raises(LeaseLost):
                lease.wait(1.1)
            with pytest.raises(LeaseLost):
                lease.confirm()

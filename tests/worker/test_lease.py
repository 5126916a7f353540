"""One owner per job: claim, keep, report, end. A real Redis; time passes on its clock."""

import json
import time

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from bon_algos.audit_entries import GENESIS, chained
from bon_algos.contracts import (
    AUDIT_STREAM,
    POLICIES_INDEX,
    PolicyRecord,
    job_checkpoints_key,
    job_events_key,
    job_key,
    policy_key,
)
from service.audit import verified
from tests.fixtures.fault_proxy import FaultProxy
from worker import lease as leases
from worker import tasks
from worker.erased_windows import fail_jobs
from worker.errors import JobCancelled, JobParked, LeaseLost
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


def test_a_success_that_comes_after_the_cancellation_registers_nothing(client):
    submit(client)
    lease = held(client, take(client))
    client.hset(job_key(JOB), "cancel", 1)
    with pytest.raises(JobCancelled):
        lease.finish_succeeded(POLICY, "{}")
    assert field(client, "state") == "cancelled"
    assert not client.exists(policy_key(POLICY.id), AUDIT_STREAM)


def test_finishing_registers_the_policy_in_the_same_script(client):
    submit(client)
    lease = held(client, take(client))
    lease.finish_succeeded(POLICY, '{"prompts": 3}')
    assert PolicyRecord.model_validate_json(client.hget(policy_key(POLICY.id), "record")) == POLICY
    assert client.zscore(POLICIES_INDEX, POLICY.id) == 7.0
    assert (field(client, "policy_id"), field(client, "report")) == (POLICY.id, '{"prompts": 3}')
    with pytest.raises(LeaseLost):
        lease.finish_failed("second", "end")
    assert field(client, "state") == "succeeded"


OF_ACME = POLICY.model_copy(update={"tenant": "acme"})


def others_entry(client):
    newest = client.xrevrange(AUDIT_STREAM, count=1)
    previous = newest[0][1]["digest"] if newest else GENESIS
    client.xadd(AUDIT_STREAM, chained("tag_put", tenant="default", by="key_ann", previous=previous))


def entries(client):
    """The audit, found whole, without what others wrote."""
    found = client.xrange(AUDIT_STREAM)
    verified(found)
    return [fields for _, fields in found if fields["event"] != "tag_put"]


def test_the_audit_tells_once_of_the_policy_that_a_job_made(client):
    submit(client)
    others_entry(client)
    lease = held(client, take(client))
    lease.finish_succeeded(OF_ACME, "{}")
    with pytest.raises(LeaseLost):
        lease.finish_succeeded(OF_ACME, "{}")
    [entry] = entries(client)
    told = {"event": "policy_register", "tenant": "acme", "by": "worker", "policy": POLICY.id, "job": JOB}
    assert entry | told == entry
    assert json.loads(entry["data"]) == {"before": None, "after": "candidate"}


class Overtaken(redis.Redis):
    """Whenever it has seen the newest entry of the audit, up to so many times, somebody else writes another."""

    times = 0

    def xrevrange(self, *args, **options):
        found = super().xrevrange(*args, **options)
        if self.times > 0:
            self.times -= 1
            others_entry(super())
        return found


@pytest.mark.parametrize(("times", "registered"), [(3, 1), (10**6, 0)], ids=["for a while", "all the time"])
def test_a_policy_is_registered_with_an_entry_that_follows_the_newest_or_not_at_all(times, registered, client):
    submit(client)
    own = take(client)
    with Overtaken(connection_pool=client.connection_pool) as busy:
        busy.times = times
        if registered:
            held(busy, own).finish_succeeded(OF_ACME, "{}")
        else:
            with pytest.raises(redis.WatchError):
                held(busy, own).finish_succeeded(OF_ACME, "{}")
    assert (len(entries(client)), client.exists(policy_key(POLICY.id))) == (registered, registered)
    assert field(client, "state") == ("succeeded" if registered else "running")


def test_a_policy_that_is_live_already_is_not_made_a_candidate_again(client):
    live = POLICY.model_copy(update={"state": "live"})
    client.hset(policy_key(POLICY.id), mapping={"record": live.model_dump_json(), "version": 4})
    submit(client)
    held(client, take(client)).finish_succeeded(POLICY, "{}")
    assert PolicyRecord.model_validate_json(client.hget(policy_key(POLICY.id), "record")).state == "live"
    assert client.hget(policy_key(POLICY.id), "version") == "4"
    assert not client.exists(AUDIT_STREAM)


def test_progress_is_on_the_job_and_in_its_events(client):
    submit(client)
    held(client, take(client)).progress("training", 3, 10, {"loss": 0.5}, 12.34)
    assert json.loads(field(client, "metrics")) == {"loss": 0.5}
    assert (field(client, "phase"), field(client, "step"), field(client, "seconds_left")) == ("training", "3", "12.3")
    (_, event), *_ = client.xrevrange(job_events_key(JOB), count=1)
    assert event == {"phase": "training", "step": "3", "metrics": '{"loss": 0.5}'}


def test_a_job_given_back_may_be_claimed_at_once_and_says_why(client):
    submit(client)
    assert leases.release(client, JOB, take(client), "the engine is away")
    assert field(client, "last_error") == "the engine is away"
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


class TwoWorkers(RuleBasedStateMachine):
    """Two workers on one job, claims, beats, reports and endings in any order, leases that run out at any moment.

    The model: the newest epoch alone may write, and the job ends once.
    """

    redis_url = ""

    def __init__(self):
        super().__init__()
        self.client = redis.Redis.from_url(self.redis_url, decode_responses=True)
        self.client.flushall()
        submit(self.client)
        self.epoch, self.alive, self.ended, self.cancel = 0, False, None, False
        self.held: dict[str, Lease] = {}

    def teardown(self):
        self.client.close()

    @rule(worker=st.sampled_from("ab"))
    def claims(self, worker):
        answer = take(self.client)
        if self.ended is not None:
            assert answer == "final"
        elif self.alive:
            assert answer == "held"
        elif self.cancel:
            assert answer == "cancelled"
            self.ended = "cancelled"
        else:
            self.epoch += 1
            assert answer.epoch == self.epoch
            self.alive, self.held[worker] = True, held(self.client, answer)

    @precondition(lambda self: self.ended is None)
    @rule()
    def time_passes(self):
        expire(self.client)
        self.alive = False

    @precondition(lambda self: self.ended is None)
    @rule()
    def owner_cancels(self):
        self.client.hset(job_key(JOB), "cancel", 1)
        self.cancel = True

    def may_write(self, lease):
        return lease.epoch == self.epoch and self.ended is None

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def beats(self, data):
        lease = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        if not self.may_write(lease):
            with pytest.raises(LeaseLost):
                lease.beat()
            return
        self.alive = True
        if self.cancel:
            with pytest.raises(JobCancelled):
                lease.beat()
        else:
            lease.beat()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), end=st.sampled_from(["succeeded", "failed", "cancelled"]))
    def finishes(self, data, end):
        lease = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        finish = {
            "succeeded": lambda: lease.finish_succeeded(POLICY, "{}"),
            "failed": lambda: lease.finish_failed("code", "message"),
            "cancelled": lease.finish_cancelled,
        }[end]
        if not self.may_write(lease):
            with pytest.raises(LeaseLost):
                finish()
        elif end == "succeeded" and self.cancel:
            with pytest.raises(JobCancelled):
                finish()
            self.ended = "cancelled"
        else:
            finish()
            self.ended = end

    @invariant()
    def the_job_is_what_the_model_says(self):
        state = field(self.client, "state")
        assert state == (self.ended or ("running" if self.epoch else "queued"))
        assert int(field(self.client, "attempts")) == self.epoch
        assert bool(self.client.exists(policy_key(POLICY.id))) == (self.ended == "succeeded")


@pytest.mark.slow
def test_any_interleaving_of_two_workers(redis_url):
    TwoWorkers.redis_url = redis_url
    run_state_machine_as_test(
        TwoWorkers,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture],
        ),
    )

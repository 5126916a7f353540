"""Two workers on one job, in any order: the newest claim alone writes, and the job ends once."""

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from bon_algos.contracts import (
    job_key,
    policy_key,
)
from tests.worker.leased import JOB, POLICY, expire, field, held, submit, take
from worker.errors import JobCancelled, LeaseLost
from worker.lease import Lease


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

"""What a job leaves when it has ended: its policy, the audit's entry, its reports; once or not at all."""

import json

import pytest
import redis

from bon_algos.audit_entries import GENESIS, chained
from bon_algos.contracts import (
    AUDIT_STREAM,
    POLICIES_INDEX,
    PolicyRecord,
    job_events_key,
    job_key,
    policy_key,
)
from service.audit import verified
from tests.worker.leased import JOB, POLICY, client, field, held, submit, take
from worker.errors import JobCancelled, LeaseLost

__all__ = ["client"]


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

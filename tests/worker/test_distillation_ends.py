"""What must not happen on the way of a job, and what is left when it ends early: engines that are away or lie, leases
that are lost, jobs that are cancelled or paused."""

import time
from functools import partial

import pytest
import redis

from bon_algos.contracts import (
    ERASURES,
    LEDGER_STREAM,
    Erasure,
    Method,
    erasure_id,
    job_checkpoints_key,
    job_key,
    subject_digest,
)
from bon_algos.ledger_entries import record_of
from bon_algos.scoring import Completion, open_readers
from tests.worker import world
from tests.worker.distilled import FORWARD, ITERATIVE_BOND, JBOND, JOB, published, state
from worker import checkpoint
from worker.engine import Engines
from worker.errors import EngineUnavailable, JobCancelled, JobFailed, JobParked, LeaseLost
from worker.evaluate import fingerprint
from worker.job_process import read_tokenizer
from worker.publish import publish
from worker.workplace import Workplace

pytestmark = pytest.mark.slow


def test_nothing_of_a_job_stays_in_the_engine_and_no_name_is_used_twice(job, client, engine):
    engine.adapters[f"{JOB}-0-dead-3"] = engine._base  # what an attempt that was killed left behind
    engine.adapters["job_11-0-over-3"] = engine._base  # and what is left of a job that others ended
    client.hset(job_key("job_11"), "state", "cancelled")
    engine.adapters["job_12-0-alive-3"] = engine._base
    job("jbond").run()
    assert set(engine.adapters) == {"job_12-0-alive-3"}
    assert len(engine.names_ever) == len(set(engine.names_ever)) >= 2 * JBOND["steps"]


def test_rollouts_wait_behind_users(job, engine):
    job("jbond").run()
    assert {body["priority"] for body in engine.requests} == {10}


def test_j_bond_asks_for_one_policy_sample_and_two_of_the_anchor_per_prompt(job, engine):
    job("jbond").run()
    training = [body["n"] for body in engine.requests if body["n"] < 8]
    assert sorted(training) == [1] * 9 + [2] * 9  # 3 steps of 3 prompts


def test_iterative_bond_asks_for_as_many_anchor_samples_as_its_spec_says(job, engine):
    job("iterative_bond", ITERATIVE_BOND | {"anchor_samples": 5}).run()
    training = [body["n"] for body in engine.requests if body["n"] < 8]
    assert sorted(training) == [1] * 9 + [5] * 9  # 3 steps of 3 prompts


def test_bond_asks_for_samples_of_the_policy_alone_since_the_ledger_has_the_references(job, engine):
    job("bond").run()
    training = [body for body in engine.requests if body["n"] < 8]
    assert [body["n"] for body in training] == [4] * 9  # 3 steps of 3 prompts, after one that imitates alone
    assert all(body["model"].startswith(JOB) for body in training)
    assert len({body["model"] for body in training}) == 3  # the policy of each step


def test_bond_steps_wait_for_an_engine_that_is_away_between_two_of_them(job, client, engine):
    attempt = job("bond", patience=30.0)
    learn = attempt.progress.step

    def away_after_the_second(step, metrics):
        learn(step, metrics)
        engine.away_for = 4 if step == 2 else engine.away_for

    attempt.progress.step = away_after_the_second
    attempt.run()
    assert state(client) == "succeeded"


def test_a_bond_job_that_is_cancelled_while_samples_are_drawn_leaves_nothing_in_the_engine(job, client, engine):
    attempt = job("bond")
    learn = attempt.progress.step

    def cancelled_at_the_second(step, metrics):
        learn(step, metrics)
        if step == 2:
            raise JobCancelled

    attempt.progress.step = cancelled_at_the_second
    with pytest.raises(JobCancelled):
        attempt.run()
    assert engine.adapters == {}


def test_a_job_whose_rank_the_engine_was_not_started_for_fails_at_once(job, engine):
    """As after a restart with a smaller largest rank, while the job was waiting."""
    engine.largest_rank = 4
    with pytest.raises(JobFailed, match=r"engine_refused.*max_lora_rank 4"):
        job("bond", patience=600.0).run()


def test_an_engine_that_serves_the_base_under_the_policys_name_is_found_out(job, client, engine, tmp_path):
    engine.ignores_adapters = True
    with pytest.raises(JobFailed, match="served_policy_differs"):
        job().run()
    assert published(tmp_path) == []


def test_a_trainer_with_other_weights_than_the_engine_refuses_to_train(job, tmp_path, tiny_policy):
    attempt = job()
    other = tmp_path / "other"
    world.save_tiny_policy(other, seed=99)
    attempt.workplace = Workplace(**{**vars(attempt.workplace), "policy_directory": other})
    with pytest.raises(JobFailed, match="train_serve_mismatch"):
        attempt.run()


class AskedMeanwhile(redis.Redis):
    """Somebody is to be forgotten while the ledger is read."""

    erasure = None

    def xrevrange(self, *args, **kwargs):
        if self.erasure is not None:
            self.hset(ERASURES, self.erasure.id, self.erasure.model_dump_json())
        return super().xrevrange(*args, **kwargs)


@pytest.fixture
def of_ada(client):
    """The erasure that she may ask for: every group of the ledger is hers."""
    groups = [record_of(fields) for _, fields in client.xrange(LEDGER_STREAM)]
    client.delete(LEDGER_STREAM)
    world.deliver(client, *(group.model_copy(update={"user": "ada"}) for group in groups))
    digest = subject_digest("default", "ada")
    return Erasure(
        id=erasure_id(digest), tenant="default", subject_digest=digest, requested_at=time.time(), requested_by="k"
    )


def test_groups_that_were_to_be_erased_while_they_were_read_reach_no_file(job, redis_url, tmp_path, of_ada):
    """The erasure may be proven before the window is there."""
    attempt = job()
    with AskedMeanwhile.from_url(redis_url) as reads:
        reads.erasure = of_ada
        attempt.workplace = Workplace(**{**vars(attempt.workplace), "client": reads})
        with pytest.raises(JobFailed, match="window_erased"):
            attempt.freeze()
    assert [path for path in (tmp_path / "jobs").rglob("*") if path.is_file()] == []


def test_a_later_attempt_learns_from_no_window_whose_groups_are_to_be_erased_since(job, client, of_ada):
    """Before whoever erases has found the window."""
    job().freeze()
    client.hset(job_key(JOB), "lease_until", 1)
    client.hset(ERASURES, of_ada.id, of_ada.model_dump_json())
    with pytest.raises(JobFailed, match="window_erased"):
        job().freeze()


def test_a_fenced_attempt_writes_no_state_and_publishes_nothing(job, client, tmp_path):
    old = job(every=1)
    window = old.freeze()
    training = old.open_training(window)
    client.hset(job_key(JOB), "lease_until", 1)
    new = job(every=1)
    with pytest.raises(LeaseLost):
        old.train(training, window)
    assert list(old.attempt.glob("step-*")) == []
    new.run()
    assert (state(client), len(published(tmp_path))) == ("succeeded", 1)


def test_an_attempt_fenced_just_before_its_end_does_not_end_the_job(job, client):
    old = job()
    window = old.freeze()
    training = old.open_training(window)
    old.train(training, window)
    evidence = old.evaluate(training.policy, window)
    client.hset(job_key(JOB), "lease_until", 1)
    new = job()
    with pytest.raises(LeaseLost):
        old.publish(training.policy, window, evidence)
    assert state(client) == "running"
    new.run()
    assert state(client) == "succeeded"


def test_the_next_attempt_adopts_what_was_renamed_but_not_registered(job, client, tmp_path):
    """A crash between rename and registration: the same weights come out again, under the same name, and the
    directory that is there is the policy's."""
    old = job()
    window = old.freeze()
    training = old.open_training(window)
    old.train(training, window)
    evidence = old.evaluate(training.policy, window)
    adapter = old.attempt / "adapter"
    training.policy.save_adapter(adapter)
    publish(
        tmp_path,
        adapter,
        fingerprint(training.policy, window.held_out),
        partial(old.manifest, window, evidence, training.policy.rank),
        old.lease.confirm,
    )
    (orphan,) = published(tmp_path)
    client.hset(job_key(JOB), "lease_until", 1)
    job().run()
    assert published(tmp_path) == [orphan]
    assert client.hget(job_key(JOB), "policy_id").decode() == f"pol-{orphan[:16]}"


def test_a_second_attempt_goes_on_where_the_first_left_off_and_ends_in_the_same_policy(job, client, tmp_path):
    whole = job()
    whole.run()
    (expected,) = published(tmp_path)
    client.delete(job_key(JOB))
    first = job(every=2)
    window = first.freeze()
    training = first.open_training(window)
    first.spec = first.spec.model_copy(
        update={"method": Method(type="bon_forward_kl", bon_forward_kl={**FORWARD, "steps": 4})}
    )
    first.train(training, window)  # stops after 4 of 6 steps, as if killed there
    client.hset(job_key(JOB), "lease_until", 1)
    second = job()
    resumed = second.open_training(second.freeze())
    assert resumed.done == 4
    second.run()
    assert published(tmp_path) == [expected]


def test_cancellation_is_honoured_within_one_step(job, client):
    attempt = job(every=100)
    window = attempt.freeze()
    training = attempt.open_training(window)
    client.hset(job_key(JOB), "cancel", 1)
    with pytest.raises(JobCancelled):
        attempt.train(training, window)
    assert training.done <= 1


def ask_to_pause_at(chosen, attempt, client):
    """Its caller asks while this step is under way."""
    learn = attempt.progress.step

    def step(number, metrics):
        if number == chosen:
            client.hset(job_key(JOB), "pause", 1)
            attempt.lease.beat()
        learn(number, metrics)

    attempt.progress.step = step


def test_a_paused_job_keeps_the_state_of_its_last_step_and_goes_on_to_the_same_policy(job, client, tmp_path):
    """Paused between two states: the step that was under way is the last, and it is kept."""
    job().run()
    (expected,) = published(tmp_path)
    client.delete(job_key(JOB), job_checkpoints_key(JOB))
    first = job(every=100)
    ask_to_pause_at(3, first, client)
    with pytest.raises(JobParked):
        first.run()
    first.lease.park()
    kept = checkpoint.newest(first.directory)
    assert kept is not None
    assert (state(client), kept.step) == ("paused", 3)
    assert [*client.hgetall(job_checkpoints_key(JOB))] == [b"3"]
    client.hset(job_key(JOB), "state", "queued")
    second = job()
    second.run()
    assert published(tmp_path) == [expected]
    assert client.hget(job_key(JOB), "attempts") == b"2"
    assert int(client.hget(job_key(JOB), "trained_tokens")) > second.tokens_trained > 0


def test_a_job_that_is_paused_while_samples_are_drawn_leaves_nothing_in_the_engine(job, client, engine):
    attempt = job("bond")
    ask_to_pause_at(2, attempt, client)
    with pytest.raises(JobParked):
        attempt.run()
    assert engine.adapters == {}
    kept = checkpoint.newest(attempt.directory)
    assert kept is not None
    assert kept.step == 2


def test_a_job_that_pauses_before_its_report_trains_no_step_again(job, client):
    first = job()
    window = first.freeze()
    training = first.open_training(window)
    first.train(training, window)
    client.hset(job_key(JOB), "pause", 1)
    with pytest.raises(JobParked):
        first.evaluate(training.policy, window)
    first.lease.park()
    client.hset(job_key(JOB), "state", "queued")
    second = job()
    second.run()
    assert (state(client), second.tokens_trained) == ("succeeded", 0)


def test_training_on_the_ledger_needs_no_engine_but_the_report_does(job, client, engine):
    attempt = job(patience=0.1)
    engine.is_away = True
    with pytest.raises(EngineUnavailable):
        attempt.run()
    kept = checkpoint.newest(attempt.directory)
    assert kept is not None
    assert kept.step == FORWARD["steps"]
    assert state(client) == "running"


def test_a_job_waits_for_an_engine_that_comes_back(job, engine):
    attempt = job("jbond", patience=30.0)
    window = attempt.freeze()
    training = attempt.open_training(window)
    engine.away_for = 3
    attempt.train(training, window)
    assert engine.away_for < 0
    assert training.done == JBOND["steps"]


def test_what_the_engine_takes_too_long_for_is_given_up_when_the_job_must_stop(engine, reward_directory):
    """A call under way is aborted by the lease: a fenced job does not hold the engine until it answers."""

    def lost():
        raise LeaseLost("fenced")

    config = world.reward_model(engine.url, reward_directory)
    readers = open_readers(config, lambda member: read_tokenizer(member.directory))
    with Engines(engine.url, config, readers, lost) as engines:
        started = time.monotonic()
        with pytest.raises(LeaseLost):
            engines.score([Completion("w1", None, "w2")] * 4)
        assert time.monotonic() - started < 5

"""Faults on the real stack: what is killed comes back, what was accepted is kept, what was begun ends once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import redis

from bon_algos.contracts import job_key
from bonsai.demo.prompts import training_prompts
from tests.fixtures.real_stack import RealStack, wait_until

pytestmark = pytest.mark.stack
N = 8
IMITATION = {
    "type": "bon_forward_kl",
    "bon_forward_kl": {"n": N, "steps": 40, "prompts_per_step": 6, "lora_rank": 8, "lora_alpha": 16},
}


@pytest.fixture(scope="module")
def window(stack: RealStack) -> dict[str, float]:
    """A fixed part of the ledger, so that two jobs learn from the very same candidates."""
    since = time.time()
    stack.fill_ledger(list(training_prompts()[100:130]), N)
    return {"since": since, "until": time.time()}


@pytest.fixture(scope="module")
def undisturbed(stack: RealStack, window):
    return stack.finished(start(stack, window))


def start(stack: RealStack, window) -> str:
    return stack.start_job(IMITATION, n=N, window=window, held_out_fraction=0.2, seed=3)


def training_process(stack: RealStack) -> int:
    """The process that trains, below the worker."""

    def look() -> int | None:
        for pid in stack.process_ids("worker"):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as command:
                    if b"worker.job_process" in command.read():
                        return pid
            except FileNotFoundError:
                continue
        return None

    return wait_until(look, "a training process runs") or 0


def is_gone(pid: int) -> Callable[[], bool]:
    def look() -> bool:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0] in ("Z", "X")
        except FileNotFoundError:
            return True

    return look


def test_a_killed_worker_takes_its_training_with_it_and_the_job_ends_once_and_the_same(stack, window, undisturbed):
    """kill -9 of the worker's main process in the middle: the reconciler hands the job to the next one, which goes on
    from the last checkpoint; the policy is the undisturbed job's bit for bit."""
    assert undisturbed["status"] == "succeeded", undisturbed["error"]
    job_id = start(stack, window)
    stack.job_at_step(job_id, 12)
    training = training_process(stack)
    os.kill(stack.process_ids("worker")[0], signal.SIGKILL)
    wait_until(is_gone(training), "the training process dies with its worker", seconds=5)

    job = stack.finished(job_id)
    assert (job["status"], job["bonsai"]["attempts"]) == ("succeeded", 2)
    assert job["fine_tuned_model"] == undisturbed["fine_tuned_model"]


def test_a_worker_frozen_past_its_lease_wakes_up_to_find_that_it_may_do_nothing(stack, window, undisturbed):
    """SIGSTOP of the training for longer than the lease. Whoever owns the job then, it ends once and with the same
    policy. (That a sleeper whose job was taken over changes nothing is tests/worker/test_job_process.py.)"""
    job_id = start(stack, window)
    stack.job_at_step(job_id, 8)
    training = training_process(stack)
    os.kill(training, signal.SIGSTOP)
    key = job_key(job_id)
    wait_until(lambda: int(stack.redis.hget(key, "attempts") or 0) >= 2 or lease_is_over(stack, key), "the lease ends")
    os.kill(training, signal.SIGCONT)
    wait_until(is_gone(training), "the sleeper stops", seconds=30)

    job = stack.finished(job_id)
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", undisturbed["fine_tuned_model"])
    # The only worker of this stack waits for the sleeper: whether the next claim comes before it wakes is a race.
    assert job["bonsai"]["attempts"] in (1, 2)


def lease_is_over(stack: RealStack, key: str) -> bool:
    seconds, microseconds = stack.redis.time()
    until = int(float(stack.redis.hget(key, "lease_until") or 0))
    return until < seconds * 1000 + microseconds // 1000


def test_a_running_job_is_cancelled_within_a_step_and_publishes_nothing(stack, window):
    slow = {"type": "bon_forward_kl", "bon_forward_kl": {"n": N, "steps": 100_000, "prompts_per_step": 4}}
    job_id = stack.start_job(slow, n=N, window=window)
    stack.job_at_step(job_id, 2)
    assert stack.http.post(f"/distill/{job_id}/cancel").status_code in (200, 202)
    job = stack.finished(job_id, seconds=20)
    assert (job["status"], job["fine_tuned_model"]) == ("cancelled", None)
    again = stack.http.post(f"/distill/{job_id}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_finished")


def test_redis_away_and_back_costs_no_answer_and_no_group(stack):
    """Redis is killed and stays away while answers go out: the gateway's spool holds their groups, in order."""
    stack.signal_all("redis", signal.SIGSTOP)
    try:
        replies = [stack.generate(prompt, n=2) for prompt in training_prompts()[200:206]]
        assert stack.http.get("/ready").status_code == 200
    finally:
        stack.signal_all("redis", signal.SIGCONT)
    wanted = [reply["id"] for reply in replies]

    def delivered() -> bool:
        try:
            return set(wanted) <= {group.id for group in stack.groups()}
        except redis.RedisError:
            return False

    wait_until(delivered, "the groups are delivered")
    assert [group.id for group in stack.groups() if group.id in wanted] == wanted


def test_an_answer_that_went_out_before_the_gateway_was_killed_has_its_group_once(stack):
    lives = stack.lives("gateway")
    stack.signal_all("redis", signal.SIGSTOP)
    try:
        reply = stack.generate(training_prompts()[210], n=4)
        stack.signal_all("gateway", signal.SIGKILL)
    finally:
        stack.signal_all("redis", signal.SIGCONT)

    def deliveries() -> int:
        return [group.id for group in stack.groups()].count(reply["id"])

    stack.wait_for_life_after("gateway", lives)
    wait_until(deliveries, "the next gateway delivers the group")
    stack.generate(training_prompts()[211], n=1)
    assert deliveries() == 1


def test_after_an_engine_restart_the_policies_are_back_without_anyones_hand(stack, undisturbed):
    """The engine forgets its adapters when it dies. Until a policy is proved again it is refused, never answered by
    base weights under its name."""
    policy = stack.served(undisturbed["fine_tuned_model"])["id"]
    forced = {"x-bonsai-arm": f"{policy}:1"}
    body = {"prompt": "Review", "max_tokens": 8}
    assert stack.http.post("/generate", json=body, headers=forced).status_code == 200
    stack.kill_and_wait("policy")

    seen: set[int] = set()

    def answers_again() -> bool:
        reply = stack.http.post("/generate", json=body, headers=forced)
        seen.add(reply.status_code)
        return bool(reply.status_code == 200 and reply.json()["policy"] == policy)

    wait_until(answers_again, "the policy is served again", seconds=60)
    assert seen <= {200, 502, 503}

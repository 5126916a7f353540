"""The training process under kill -9, a dead parent and a frozen clock. Real processes, forked off one that has the
libraries loaded where it does not matter who started them; each waits for a condition, with a deadline."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
import torch
from safetensors.torch import load

from bon_algos.contracts import JobSpec, Method, job_key
from tests.worker import forks, world
from tests.worker.forks import is_alive, is_frozen, train
from worker import checkpoint, tasks
from worker.crew import LOST_A_RANK
from worker.job_process import read_tokenizer
from worker.lease import Claim, claim

pytestmark = pytest.mark.slow

TENANT = "acme"
JOB = "job_2"
STEPS = 40
SPEC = JobSpec(
    method=Method(
        type="bon_regression",
        bon_regression={"steps": STEPS, "prompts_per_step": 4, "n": 8, "lora_rank": 8, "huber_delta": 2.0},
    ),
    n=8,
    held_out_fraction=0.3,
)
SECONDS = 120.0
LEASE_SECONDS = 8
"""Long enough that a busy machine does not lose it by itself."""


@pytest.fixture
def environment(redis_url, engine, tiny_policy, reward_directory, tmp_path):
    settings = {
        "REDIS_URL": redis_url,
        "ARTEFACTS": tmp_path,
        "LEASE_SECONDS": LEASE_SECONDS,
        "HEARTBEAT_SECONDS": 1,
        "POLICY_ENGINE_URLS": json.dumps([engine.url]),
        "REWARD_MODEL": world.reward_model(engine.url, reward_directory).model_dump_json(),
        "POLICY_DIRECTORY": tiny_policy,
        "BASE_POLICY_ID": world.BASE,
        "MAX_MODEL_LEN": 64,
        "CHECKPOINT_STEPS": 5,
        "TORCH_THREADS": 1,
        "DEVICE": "cpu",
    }
    return os.environ | {f"BONSAI_{name}": str(value) for name, value in settings.items()}


@pytest.fixture
def client(redis_url, tiny_groups, reward_directory):
    """The ledger is a tenant's: a job that is not that tenant's learns nothing from it."""
    ours = {"reward_template_digest": read_tokenizer(reward_directory).template_digest, "tenant": TENANT}
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        world.deliver(connection, *(group.model_copy(update=ours) for group in tiny_groups))
        yield connection


def submit(client):
    client.delete(job_key(JOB))
    asked = {"spec": SPEC.model_dump_json(), "tenant": TENANT}
    client.hset(job_key(JOB), mapping={"state": "queued", "epoch": 0, "attempts": 0, **asked})


@pytest.fixture
def start(client, environment):
    """start() -> claim and train, as the task does; the process. None outlives its test."""
    started = []

    def one():
        started.append(start_training(client, environment))
        return started[-1]

    yield one
    for process in started:
        process.kill()  # a stopped process dies of it too
        process.join()


def start_training(client, environment):
    until(
        lambda: not isinstance(claim(client, JOB, lease_seconds=LEASE_SECONDS, worker="here:1"), str),
        "the lease is free",
    )
    epoch, name = client.hmget(job_key(JOB), ["epoch", "claim"])
    own = Claim(int(epoch), name)
    return train(JOB, own, environment, Path(environment["BONSAI_ARTEFACTS"]) / f"{epoch}.log")


def until(condition, what):
    return forks.until(condition, what, seconds=SECONDS)


def code_of(process):
    """How it ended, waited for."""
    process.join(SECONDS)
    return process.exitcode


def freeze_between_states(process, jobs):
    """SIGSTOP, let go and given again while a state lies written and confirmed but not yet renamed."""

    def frozen():
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: is_frozen(process.pid), "it is stopped")
        if not list(jobs.glob("*/.step-*")):
            return True
        os.kill(process.pid, signal.SIGCONT)
        return False

    until(frozen, "a moment between two states")


def step_reached(client):
    return int(client.hget(job_key(JOB), "step") or 0)


def run_to_its_end(client, start):
    process = start()
    assert code_of(process) == 0
    assert client.hget(job_key(JOB), "state") == "succeeded"
    return client.hget(job_key(JOB), "policy_id")


def adapter_of(environment, policy_id):
    (home,) = (Path(environment["BONSAI_ARTEFACTS"]) / "policies").glob(f"{policy_id.removeprefix('pol-')}*")
    return (home / "adapter_model.safetensors").read_bytes()


def test_a_job_killed_twice_ends_once_with_the_very_bytes_of_one_that_was_not(client, environment, start):
    submit(client)
    policy_id = run_to_its_end(client, start)
    expected = adapter_of(environment, policy_id)
    submit(client)
    (Path(environment["BONSAI_ARTEFACTS"]) / "policies").rename(Path(environment["BONSAI_ARTEFACTS"]) / "first")
    for killed_at in (7, 23):
        process = start()
        until(lambda at=killed_at: step_reached(client) >= at, f"step {killed_at}")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kept = checkpoint.newest(Path(environment["BONSAI_ARTEFACTS"]) / "jobs" / JOB)
        assert kept is not None
        assert step_reached(client) - kept.step <= 5  # the interval between two states
    again = run_to_its_end(client, start)
    assert adapter_of(environment, again) == expected
    assert again == policy_id
    assert client.hget(job_key(JOB), "attempts") == "3"


def test_a_process_frozen_past_its_lease_wakes_to_nothing(client, environment, start):
    submit(client)
    frozen = start()
    until(lambda: step_reached(client) >= 6, "step 6")
    jobs = Path(environment["BONSAI_ARTEFACTS"]) / "jobs" / JOB
    freeze_between_states(frozen, jobs)
    states, step = set(jobs.glob("1-*/step-*")), step_reached(client)
    successor = start()  # waits for the lease to run out
    until(
        lambda: client.hget(job_key(JOB), "attempts") == "2" and step_reached(client) > step,
        "the successor further than the frozen one",
    )
    os.kill(frozen.pid, signal.SIGCONT)
    assert code_of(frozen) == 0  # it stops by itself, and leaves the state alone
    assert set(jobs.glob("1-*/step-*")) <= states
    assert code_of(successor) == 0
    assert client.hget(job_key(JOB), "state") == "succeeded"
    assert len(list((Path(environment["BONSAI_ARTEFACTS"]) / "policies").iterdir())) == 1


def test_training_dies_with_whoever_started_it(client, environment):
    """kill -9 of the Celery child, or of the worker above it, leaves no process that holds a device."""
    submit(client)
    own = claim(client, JOB, lease_seconds=60, worker="here:1")
    assert not isinstance(own, str)
    code = (
        "import os, subprocess, sys;"
        f"p = subprocess.Popen([sys.executable, '-m', 'worker.job_process', '{JOB}', '{own.token}', str(os.getpid())],"
        " start_new_session=True); print(p.pid, flush=True); p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    training = int(parent.stdout.readline())
    until(lambda: client.hget(job_key(JOB), "phase") is not None, "the job has begun")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not is_alive(training), "no training process")


def test_a_process_that_dies_gives_its_job_back_with_the_end_of_its_log(client, environment, monkeypatch, tmp_path):
    submit(client)
    for name, value in environment.items():
        if name.startswith("BONSAI_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("BONSAI_POLICY_DIRECTORY", str(tmp_path / "nothing"))
    tasks.distill(JOB, redis_url=environment["BONSAI_REDIS_URL"], artefacts=tmp_path, lease_seconds=60, processes=3)
    assert client.hget(job_key(JOB), "state") == "running"
    spent, on_devices = client.hmget(job_key(JOB), ["spent_ms", "gpu_ms"])
    assert int(on_devices) == 3 * int(spent) > 0
    assert client.hget(job_key(JOB), "lease_until") == "0"
    assert "training process ended with 1" in client.hget(job_key(JOB), "last_error")
    assert "nothing" in client.hget(job_key(JOB), "last_error")


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def follower_of(process):
    """The pid of the second rank."""
    (pid,) = children_of(process)
    return pid


def test_a_rank_that_dies_ends_the_attempt_and_the_next_ends_where_one_process_does(client, environment, start):
    """kill -9 of the second of two processes: the first is gone within seconds, and another attempt goes on."""
    artefacts = Path(environment["BONSAI_ARTEFACTS"])
    submit(client)
    expected = load(adapter_of(environment, run_to_its_end(client, start)))
    submit(client)
    (artefacts / "policies").rename(artefacts / "first")
    environment["BONSAI_TRAIN_PROCESSES"] = "2"
    process = start()
    until(lambda: step_reached(client) >= 6, "step 6")
    os.kill(follower_of(process), signal.SIGKILL)
    died_at = time.monotonic()
    assert code_of(process) == LOST_A_RANK
    assert time.monotonic() - died_at < 20
    client.hset(job_key(JOB), "lease_until", 0)  # as the task does when its process fails
    found = load(adapter_of(environment, run_to_its_end(client, start)))
    assert client.hget(job_key(JOB), "attempts") == "2"
    for name, factor in expected.items():
        torch.testing.assert_close(found[name], factor, rtol=0, atol=1e-4)


def test_all_ranks_end_with_the_first_and_when_the_job_is_cancelled(client, environment, start):
    environment["BONSAI_TRAIN_PROCESSES"] = "2"
    submit(client)
    process = start()
    until(lambda: step_reached(client) >= 1, "the first step")
    follower = follower_of(process)
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not is_alive(follower), "no second rank")
    client.hset(job_key(JOB), "lease_until", 0)
    process = start()
    until(lambda: len(children_of(process)) == 1, "a second rank")
    follower = follower_of(process)
    client.hset(job_key(JOB), "cancel", 1)
    assert code_of(process) == 0
    assert client.hget(job_key(JOB), "state") == "cancelled"
    assert not is_alive(follower)


def test_a_message_for_a_job_that_is_held_starts_nothing(client, environment, tmp_path):
    submit(client)
    claim(client, JOB, lease_seconds=60, worker="elsewhere:1")
    tasks.distill(JOB, redis_url=environment["BONSAI_REDIS_URL"], artefacts=tmp_path, lease_seconds=60, processes=1)
    assert client.hget(job_key(JOB), "attempts") == "1"
    assert not (tmp_path / "jobs").exists()

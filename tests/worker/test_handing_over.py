"""Rows F41 to F44: jobs that cannot succeed, that share a device, that are moved in a deployment, that another version
has submitted. Real processes, a real Redis, an engine over HTTP."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
import torch

from bon_algos.contracts import POLICIES_INDEX, job_key
from tests.worker.forks import until
from tests.worker.small_job import SPEC
from worker import checkpoint
from worker.device import locks_of, sole_use
from worker.errors import LeaseLost

pytestmark = pytest.mark.slow


def alike(groups):
    """Every candidate is worth the same."""
    for group in groups:
        drawn = tuple(one.model_copy(update={"reward": 1.0, "finish_reason": "stop"}) for one in group.candidates)
        yield group.model_copy(update={"candidates": drawn})


@pytest.mark.parametrize(
    ("code", "groups_of"),
    [
        ("empty_window", lambda groups: []),
        ("rewards_all_equal", alike),
        ("too_few_prompts", lambda groups: groups[:1]),
    ],
)
def test_F41_a_job_that_cannot_succeed_fails_at_once_with_the_reason(code, groups_of, small, small_groups):
    """A loss that is no number is in test_checkpoint."""
    job = small(list(groups_of(small_groups)))
    assert job.run() == 0
    assert (job.state, job.value("error_code"), job.attempts) == ("failed", code, 1), job.told()
    assert job.value("error_message")
    assert (job.published(), job.client.zcard(POLICIES_INDEX), job.leftovers()) == ([], 0, [])


HOLDER = """
import sys, threading
from pathlib import Path
from worker.device import locks_of, sole_use
with sole_use(Path(sys.argv[1]), lambda seconds: None):
    print("held", flush=True)
    threading.Event().wait()
"""


def test_F42_a_second_job_waits_for_the_device_until_the_first_is_dead(tmp_path):
    """On a CPU machine the lock is taken by hand; on one with a GPU its name is the GPU's."""
    lock, waited, has_it = tmp_path / "devices" / "GPU-1.lock", threading.Event(), threading.Event()
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"held\n"

    def wait(seconds):
        waited.set()
        threading.Event().wait(0.01)

    def second():
        with sole_use(lock, wait):
            has_it.set()

    other = threading.Thread(target=second)
    other.start()
    assert waited.wait(10)
    assert not has_it.is_set()
    first.kill()
    assert has_it.wait(10)
    other.join()
    first.wait()
    first.stdout.close()


def test_F42_the_lock_of_a_gpu_is_its_own_whatever_number_a_job_knows_it_by(tmp_path, monkeypatch):
    """Two jobs that see the same two GPUs in either order take the same locks in the same order."""

    def seen_as(*uuids):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=uuids[number]))

    cuda, both = torch.device("cuda"), [tmp_path / "devices" / f"{name}.lock" for name in ("GPU-1", "GPU-2")]
    seen_as("GPU-1", "GPU-2")
    assert locks_of(tmp_path, cuda, 2) == both
    assert locks_of(tmp_path, cuda, 1) == both[:1]
    seen_as("GPU-2", "GPU-1")
    assert locks_of(tmp_path, cuda, 4) == both
    assert locks_of(tmp_path, cuda, 1) == both[1:]
    assert locks_of(tmp_path, torch.device("cpu"), 2) == []


def test_F42_who_loses_its_job_while_it_waits_for_the_device_waits_no_longer(tmp_path):
    def fenced(seconds):
        raise LeaseLost("fenced")

    lock = tmp_path / "GPU-1.lock"
    with sole_use(lock, fenced), pytest.raises(LeaseLost), sole_use(lock, fenced):
        raise AssertionError("two have it")


@pytest.mark.parametrize("point", ["checkpoint.renamed", "progress.asked:4", "adapter.lent:5"])
def test_F43_a_job_whose_worker_is_asked_to_stop_goes_on_elsewhere_and_has_lost_nothing(point, small, undisturbed):
    """Between two steps, within one, and while its policy is judged."""
    job = small()
    worker, training = job.frozen_at(point)
    os.kill(training, signal.SIGTERM)
    os.kill(training, signal.SIGCONT)
    worker.join(30)
    assert (worker.exitcode, job.state, job.is_held, job.attempts) == (0, "queued", False, 0), job.told()
    kept = checkpoint.newest(job.directory)
    assert kept is not None
    assert kept.step >= job.step
    job.run_to_its_end(deliveries=1)
    assert f"resumed at step {kept.step}" in (job.directory / "2.log").read_text()
    assert job.the_policy().manifest.digest == undisturbed
    assert (job.attempts, job.ends(), job.leftovers()) == (1, ["succeeded"], [])


DELIVERY = """
import sys
from pathlib import Path
from worker import tasks
tasks.distill("job_1", redis_url=sys.argv[1], artefacts=Path(sys.argv[2]), lease_seconds=60, processes=1)
"""


@pytest.mark.parametrize("whom", ["the worker's child", "the training alone"])
def test_F43_a_job_whose_process_was_still_loading_is_handed_over_too(whom, redis_url, tmp_path):
    """Who trains cannot say that it heard: only who was asked to stop knows that nothing has failed."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        client.hset(job_key("job_1"), mapping={"state": "queued", "epoch": 0, "attempts": 0})
        with subprocess.Popen([sys.executable, "-c", DELIVERY, redis_url, str(tmp_path)]) as delivery:
            children = Path(f"/proc/{delivery.pid}/task/{delivery.pid}/children")
            training = int(until(children.read_text, "a training process"))
            until(lambda: b"job_process" in Path(f"/proc/{training}/cmdline").read_bytes(), "its own program")
            is_asked = whom == "the worker's child"
            os.kill(delivery.pid if is_asked else training, signal.SIGTERM)
            assert delivery.wait(60) == 0
        job = client.hgetall(job_key("job_1"))
    assert (job["state"], job["lease_until"]) == ("queued" if is_asked else "running", "0")
    assert (job["attempts"], job.get("parked")) == ("1", "1" if is_asked else None)
    assert ("ended with -15" in job.get("last_error", "")) != is_asked


def test_F44_what_a_newer_gateway_adds_to_a_jobs_record_is_passed_over(small, undisturbed):
    job = small()
    job.client.hset(job_key(job.job_id), mapping={"colour": "green", "schema_version": 9})
    job.client.xadd("bonsai:ledger", {"kind": "group", "id": "g-9", "data": b"of another version"})
    job.client.xadd("bonsai:ledger", {"kind": "dream", "id": "d-9", "data": b""})
    job.run()
    assert job.the_policy().manifest.digest == undisturbed


@pytest.mark.parametrize("field", ["colour", "method"])
def test_F44_a_spec_of_another_version_is_refused_with_a_state_and_the_field(field, small):
    """What it asks for is not known here: to train something else instead would be worse than nothing."""
    job = small()
    spec = SPEC.model_dump() | {field: {"type": "dreaming", "dreaming": {}} if field == "method" else "green"}
    job.client.hset(job_key(job.job_id), "spec", json.dumps(spec))
    assert job.run() == 0
    assert (job.state, job.value("error_code"), job.attempts) == ("failed", "spec_not_understood", 1)
    assert field in job.value("error_message")
    assert (job.leftovers(), job.published()) == ([], [])

"""What attempts leave is removed when nobody can want it any more, and not before."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import redis

from bon_algos.contracts import POLICIES_INDEX, job_key, policy_key, report_digest
from bon_algos.crash_points import CRASH_AT
from tests.service.published import write_policy
from tests.service.records import policy
from worker import attempts


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


def left(job_directory):
    return sorted(path.name for path in job_directory.iterdir())


def test_F22_an_epoch_that_redis_gives_twice_gets_two_directories(tmp_path):
    """After a power cut Redis may not remember the last claim."""
    assert attempts.begin(tmp_path, 3) != attempts.begin(tmp_path, 3)


def test_an_attempt_that_needs_the_earlier_ones_no_longer_leaves_the_later_ones_alone(tmp_path):
    """It may have been frozen between its last confirmation and this, and have a successor."""
    first, twin, own, later = (attempts.begin(tmp_path, epoch) for epoch in (1, 2, 2, 3))
    (tmp_path / "window").mkdir()
    (tmp_path / "1.log").touch()
    attempts.forget_before(own)
    assert left(tmp_path) == sorted(["window", "1.log", twin.name, own.name, later.name])
    assert not first.exists()


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_of_a_job_that_has_ended_the_window_and_the_logs_stay(client, tmp_path, state):
    directory = tmp_path / "jobs" / "job_1"
    attempt = attempts.begin(directory, 1)
    (attempt / "step-00000004").mkdir()
    (directory / "window").mkdir()
    (directory / "1.log").touch()
    client.hset(job_key("job_1"), "state", state)
    attempts.sweep(client, tmp_path)
    assert left(directory) == ["1.log", "window"]


@pytest.mark.parametrize("state", ["queued", "running", "paused", None])
def test_of_a_job_that_may_go_on_and_of_one_that_redis_has_forgotten_everything_stays(client, tmp_path, state):
    attempt = attempts.begin(tmp_path / "jobs" / "job_1", 1)
    if state is not None:
        client.hset(job_key("job_1"), "state", state)
    attempts.sweep(client, tmp_path)
    assert attempt.exists()


def test_a_place_without_jobs_and_policies_is_swept_without_complaint(client, tmp_path):
    attempts.sweep(client, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- what was written and is in no registry --------------------------------------------------------------


def aged(directory):
    """It lies there since more than a day."""
    a_day_ago = time.time() - attempts.ORPHAN_SECONDS - 1
    os.utime(directory, (a_day_ago, a_day_ago))
    return directory


@pytest.mark.parametrize(
    ("state", "published_by", "stays"),
    [("failed", None, False), ("succeeded", "job_1", True), ("failed", "job_2", True), ("running", None, True)],
)
def test_a_policy_that_a_job_succeeded_with_stays_whoever_wrote_it_and_whatever_the_registry_holds(
    client, tmp_path, state, published_by, stays
):
    """After Redis was lost `bonsai rebuild` restores jobs, and no policy whose files it could not read. Of the two jobs
    the first one wrote the directory."""
    written = write_policy(tmp_path)
    home = aged(tmp_path / "policies" / written.digest)
    for job_id in ("job_1", "job_2"):
        (tmp_path / "jobs" / job_id).mkdir(parents=True)
        client.hset(job_key(job_id), "state", "failed")
    client.hset(job_key("job_1"), "state", state)
    if published_by is not None:
        client.hset(job_key(published_by), mapping={"state": "succeeded", "policy_id": written.policy_id})
    attempts.sweep(client, tmp_path)
    assert home.exists() == stays


def reported(artefacts, number, manifest=None):
    """The aged directory of a report, and the manifest that names it, changed in place where it lies there."""
    files = {"report.json": str(number) * 64}
    report = artefacts / "reports" / report_digest(files)
    report.mkdir(parents=True)
    (report / "report.json").write_text("{}")
    if manifest is not None:
        manifest = manifest.model_copy(update={"report_files": files})
        (artefacts / "policies" / manifest.digest / "manifest.json").write_text(manifest.model_dump_json())
    return aged(report), manifest


def test_a_report_that_no_policy_names_goes_after_a_day(client, tmp_path):
    """Its job was killed, fenced or cancelled before the policy had its name. One policy is registered and has its
    files elsewhere, one lies there and is not registered."""
    lost, _ = reported(tmp_path, 1)
    lying, _ = reported(tmp_path, 2, write_policy(tmp_path))
    registered, written = reported(tmp_path, 3, write_policy(tmp_path, {"adapter_config.json": b"{}"}))
    shutil.rmtree(tmp_path / "policies" / written.digest)
    record = policy(written.policy_id, written=written)
    client.hset(policy_key(record.id), "record", record.model_dump_json())
    client.zadd(POLICIES_INDEX, {record.id: 1.0})
    fresh, _ = reported(tmp_path, 4)
    os.utime(fresh)
    attempts.sweep(client, tmp_path)
    assert [one.exists() for one in (lost, lying, registered, fresh)] == [False, True, True, True]


def test_what_an_import_that_was_killed_has_written_goes_after_a_day(client, tmp_path):
    lost, fresh = (tmp_path / "policies" / f".{number * 64}.12345678" for number in "12")
    for directory in (lost, fresh):
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
    aged(lost)
    attempts.sweep(client, tmp_path)
    assert [one.name for one in (tmp_path / "policies").iterdir()] == [fresh.name]


def test_while_a_policy_does_not_say_which_report_is_its_own_all_stay(client, tmp_path):
    lost, _ = reported(tmp_path, 1)
    (tmp_path / "policies" / write_policy(tmp_path).digest / "manifest.json").write_text("{")
    attempts.sweep(client, tmp_path)
    assert lost.exists()


SWEEP = """
import pathlib, sys
import redis
from worker import attempts
attempts.sweep(redis.Redis.from_url(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["attempts.forgotten", "orphan.renamed", "report.removed"])
def test_what_a_sweep_began_to_remove_the_next_one_removes(point, client, redis_url, tmp_path):
    """Killed once it has removed, or named for removal, the first of what it found."""
    for number in (1, 2):
        attempts.begin(tmp_path / "jobs" / f"job_{number}", 1)
        client.hset(job_key(f"job_{number}"), "state", "failed")
        aged(tmp_path / "policies" / write_policy(tmp_path, {"adapter_config.json": b"{}" * number}).digest)
        reported(tmp_path, number)
    command = [sys.executable, "-c", SWEEP, redis_url, str(tmp_path)]
    assert subprocess.run(command, env=os.environ | {CRASH_AT: point}).returncode == -9
    assert left(tmp_path / "reports")
    for home in (tmp_path / "policies").iterdir():
        assert home.name.startswith(attempts.DOOMED) or (home / "manifest.json").exists()
    attempts.sweep(client, tmp_path)
    assert [left(tmp_path / name) for name in ("policies", "reports", "jobs/job_1", "jobs/job_2")] == [[], [], [], []]

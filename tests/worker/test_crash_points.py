"""A worker that dies at any write ends its job once, with the policy of a worker that did not. Real processes, a real
Redis, an engine over HTTP; one job for every place."""

import os
import signal

import pytest

from bon_algos.crash_points import CRASH_AT, WORKER_POINTS
from tests.worker.forks import until
from worker import checkpoint

pytestmark = pytest.mark.slow
GIVING_BACK = ("release.asked", "release.recorded")
PARKING = ("park.asked", "park.recorded")
SWEEPING = ("orphan.renamed", "report.removed")
"""Seen in test_attempts."""
LATER_PASSES = ("checkpoint.renamed:3", "progress.recorded:3", "adapter.lent:5")
"""Between two states of several, between two reports of steps, and while the finished policy is judged."""


def dies(job, point):
    """Deliver the job to a worker, or a training process below it, that is killed at this place."""
    code = job.run(**{CRASH_AT: point})
    killed = code == -9 or "ended with -9" in (job.artefacts / "deliveries.log").read_text()
    assert killed, f"{point} was never passed\n{job.told()}"


def ends_once_with(job, digest):
    assert job.the_policy().manifest.digest == digest
    assert (job.ends(), job.leftovers()) == (["succeeded"], [])
    assert job.attempts <= 2


@pytest.mark.parametrize(
    "point", [*(point for point in WORKER_POINTS if point not in GIVING_BACK + PARKING + SWEEPING), *LATER_PASSES]
)
def test_a_worker_killed_at_a_write_costs_the_job_nothing(point, small, undisturbed, engine):
    job = small()
    dies(job, point)
    job.run_to_its_end()
    ends_once_with(job, undisturbed)
    assert engine.adapters == {}


@pytest.mark.parametrize("point", GIVING_BACK)
def test_a_worker_killed_while_it_gives_a_job_back_has_given_it_back(point, small, undisturbed, engine):
    job = small(settings={"ENGINE_PATIENCE_SECONDS": 0.1})
    engine.is_away = True
    dies(job, point)
    engine.is_away = False
    until(lambda: not job.is_held, "the lease runs out")
    job.run_to_its_end()
    ends_once_with(job, undisturbed)


@pytest.mark.parametrize("point", PARKING)
def test_a_worker_killed_while_it_parks_a_job_has_its_state_kept(point, small, undisturbed, engine):
    """It was asked to stop between two steps. Killed before it said so, it counts as dead."""
    job = small()
    worker, training = job.frozen_at("checkpoint.renamed:2", **{CRASH_AT: point})
    os.kill(training, signal.SIGTERM)
    os.kill(training, signal.SIGCONT)
    worker.join(30)
    assert "ended with -9" in (job.artefacts / "deliveries.log").read_text(), job.told()
    assert job.state == ("queued" if point == "park.recorded" else "running")
    kept = checkpoint.newest(job.directory)
    assert kept is not None
    assert kept.step >= 2
    job.run_to_its_end()
    ends_once_with(job, undisturbed)
    assert engine.adapters == {}

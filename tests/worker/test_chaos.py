"""Random faults, a fixed seed: every job once, every policy the right one. `python -m benchmarks.chaos` runs longer."""

import pytest

from benchmarks.chaos import endure
from benchmarks.chaos_world import chaos_world

pytestmark = pytest.mark.slow
JOBS = 3


@pytest.mark.timeout(600)
def test_jobs_under_random_faults_end_once_with_the_policy_of_one_in_peace():
    with chaos_world(seed=7, num_workers=2) as world:
        world.learn_the_right_policy()
        endure(world, JOBS, pause_seconds=2.0)
        assert (world.right_jobs(), world.strangers()) == (JOBS, 0), world.faults
        assert len(world.faults) >= JOBS

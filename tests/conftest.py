"""What every test may ask for: a real Redis, and one real stack for the whole session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.fixtures.real_stack import RealStack, real_stack

pytest_plugins = ["tests.fixtures.redis", "tests.fixtures.clock"]

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

QUICK = {
    "BONSAI_LEASE_SECONDS": "6",
    "BONSAI_HEARTBEAT_SECONDS": "1",
    "BONSAI_CHECKPOINT_STEPS": "5",
    "BONSAI_CHECKPOINT_SECONDS": "5",
    "BONSAI_RECONCILE_SECONDS": "1",
}
"""A lost worker is noticed within seconds instead of a minute; nothing else differs from what users run."""


def pytest_xdist_auto_num_workers() -> int:
    """Many tests wait, for processes and for clocks, about as long as others compute."""
    return len(os.sched_getaffinity(0)) + 2


@pytest.fixture(scope="session")
def stack() -> Iterator[RealStack]:
    """Redis, both engines with the demo models, a Celery worker and the gateway: what `bonsai up` starts."""
    with (
        tempfile.TemporaryDirectory(prefix="bonsai-test-") as directory,
        real_stack(Path(directory), environment={**os.environ, **QUICK}) as running,
    ):
        yield running

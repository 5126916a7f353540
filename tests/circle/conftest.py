"""A second stack for what the demo's models cannot show."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.circle.random_models import write_policy, write_reward_model
from tests.fixtures.real_stack import RealStack, real_stack


@pytest.fixture(scope="package")
def foreign() -> Iterator[RealStack]:
    """A stack of its own, since engines hold one model: Qwen3 with a byte-level tokenizer and ChatML."""
    with tempfile.TemporaryDirectory(prefix="bonsai-foreign-") as name:
        directory = Path(name)
        write_policy(directory / "policy")
        write_reward_model(directory / "reward")
        with real_stack(
            directory,
            policy=str(directory / "policy"),
            reward=str(directory / "reward"),
            reward_pairs="none",
            environment={**os.environ, "BONSAI_RECONCILE_SECONDS": "1"},
        ) as running:
            yield running

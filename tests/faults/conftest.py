"""What the tests of this folder share: a fixed part of the ledger, and the policy a job made of it undisturbed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bonsai.demo.prompts import training_prompts
from tests.faults.imitation import N, start
from tests.fixtures.real_stack import RealStack


@pytest.fixture(scope="session")
def window(stack: RealStack) -> dict[str, float]:
    """A fixed part of the ledger, so that two jobs learn from the very same candidates."""
    since = time.time()
    stack.fill_ledger(list(training_prompts()[100:130]), N)
    return {"since": since, "until": time.time()}


@pytest.fixture(scope="session")
def undisturbed(stack: RealStack, window: dict[str, float]) -> dict[str, Any]:
    return stack.finished(start(stack, window))

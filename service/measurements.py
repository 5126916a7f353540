"""Rewards of single samples, measured after their replies went out.

Owns: the tasks that do it, their number, their patience with a reward model that is away. Does not own: the records
(bon_algos/contracts/), delivering them (ledger.py). A reward that was not measured is in the ledger as None. A reward
model that may not choose measures nothing either: its rewards would decide experiments and trials.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from bon_algos.contracts import CandidateGroup
from service.best_of_n import Scorer, measure, outcome_of
from service.errors import GatewayError
from service.ledger import Ledger
from service.reward_test import RewardModelRefused, RewardTest

AT_ONCE: Final = 8
MAX_WAITING: Final = 10_000
FIRST_PAUSE_SECONDS: Final = 0.5
PATIENCE_SECONDS: Final = 60.0
CALL_SECONDS: Final = 30.0
log = logging.getLogger("bonsai.measurements")


class Measurements:
    """The measurements of one gateway process that are still to come."""

    def __init__(self, reward_model: Scorer, reward_test: RewardTest, ledger: Ledger) -> None:
        self._reward_model = reward_model
        self._reward_test = reward_test
        self._ledger = ledger
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        return len(self._tasks)

    def start(self, group: CandidateGroup) -> None:
        """Measure a group whose answer is out, and append the outcome."""
        if len(self._tasks) >= MAX_WAITING:
            log.error("%d measurements wait already: %s stays without a reward", MAX_WAITING, group.id)
            self._ledger.append(outcome_of(group))
            return
        task = asyncio.create_task(self._measure(group))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, seconds: float) -> None:
        """Wait for what was started, then stop the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        rest = list(self._tasks)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _measure(self, group: CandidateGroup) -> None:
        loop = asyncio.get_running_loop()
        give_up, pause = loop.time() + PATIENCE_SECONDS, FIRST_PAUSE_SECONDS
        while True:
            try:
                self._reward_test.require_passed()
                async with self._turns, asyncio.timeout(CALL_SECONDS):
                    group = await measure(group, self._reward_model)
                break
            except RewardModelRefused:
                break
            except (GatewayError, TimeoutError) as error:
                if loop.time() + pause > give_up:
                    log.warning("%s stays without a reward: %s", group.id, error)
                    break
            await asyncio.sleep(pause)
            pause *= 2
        self._ledger.append(outcome_of(group))

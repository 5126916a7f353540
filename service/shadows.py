"""What a shadow would have said: drawn beside the answer that was served, logged, and seen by nobody.

Owns: which requests are among a shadow's share, the tasks that draw, how many at one time, what became of them in this
process, the alarm. Does not own: starting and ending a trial (trials.py), rewards (measurements.py), the sums over all
gateways (the ledger's drainer).

A shadow takes its turn among all requests as a caller of its own and is charged to nobody. It never delays an answer:
it begins when one is out, and what has no place is counted and left out.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from time import monotonic, time
from typing import Final

from bon_algos.contracts import SHADOW_PREFIX, Arm, CandidateGroup, Route, Trial
from service.access import Caller
from service.best_of_n import Budget, Policy, Scorer, best_of_n
from service.catalogue import Catalogue
from service.errors import GatewayError
from service.experiments import BUCKETS, bucket, exposure_of
from service.ledger import Ledger
from service.limits import SHADOW_KEY, Limits
from service.measurements import Measurements
from service.trials import SILENT_AFTER

AT_ONCE: Final = 8
log = logging.getLogger("bonsai.shadows")


class Shadows:
    """The shadows of one gateway process."""

    def __init__(
        self,
        engine: Policy,
        reward_model: Scorer,
        limits: Limits,
        ledger: Ledger,
        measurements: Measurements,
        catalogue: Catalogue,
    ) -> None:
        self._engine = engine
        self._reward_model = reward_model
        self._limits = limits
        self._ledger = ledger
        self._measurements = measurements
        self._catalogue = catalogue
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: dict[str, Counter[str]] = {}

    def told(self, trial_id: str) -> dict[str, int]:
        """What became of the requests that this process had for a shadow: `given`, `answered`, `busy` for those that
        found no place, and the code of each failure."""
        return dict(self._told.get(trial_id, {}))

    def start(self, served: CandidateGroup) -> None:
        """Have the route's shadow answer too, if the request is among its share. A forced one never is."""
        route = self._catalogue.of(served.tenant).routes.get(served.route)
        if route is None or route.shadow is None or served.arm_reason == "forced":
            return
        if bucket(served.id, route.shadow.salt) >= route.shadow.share * BUCKETS:
            return
        told = self._told.setdefault(route.shadow.id, Counter())
        if len(self._tasks) >= AT_ONCE:
            told["busy"] += 1
            return
        group = shadow_group(served, route.shadow)
        under_way = ExitStack()
        under_way.enter_context(self._ledger.awaits(group.created_at))
        task = asyncio.create_task(self._answer(group, route, told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: under_way.close())

    async def stop(self) -> None:
        """Nobody waits for them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, group: CandidateGroup, route: Route, told: Counter[str]) -> None:
        told["given"] += 1
        self._ledger.append(exposure_of(group))
        started = monotonic()
        deadline = started + route.deadline_ms / 1000
        budget = Budget(started=started, deadline=deadline, scoring_starts=deadline, quorum=1)
        try:
            async with self._limits.admitted(
                Caller(SHADOW_KEY, group.tenant, "inference"), group, 1, deadline
            ) as admission:
                filled = await best_of_n(group, budget, self._engine, self._reward_model, wait_for_reward=False)
                admission.group = filled.group
            self._ledger.append(filled.group)
            if filled.failure is not None:
                raise filled.failure
        except GatewayError as error:
            told[error.code] += 1
            self._alarm(route, told)
            return
        told["answered"] += 1
        self._measurements.start(filled.group)

    def _alarm(self, route: Route, told: Counter[str]) -> None:
        if told["answered"] == 0 and told["given"] == SILENT_AFTER:
            log.error("ALERT the shadow of route %s answers nothing: %s", route.name, dict(told))


def shadow_group(served: CandidateGroup, trial: Trial) -> CandidateGroup:
    """The same request as one sample of the shadow, not drawn yet. Its id names the group that was served."""
    return served.model_copy(
        update={
            "id": f"{SHADOW_PREFIX}{served.id}",
            "created_at": time(),
            "experiment": trial.id,
            "arm": Arm(policy=trial.policy, n=1),
            "arm_reason": "shadow",
            "policy_id": trial.policy,
            "sampling": served.sampling.model_copy(update={"top_logprobs": 0}),
            "requested": 1,
            "candidates": (),
            "softness": None,
            "selected": None,
            "status": "unscored",
            "stop_reason": "fixed",
            "gain_missed": None,
            "engine_seconds": 0.0,
            "total_seconds": 0.0,
        }
    )


@asynccontextmanager
async def shadowing(shadows: Shadows) -> AsyncGenerator[Shadows]:
    """They end with the block."""
    try:
        yield shadows
    finally:
        await shadows.stop()

"""The distillation that the demo and the circle benchmark order, and the waiting for it.

Owns its parameters, tuned for two processor cores. Does not own what a method does (`bon_algos`) nor how it is
run (`worker`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Final

from bon_algos.contracts import BondSpec, JobSpec, Method, OfflineBondSpec
from bonsai.client import BonsaiClient, Policy
from bonsai.demo.prompts import training_prompts
from bonsai.job_replies import Job

N: Final = 16
"""The best-of-n that one sample of the distilled policy stands in for."""
POPULAR: Final = 12
"""Prompts that come again and again, as in real traffic; their candidates show what ever larger n does."""
TIMES: Final = 16
"""How often each of them comes: with `N` candidates each time, 256 draws of one prompt."""
OTHERS: Final = 224
"""Prompts that come twice: a fresh sample is ranked among 32 of the reference."""
JOB_DEADLINE: Final = 900.0
"""Seconds after which nobody waits for the job any longer."""
SERVED_DEADLINE: Final = 60.0
LOOK_EVERY: Final = 0.5
"""Seconds between two looks."""


class CircleBroken(Exception):
    """The circle did not close; the message says where."""


METHODS: Final = {
    "bond": Method(type="bond", bond=BondSpec(steps=110, prompts_per_step=32, learning_rate=3e-3)),
    "offline_bond": Method(
        type="offline_bond", offline_bond=OfflineBondSpec(steps=75, prompts_per_step=32, learning_rate=3e-3)
    ),
}
"""With fresh samples, which is what the demo shows, and from the log alone."""


def demo_job(seed: int = 0, method: str = "bond") -> JobSpec:
    """What the demo posts to /distill; only the seed differs between repetitions."""
    return JobSpec(method=METHODS[method], n=N, seed=seed)


def logged_prompts() -> list[str]:
    """The prompts of the traffic that fills the ledger, in the order they come: popular ones among the others."""
    popular, others = popular_prompts(), training_prompts()[POPULAR : POPULAR + OTHERS]
    traffic = [*popular * TIMES, *others * 2]
    random.Random(0).shuffle(traffic)
    return traffic


def popular_prompts() -> tuple[str, ...]:
    return training_prompts()[:POPULAR]


async def finished(client: BonsaiClient, job: Job, look: Callable[[Job], None]) -> Job:
    """The job once it has succeeded; `look` sees it on the way. CircleBroken when it ends in another way."""
    deadline = time.monotonic() + JOB_DEADLINE
    while not job.is_final:
        if time.monotonic() > deadline:
            raise CircleBroken(f"{job.id} is not finished after {JOB_DEADLINE:.0f} s")
        await asyncio.sleep(LOOK_EVERY)
        job = await client.job(job.id)
        look(job)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        why = "" if job.error is None else f": {job.error.message} ({job.error.code})"
        raise CircleBroken(f"{job.id} {job.status}{why}")
    return job


async def served(client: BonsaiClient, policy_id: str) -> Policy:
    """The policy once the engine has proved that it serves it. CircleBroken when its fingerprint is refused."""
    deadline = time.monotonic() + SERVED_DEADLINE
    while not (policy := await client.policy(policy_id)).served:
        if policy.fingerprint is not None and not policy.fingerprint.passed:
            raise CircleBroken(f"the engine does not serve {policy_id}: {policy.fingerprint.reason}")
        if time.monotonic() > deadline:
            raise CircleBroken(f"{policy_id} is not served after {SERVED_DEADLINE:.0f} s")
        await asyncio.sleep(LOOK_EVERY)
    return policy

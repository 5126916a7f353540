"""Waiting for the demo's job and its policy, against a gateway that answers from a script."""

import asyncio
from typing import Any

import pytest

from bonsai.client import Policy
from bonsai.demo.job import CircleBroken, demo_job, finished, served
from bonsai.job_replies import Job
from tests.bonsai.scripted_gateway import ScriptedGateway

FINGERPRINT = {"tokens": 300, "mean_abs_difference": 1e-5, "mean_abs_base_distance": 0.4}


def wait_for_job(*looks: dict[str, Any]) -> tuple[Job, list[Job]]:
    seen: list[Job] = []

    async def wait() -> Job:
        async with ScriptedGateway(jobs=looks).client() as client:
            return await finished(client, Job(id="job_1", status="queued"), seen.append)

    return asyncio.run(wait()), seen


def wait_for_policy(*looks: dict[str, Any]) -> Policy:
    async def wait() -> Policy:
        async with ScriptedGateway(policies=looks).client() as client:
            return await served(client, "pol-0123456789abcdef")

    return asyncio.run(wait())


@pytest.mark.slow
def test_a_job_is_watched_until_it_has_succeeded():
    done = {"status": "succeeded", "fine_tuned_model": "pol-0123456789abcdef", "bonsai": {"step": 2, "steps": 2}}
    job, seen = wait_for_job({"status": "running", "bonsai": {"step": 1, "steps": 2}}, done)
    assert job.fine_tuned_model == "pol-0123456789abcdef"
    assert [look.details.step for look in seen] == [1, 2]


def test_a_failed_job_breaks_the_circle_with_its_reason():
    error = {"code": "loss_not_finite", "message": "step 3: loss nan"}
    with pytest.raises(CircleBroken, match=r"job_1 failed: step 3: loss nan \(loss_not_finite\)"):
        wait_for_job({"status": "failed", "error": error})


def test_a_job_that_published_nothing_breaks_the_circle():
    with pytest.raises(CircleBroken, match="job_1 succeeded"):
        wait_for_job({"status": "succeeded", "fine_tuned_model": None})


def test_a_policy_counts_once_its_fingerprint_has_passed():
    proved = {"served": True, "fingerprint": {"passed": True, **FINGERPRINT}}
    assert wait_for_policy({}, proved).served


def test_a_refused_fingerprint_breaks_the_circle():
    refused = {"passed": False, "reason": "the engine is 0.4 nats from the trainer", **FINGERPRINT}
    with pytest.raises(CircleBroken, match=r"0\.4 nats from the trainer"):
        wait_for_policy({"fingerprint": refused})


def test_seeds_differ_in_nothing_else():
    one, other = demo_job(1), demo_job(2)
    assert one != other
    assert one.model_copy(update={"seed": 2}) == other

"""The task behind the one message: `wake_up(job id)`.

Owns the registration under the name the service sends. Does not own the work (`tasks`). It is a shared task because a
spawned child builds the application anew and knows only tasks that importing a module registers.
"""

from __future__ import annotations

from celery import shared_task

from bon_algos.contracts import DISTILL_TASK
from worker import tasks
from worker.settings import BrokerSettings


@shared_task(name=DISTILL_TASK, Request="worker.acknowledging:AcknowledgingRequest")
def wake_up(job_id: str) -> None:
    settings = BrokerSettings()
    tasks.distill(
        job_id,
        redis_url=settings.redis_url,
        artefacts=settings.artefacts,
        lease_seconds=settings.lease_seconds,
        processes=settings.train_processes,
    )

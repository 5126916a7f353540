"""The Celery application: a wake-up bell for jobs.

Owns Celery's settings. Does not own the task (`wake_up`) nor jobs: a job's truth is its record in Redis under a
lease, so a message may arrive twice, late or never (`lease`, and the service's reconciler).

Start one worker per device with

    REMAP_SIGTERM=SIGQUIT python -m celery -A worker.app worker -c 1 \
        --without-gossip --without-mingle --loglevel INFO

REMAP_SIGTERM makes a deployment's SIGTERM a soft shutdown: the job keeps its state and is handed back (`shutdown`),
and the reconciler gives it to the next worker.

It takes from the queues of all priorities: first jobs that have begun, whose worker died or left, then always from the
highest class that has something: while high jobs keep coming, low ones wait. Who wants to promise them something starts
another worker with `-Q bonsai-distill-3-low`.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from celery import Celery
from kombu import Exchange, Queue

from bon_algos.contracts import BROKER_PREFIX, DISTILL_QUEUES
from worker.settings import BrokerSettings

VISIBILITY_SECONDS = 3600
"""After this a message that was not acknowledged is handed out again; a claim then refuses the copy."""

SOFT_SHUTDOWN_SECONDS = 20.0
"""For the step under way and its state; Celery waits all of it when a job runs. Systemd and Kubernetes kill after 30 s
and more."""


def broker_url(redis_url: str) -> str:
    """The address in kombu's spelling: `unix:///path?db=1` is `redis+socket:///path?virtual_host=1` there."""
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    query = f"?{parts.query.replace('db=', 'virtual_host=')}" if parts.query else ""
    return f"redis+socket://{parts.path}{query}"


def create_celery(redis_url: str) -> Celery:
    """A worker that takes one message at a time and keeps nothing of it.

    Each setting is there for a loss or a doubling that its default showed: half-open links that silence the
    worker, a broker outage that destroys a running job, a forked CUDA context.
    """
    celery = Celery(
        "bonsai", broker=broker_url(redis_url), include=["worker.wake_up", "worker.shutdown"], set_as_current=False
    )
    celery.conf.update(
        broker_transport_options={
            "global_keyprefix": BROKER_PREFIX,
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            # A consumer on a half-open link is silent for twice this: 51 s with the default of 25.
            "health_check_interval": 5,
            "visibility_timeout": VISIBILITY_SECONDS,
            # By name, which is by priority: the default takes turns.
            "queue_order_strategy": "sorted",
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_pool="prefork",
        worker_pool_start_method="spawn",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_max_tasks_per_child=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=SOFT_SHUTDOWN_SECONDS,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        # Acknowledged after the run, so that a second copy waits at the broker, not inside a busy worker. A lost
        # child is not put back: the reconciler counts attempts, the broker would loop.
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        result_backend=None,
        accept_content=["json"],
        task_serializer="json",
        task_queues=[Queue(name, Exchange(name), routing_key=name) for name in DISTILL_QUEUES.values()],
        task_default_queue=DISTILL_QUEUES["normal"],
    )
    return celery


def __getattr__(name: str) -> Celery:
    """`celery -A worker.app` asks for `app`: built when asked for, so that importing this module does no work."""
    if name != "app":
        raise AttributeError(name)
    globals()["app"] = create_celery(BrokerSettings().redis_url)
    return globals()["app"]

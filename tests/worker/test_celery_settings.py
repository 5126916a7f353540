"""How a started worker is set, read from the worker itself: each setting whose default loses or doubles a job."""

import json

import pytest

from bon_algos.contracts import BROKER_PREFIX, DISTILL_QUEUES
from tests.fixtures.fault_proxy import FaultProxy
from tests.worker.celery_worker import CeleryWorker
from tests.worker.forks import until
from tests.worker.tell_settings import VARIABLE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(shared_redis, tmp_path_factory):
    """What a worker, connected over TCP as in a fleet, says of itself."""
    directory = tmp_path_factory.mktemp("settings")
    said = directory / "settings.json"
    with FaultProxy(shared_redis.socket) as proxy:
        environment = {"BONSAI_REDIS_URL": proxy.url, "BONSAI_ARTEFACTS": str(directory), VARIABLE: str(said)}
        worker = CeleryWorker(environment, directory / "worker.log", "-I", "tests.worker.tell_settings")
        try:
            until(lambda: said.exists() and said.read_text(), f"settings ({directory}/worker.log)")
        finally:
            worker.kill()
    return json.loads(said.read_text())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("socket_timeout", 10),
        ("socket_connect_timeout", 5),
        ("socket_keepalive", 1),
        ("health_check_interval", 5),
        ("visibility_timeout", 3600),
        ("key_prefix", BROKER_PREFIX),
        ("queues", sorted(DISTILL_QUEUES.values())),
        ("queue_order", "sorted"),
        ("concurrency", 1),
        ("messages_ahead", 1),
        ("pool", "celery.concurrency.prefork"),
        ("start_method", "spawn"),
        ("tasks_per_child", 1),
        ("worker_cancel_long_running_tasks_on_connection_loss", False),
        ("broker_connection_max_retries", None),
        ("broker_connection_retry_on_startup", True),
        ("worker_enable_remote_control", False),
        ("task_acks_late", True),
        ("task_reject_on_worker_lost", False),
        ("task_ignore_result", True),
        ("result_backend", None),
        ("result_backend_class", "DisabledBackend"),
        ("accepted", ["application/json"]),
        ("on_sigterm", "stop"),
    ],
)
def test_a_started_worker_is_set_against_loss_and_doubling(told, setting, value):
    assert told[setting] == value


def test_a_started_worker_gives_a_job_time_to_be_given_back(told):
    assert told["worker_soft_shutdown_timeout"] == 20


def test_a_started_workers_children_are_new_interpreters(told):
    """Spawned, not forked: a device that the parent touched would be unusable in them."""
    (command,) = told["child_commands"]
    assert any("spawn_main" in part for part in command)

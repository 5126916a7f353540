"""The Celery application: each setting that a default would turn into a lost or a doubled job, and its address."""

import pytest
import redis

from bon_algos.contracts import BROKER_PREFIX, DISTILL_QUEUES, DISTILL_TASK, HttpMember, JobPriority, RewardConfig
from service.dispatch import open_producer, send_job
from worker.app import broker_url, create_celery
from worker.settings import WorkerSettings


@pytest.fixture
def celery(redis_url):
    return create_celery(redis_url)


def test_the_nine_settings_against_loss_and_doubling(celery):
    """reliability.md 0.2: half-open links, redelivery, prefetching, forked CUDA contexts, destroyed jobs."""
    transport = celery.conf.broker_transport_options
    assert transport["socket_timeout"] > 1  # kombu's BRPOP answers every second
    assert transport["socket_connect_timeout"] > 0
    assert transport["socket_keepalive"] is True
    assert transport["visibility_timeout"] >= 3600
    assert celery.conf.worker_prefetch_multiplier == 1
    assert celery.conf.worker_concurrency == 1
    assert (celery.conf.worker_pool, celery.conf.worker_pool_start_method) == ("prefork", "spawn")
    assert celery.conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert celery.conf.worker_soft_shutdown_timeout > 0
    assert celery.conf.task_ignore_result is True
    assert celery.conf.result_backend is None


def test_only_json_is_accepted_and_a_child_runs_one_job(celery):
    assert list(celery.conf.accept_content) == ["json"]
    assert celery.conf.task_serializer == "json"
    assert celery.conf.worker_max_tasks_per_child == 1


def test_a_message_lies_under_the_brokers_own_prefix_in_the_queue_of_the_task(celery, redis_url):
    celery.send_task(DISTILL_TASK, args=["job_1"], queue=DISTILL_QUEUES["normal"])
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.llen(f"{BROKER_PREFIX}{DISTILL_QUEUES['normal']}") == 1
        assert all(key.startswith(BROKER_PREFIX) for key in client.scan_iter())


def test_what_has_begun_comes_first_and_then_the_highest_class_that_has_something(celery, redis_url):
    """As the gateway sends, through Celery's own consumer: whatever came first, and again after each message."""
    producer = open_producer(redis_url)
    sent: list[tuple[JobPriority, bool]]
    sent = [("low", False), ("normal", False), ("high", False), ("low", True), ("high", True)]
    for priority, begun in sent:
        send_job(producer, f"{priority} {begun}", priority, begun)
    came = []
    with celery.connection_for_read() as connection:
        consumer = celery.amqp.TaskConsumer(connection.channel(), on_message=lambda message: came.append(message))
        consumer.qos(prefetch_count=1)
        consumer.consume()
        for count in range(1, 6):
            while len(came) < count:
                connection.drain_events(timeout=5)
            came[-1].ack()
    order = [message.decode()[0][0] for message in came]
    assert order == ["high True", "low True", "high False", "normal False", "low False"]


def test_the_task_has_the_name_the_service_sends(celery):
    celery.loader.import_default_modules()
    assert DISTILL_TASK in celery.tasks


@pytest.mark.parametrize(
    ("ours", "kombus"),
    [
        ("unix:///run/redis.sock", "redis+socket:///run/redis.sock"),
        ("unix:///run/redis.sock?db=3", "redis+socket:///run/redis.sock?virtual_host=3"),
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
    ],
)
def test_the_brokers_address_in_kombus_spelling(ours, kombus):
    assert broker_url(ours) == kombus


@pytest.mark.parametrize("url", ["http://10.0.0.7:8000", "https://127.0.0.1:1", "http://engine.example:80"])
def test_an_engine_on_a_network_is_refused(url, tmp_path):
    with pytest.raises(ValueError, match="never over a network"):
        WorkerSettings(
            artefacts=tmp_path,
            policy_engine_urls=(url,),
            reward_model=RewardConfig(members=(HttpMember(url="unix:///r.sock", model="rm"),)),
            policy_directory=tmp_path,
            base_policy_id="pol-" + "0" * 16,
            max_model_len=64,
        )

"""An acknowledgement that failed is sent again, whatever the broker said, until it is heard. Kombu's own loop, a real
Redis."""

import pytest
import redis
from kombu.asynchronous import Hub, get_event_loop, set_event_loop

from bon_algos.contracts import BROKER_PREFIX, DISTILL_QUEUES
from service.dispatch import open_producer, send_job, waiting_list
from tests.worker.forks import until
from worker.acknowledging import AcknowledgingRequest
from worker.app import create_celery


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        yield connection
        connection.config_set("min-replicas-to-write", 0)


@pytest.fixture
def loop():
    before, hub = get_event_loop(), Hub()
    set_event_loop(hub)
    yield hub
    hub.close()
    set_event_loop(before)


@pytest.fixture
def lost(loop, client, redis_url):
    """A message whose first acknowledgement, which is Celery's, was lost."""
    send_job(open_producer(redis_url), "job_1", "normal")
    celery = create_celery(redis_url)
    celery.loader.import_default_modules()
    with celery.connection_for_read() as connection:
        message = connection.default_channel.basic_get(DISTILL_QUEUES["normal"])
        AcknowledgingRequest(message, app=celery, connection_errors=connection.connection_errors).acknowledge()
        yield message


def turns_until(loop, condition, what):
    until(lambda: loop.run_once() or condition(), what, seconds=20)


def under_way(client, message):
    return client.hlen(f"{BROKER_PREFIX}{message.channel.unacked_key}")


def test_a_broker_that_refuses_is_asked_again(client, loop, lost, caplog):
    """As one does whose disk is full, or which has just become a replica."""
    client.config_set("min-replicas-to-write", 1)
    turns_until(loop, lambda: "NOREPLICAS" in caplog.text, "it was refused")
    client.config_set("min-replicas-to-write", 0)
    assert under_way(client, lost) == 1
    turns_until(loop, lambda: lost.acknowledged, "it was heard")
    assert under_way(client, lost) == 0


def test_once_its_channel_is_closed_and_has_put_it_back_nobody_is_asked(client, loop, lost):
    lost.channel.close()
    turns_until(loop, lambda: not loop.timer.queue, "nothing is left to do")
    assert not lost.acknowledged
    assert (under_way(client, lost), client.llen(waiting_list("normal"))) == (0, 1)

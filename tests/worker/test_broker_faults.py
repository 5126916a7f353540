"""Rows F18, F19, F33 and F43 with Celery itself: what happens between a worker and its broker. Real workers over TCP, a
network that breaks, a real Redis.

Whether a message arrived is seen on a job that its owner no longer wants: a claim ends it, and nothing is trained."""

import os
import signal
import time
from functools import partial

import pytest
import redis

from bon_algos.contracts import OPEN_JOBS, job_key
from bon_algos.crash_points import FREEZE_AT
from service.dispatch import open_producer, send_job, waiting_list
from tests.fixtures.fault_proxy import FaultProxy
from tests.worker.celery_worker import CeleryWorker, reconciling
from tests.worker.forks import is_frozen, until

pytestmark = pytest.mark.slow
QUEUE = waiting_list("normal")
UNWANTED = "job_9"


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        yield connection


@pytest.fixture
def proxy(shared_redis):
    with FaultProxy(shared_redis.socket) as network:
        yield network


@pytest.fixture
def start(proxy, tmp_path):
    """start(environment) -> a ready worker behind the proxy; none outlives its test."""
    workers: list[CeleryWorker] = []

    def one(environment=None):
        number = len(workers)
        settings = (environment or {}) | {"BONSAI_REDIS_URL": proxy.url, "BONSAI_ARTEFACTS": str(tmp_path)}
        workers.append(CeleryWorker(settings, tmp_path / f"worker-{number}.log", name=f"worker-{number}"))
        workers[-1].wait_until_ready()
        return workers[-1]

    yield one
    for worker in workers:
        worker.kill()


def submit_unwanted(client):
    client.hset(job_key(UNWANTED), mapping={"state": "queued", "epoch": 0, "attempts": 0, "cancel": 1})
    client.sadd(OPEN_JOBS, UNWANTED)


def was_delivered(client):
    return lambda: client.hget(job_key(UNWANTED), "state") == "cancelled"


def test_F33_a_message_that_went_down_with_a_worker_is_sent_again(client, start, redis_url):
    """It was popped for a worker that was frozen and then killed: it is in no list any more."""
    first = start()
    first.signal(signal.SIGSTOP)
    submit_unwanted(client)
    send_job(open_producer(redis_url), UNWANTED, "normal")
    until(lambda: client.llen(QUEUE) == 0, "the message is popped")
    first.kill()
    start()
    died_at = time.monotonic()
    with reconciling(redis_url):
        until(was_delivered(client), "the next worker has it", seconds=10)
    assert time.monotonic() - died_at < 10


def test_F18_a_worker_on_a_half_open_link_consumes_again(client, proxy, start, redis_url):
    """Its connections swallow everything, new ones work. Celery's defaults are silent for good."""
    worker = start()
    proxy.go_silent()
    submit_unwanted(client)
    with reconciling(redis_url):
        until(was_delivered(client), "it hears again", seconds=60)
    assert worker.is_alive


def test_F18_a_worker_whose_acknowledgement_was_lost_consumes_again(client, proxy, start, redis_url, small):
    """Its link went silent while it trained, which is when nothing is said over it."""
    job = small()
    worker = start(job.environment | {FREEZE_AT: "progress.asked:4"})
    with reconciling(redis_url):
        training = until(lambda: is_frozen(worker.training) and worker.training, "frozen in training")
        proxy.go_silent()
        os.kill(training, signal.SIGCONT)
        until(lambda: job.state == "succeeded", "the job ends", seconds=90)
        submit_unwanted(client)
        until(was_delivered(client), "it takes another message", seconds=60)
    assert b"Couldn't ack" in worker.log.read_bytes()


def test_F19_while_connections_break_all_the_time_a_job_has_one_owner(proxy, start, redis_url, small, undisturbed):
    job = small()
    for _ in range(2):
        start(job.environment)
    with reconciling(redis_url):
        until(lambda: broken_once_more(proxy, job), "the job ends", seconds=200)
    assert job.the_policy().manifest.digest == undisturbed
    assert (job.ends(), job.attempts, job.leftovers()) == (["succeeded"], 1, [])


def broken_once_more(proxy, job):
    """Whether the job has ended. Breaks all connections, and the next one between a script and its reply; again when
    the lease was kept since: by the clock, a slow machine would never keep it."""
    proxy.reset()
    proxy.lose_reply_to(b"EVAL")
    for _ in range(2):  # the script may have been what keeps it
        until(partial(is_kept_or_over, job, job.value("lease_until")), "it is kept", seconds=90)
    return is_over(job)


def is_kept_or_over(job, before):
    return is_over(job) or job.value("lease_until") != before


def is_over(job):
    return job.state not in ("queued", "running")


def test_F43_a_worker_that_is_terminated_hands_its_job_to_the_next(start, redis_url, small, undisturbed):
    """SIGTERM to the main process, as a deployment sends it, reaches the process that trains, which is held in the
    middle of a step so that it does not end before."""
    job = small()
    first = start(job.environment | {FREEZE_AT: "progress.asked:4"})
    with reconciling(redis_url):
        training = until(lambda: is_frozen(first.training) and first.training, "frozen in training")
        first.signal(signal.SIGTERM)
        until(lambda: b"shutdown" in first.log.read_bytes().lower(), "the worker has heard it")
        os.kill(training, signal.SIGCONT)
        until(lambda: job.attempts == 0, "handed back", seconds=10)
        start(job.environment)
        until(lambda: job.state == "succeeded", "the next one ends it", seconds=90)
    assert job.the_policy().manifest.digest == undisturbed
    assert (job.ends(), job.attempts) == (["succeeded"], 1)

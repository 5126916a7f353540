"""A tiny policy, made once, and a window of its own samples."""

import tempfile
from pathlib import Path

import pytest
import redis
import torch

from bon_algos.acceptance import Requirements
from tests.worker import small_job, world
from tests.worker.distilled import client, job
from tests.worker.small_job import SmallJob
from tests.worker.stub_engine import StubEngine, save_tokenizer
from worker.dataset import freeze


def pytest_collection_modifyitems(config, items):
    """Tests for GPUs exist where there are two."""
    if torch.cuda.device_count() < 2:
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


__all__ = ["client", "job"]


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory):
    """Directory of a random Llama."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("policy")
    world.save_tiny_policy(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_groups(tiny_policy):
    return world.sampled_groups(world.save_tiny_policy(tiny_policy), num_prompts=24, n=8)


@pytest.fixture(scope="session")
def tiny_window(tiny_groups, tmp_path_factory):
    wanted = Requirements(world.BASE, world.REWARD_MODEL, world.TEMPLATE, num_candidates=8)
    directory = tmp_path_factory.mktemp("job") / "window"
    return freeze(directory, tiny_groups, wanted, max_groups=100, held_out_fraction=0.3)


@pytest.fixture
def engine(tiny_policy):
    with (
        tempfile.TemporaryDirectory(prefix="bonsai-stub-") as directory,
        StubEngine(tiny_policy, Path(directory) / "engine.sock") as stub,
    ):
        yield stub


@pytest.fixture(scope="session")
def reward_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward")
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def small_groups(tiny_policy):
    return small_job.small_groups(tiny_policy)


@pytest.fixture
def small(redis_url, engine, tiny_policy, reward_directory, small_groups, tmp_path):
    """small(…) -> a submitted SmallJob; what is given replaces the usual."""
    clients = []

    def submitted(groups=None, **fields):
        given = {"redis_url": redis_url, "artefacts": tmp_path} | fields
        given["artefacts"].mkdir(exist_ok=True)
        clients.append(redis.Redis.from_url(given["redis_url"]))
        paths = {"engine_url": engine.url, "policy_directory": tiny_policy, "reward_directory": reward_directory}
        job = SmallJob(clients[-1], **(paths | given))
        job.submit(small_groups if groups is None else groups)
        return job

    yield submitted
    for opened in clients:
        opened.close()


@pytest.fixture(scope="session")
def undisturbed(shared_redis, tiny_policy, reward_directory, small_groups, tmp_path_factory):
    """The digest of the policy that a small job makes when nothing happens to it."""
    artefacts = tmp_path_factory.mktemp("undisturbed")
    with (
        tempfile.TemporaryDirectory(prefix="bonsai-stub-") as directory,
        StubEngine(tiny_policy, Path(directory) / "engine.sock") as stub,
        redis.Redis.from_url(shared_redis.url) as client,
    ):
        client.flushall()
        job = SmallJob(client, shared_redis.url, artefacts, stub.url, tiny_policy, reward_directory)
        job.submit(small_groups)
        assert job.run() == 0, job.told()
        policy = job.the_policy()
        client.flushall()
    return Path(policy.directory).name

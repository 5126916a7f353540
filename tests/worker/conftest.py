"""A tiny policy, made once, and a window of its own samples."""

import tempfile
from pathlib import Path

import pytest
import torch

from tests.worker import world
from tests.worker.stub_engine import StubEngine, save_tokenizer
from worker.dataset import Requirements, freeze


def pytest_collection_modifyitems(config, items):
    """Tests for GPUs exist where there are two."""
    if torch.cuda.device_count() < 2:
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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

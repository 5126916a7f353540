"""A tiny policy, made once, and a window of its own samples."""

import pytest
import torch

from tests.worker import world
from worker.dataset import Requirements, freeze


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

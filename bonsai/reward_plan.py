"""Which reward model a stack has: a model for vLLM, a Python function, or models that somebody else runs.

Owns what is known of each before anything starts, and what gateway and worker are told of it. Does not own how its
process is started (`stack_plan`, `reward_function`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bon_algos.contracts import HttpMember, RewardConfig, VllmMember, read_reward_config
from bonsai import model_directory
from bonsai.model_directory import BadModel, ModelDirectory
from bonsai.reward_function import RewardFunction


@dataclass(frozen=True)
class RewardDirectory:
    """A model that vLLM serves."""

    model: ModelDirectory
    id: str


Reward = RewardDirectory | RewardFunction | RewardConfig


def open_directory(path: Path, longest: int, digests: Path) -> RewardDirectory:
    """Texts are cut off at `longest` tokens at most. Raises BadModel."""
    model = model_directory.open_model(path, "reward", longest)
    return RewardDirectory(model, model_directory.reward_model_id(model_directory.model_digest(model.path, digests)))


def read_config(file: Path, option: str = "--reward-config") -> RewardConfig:
    """With absolute directories: gateway and worker do not run where the user does. Raises BadModel."""
    try:
        config = read_reward_config(file.read_bytes())
    except ValueError as error:
        raise BadModel(f"{option}: {error}") from None
    return config.model_copy(update={"members": tuple(map(_absolute, config.members))})


def _absolute(member: VllmMember | HttpMember) -> VllmMember | HttpMember:
    if isinstance(member, HttpMember):
        return member
    return member.model_copy(update={"directory": member.directory.resolve()})


def config_of(reward: Reward, socket: Path) -> RewardConfig:
    """What gateway and worker are told. socket: where it listens, if it is the stack's own."""
    url = f"unix://{socket}"
    match reward:
        case RewardConfig():
            return reward
        case RewardFunction():
            return RewardConfig(members=(HttpMember(url=url, model=reward.id),))
        case RewardDirectory(model, identity):
            window = model.max_model_len
            return RewardConfig(members=(VllmMember(url=url, model=identity, directory=model.path, window=window),))

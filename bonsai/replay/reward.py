"""The reward model that a replay asks: one that runs already, or a function that runs for as long as the replay.

Owns finding out where it is, what it is called and whether it answers. Does not own the function's process
(`bonsai.reward_function`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bon_algos.contracts import RewardConfig, read_reward_config
from bon_algos.scoring import open_readers
from bonsai.model_directory import BadModel
from bonsai.reward_function import function_spec, open_function
from bonsai.reward_plan import config_of, read_config
from bonsai.runtime_directory import open_state
from bonsai.supervisor import kept
from service.engine_http import EngineHttp
from service.errors import RewardModelUnavailable
from service.reward import RewardModel
from service.tokenizer_files import read_tokenizer
from service.vllm import LIST_SECONDS, model_names


@dataclass(frozen=True)
class RewardOptions:
    """What a user can say about the other reward model; one of `url`, `config` and `function`."""

    url: str | None = None
    kind: Literal["http", "vllm"] = "http"
    name: str | None = None
    """At `url`; None: the only one served there."""
    directory: Path | None = None
    """Of kind vllm."""
    window: int | None = None
    """Of kind vllm, tokens."""
    config: Path | None = None
    """A RewardConfig as JSON."""
    function: str | None = None
    """module:function"""
    seconds: float = 10.0
    """That one call of the function may take."""


@asynccontextmanager
async def answering(options: RewardOptions) -> AsyncIterator[RewardModel]:
    """The reward model, which answers.

    Raises BadModel when it is not one that is named, FunctionError, ProcessFailed, UnsafeDirectory, OSError or
    GatewayError.
    """
    if sum(one is not None for one in (options.url, options.config, options.function)) != 1:
        raise BadModel("exactly one of --reward-url, --reward-config and --reward-function says which reward model")
    async with _function(options) if options.function is not None else _elsewhere(options) as config:
        reward_model = RewardModel(config, open_readers(config, lambda member: read_tokenizer(member.directory)))
        try:
            if (state := await reward_model.state()) != "ok":
                raise RewardModelUnavailable(state)
            yield reward_model
        finally:
            await reward_model.close()


@asynccontextmanager
async def _function(options: RewardOptions) -> AsyncIterator[RewardConfig]:
    function = open_function(options.function or "", options.seconds, os.environ)
    with tempfile.TemporaryDirectory(prefix="bonsai-replay-") as directory:
        state = open_state(Path(directory), os.environ)
        spec = function_spec("reward", function, state.reward_socket, state, os.environ)
        async with kept(state, "", ((), (spec,)), lambda statuses: None):
            yield config_of(function, state.reward_socket)


@asynccontextmanager
async def _elsewhere(options: RewardOptions) -> AsyncIterator[RewardConfig]:
    if options.config is not None:
        yield read_config(options.config)
        return
    member: dict[str, Any] = {"kind": options.kind, "url": options.url}
    if options.kind == "vllm":
        if options.directory is None or options.window is None:
            raise BadModel("--reward-kind vllm needs --reward-directory and --reward-window")
        member |= {"directory": str(options.directory.resolve()), "window": options.window}
    # Before anything is asked there: an address on a network is refused.
    url = _config(member | {"model": options.name or "any"}).members[0].url
    yield _config(member | {"model": options.name or await _only_model(url)})


def _config(member: dict[str, Any]) -> RewardConfig:
    try:
        return read_reward_config(json.dumps({"members": [member]}))
    except ValueError as error:
        raise BadModel(f"--reward-url: {error}") from None


async def _only_model(url: str) -> str:
    """The name of the only model served there. Raises BadModel or GatewayError."""
    unavailable = RewardModelUnavailable
    http = EngineHttp(
        url, title="reward model", unavailable=unavailable, not_served=unavailable, broken_code="reward_model_broken"
    )
    try:
        names = model_names(await http.get("/v1/models", LIST_SECONDS))
    finally:
        await http.close()
    if len(names) != 1:
        raise BadModel(f"the reward model's server lists {len(names)} models: choose one with --reward-name")
    return names[0]

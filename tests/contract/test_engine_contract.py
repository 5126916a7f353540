"""The stub engines against the real ones: the same calls, the same promises.

Every test runs twice: against tests/stubs, and (marked `stack`) against vLLM. What holds here for the stub is what
the fault tests may rely on.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import torch

from bon_algos.chat import ChatTokenizer, encode_reward_texts, reward_writer
from bon_algos.contracts import Candidate, RewardConfig, Sampling
from bon_algos.scoring import Score, open_readers
from bon_algos.vllm_protocol import classify_request, json_object, parse_classify
from bonsai.engines import JOB_LORAS
from service.engine_http import EngineHttp
from service.errors import PolicyNotServed, RewardModelUnavailable
from service.reward import RewardModel
from service.tokenizer_files import read_tokenizer
from service.vllm import AdapterRefused, DrawingWindow, PolicyEngine
from tests.fixtures.gateway import vllm_member
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, REWARD_MODEL
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running
from tests.stubs.tokenizer import write_model_directory
from worker.models import open_policy

T = TypeVar("T")
PROMPT = "The harbour at dawn"
UNKNOWN = "pol-" + "f" * 16


@dataclass(frozen=True)
class Engines:
    policy_url: str
    reward_model: RewardConfig
    base: str
    policy_directory: Path
    num_running: Callable[[], float]
    """Candidates the policy engine works on now."""

    def ask(self, question: Callable[[PolicyEngine], Awaitable[T]]) -> T:
        async def run() -> T:
            engine = PolicyEngine(self.policy_url)
            try:
                return await question(engine)
            finally:
                await engine.close()

        return asyncio.run(run())

    @property
    def tokenizer(self) -> ChatTokenizer:
        return read_tokenizer(self.policy_directory)


@pytest.fixture(params=["stub", pytest.param("vllm", marks=pytest.mark.stack)])
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engines]:
    if request.param == "vllm":
        told = request.getfixturevalue("stack").stack.environment
        yield Engines(
            first_engine(told),
            RewardConfig.model_validate_json(told["BONSAI_REWARD_MODEL"]),
            told["BONSAI_BASE_POLICY_ID"],
            Path(told["BONSAI_POLICY_DIRECTORY"]),
            lambda: asyncio.run(vllm_running(first_engine(told))),
        )
        return
    model = write_model_directory(tmp_path / "model")
    stub = StubEngine(BASE)
    # Slow enough to be left in the middle.
    stub.script.delays = [0.2]
    with running(stub.app()) as policy_url, running(StubReward(REWARD_MODEL).app()) as reward_url:
        config = RewardConfig(members=(vllm_member(reward_url, model),))
        yield Engines(policy_url, config, BASE, model, lambda: stub.active)


def first_engine(told: Mapping[str, str]) -> str:
    """Where the first policy engine of a real stack listens."""
    return str(json.loads(told["BONSAI_POLICY_ENGINE_URLS"])[0])


async def vllm_running(url: str) -> float:
    """What vLLM's own metrics say it is running."""
    connector = aiohttp.UnixConnector(url.removeprefix("unix://"))
    async with (
        aiohttp.ClientSession("http://engine", connector=connector) as session,
        session.get("/metrics") as response,
    ):
        text = await response.text()
    counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.e+]+)$", text, re.MULTILINE)
    assert len(counts) >= 2
    return sum(map(float, counts))


def draw(engines: Engines, n: int, max_tokens: int, model: str | None = None):
    prompt = engines.tokenizer.encode_prompt(PROMPT)
    sampling = Sampling(max_tokens=max_tokens, seed=7)

    async def sample(engine: PolicyEngine):
        now = asyncio.get_running_loop().time()
        window = DrawingWindow(soft=now + 30, hard=now + 60, quorum=n)
        return await engine.sample(model or engines.base, prompt, n, sampling, window)

    return engines.ask(sample)


def test_the_base_is_listed_first(engines):
    assert engines.ask(lambda engine: engine.models())[0] == engines.base


def test_it_tells_since_when_it_lives_and_from_where_it_serves(engines):
    first, again = (engines.ask(lambda engine: engine.observe()) for _ in range(2))
    assert next(iter(first.models)) == engines.base
    assert first == again
    assert 0 < time.time() - first.started_at < 24 * 3600


@pytest.mark.parametrize("n", [1, 4])
def test_n_candidates_come_whole_each_token_with_its_logprob(engines, n):
    candidates = draw(engines, n, max_tokens=16)
    assert len(candidates) == n
    for candidate in candidates:
        assert candidate.finish_reason in ("stop", "length")
        assert candidate.failure is None
        assert 1 <= len(candidate.token_ids) == len(candidate.logprobs)
        assert all(math.isfinite(value) and value <= 0 for value in candidate.logprobs)


def test_a_token_is_given_when_asked_for(engines):
    async def ask(engine: PolicyEngine) -> None:
        async with asyncio.timeout(30):
            await engine.give_a_token(engines.base)

    engines.ask(ask)


def test_leaving_a_call_stops_the_engine_within_a_second(engines):
    async def leave() -> None:
        engine = PolicyEngine(engines.policy_url)
        now = asyncio.get_running_loop().time()
        window = DrawingWindow(soft=now + 30, hard=now + 60, quorum=16)
        prompt = engines.tokenizer.encode_prompt(PROMPT)
        sampling = Sampling(max_tokens=128, temperature=2.0)
        drawing = asyncio.create_task(engine.sample(engines.base, prompt, 16, sampling, window))
        async with asyncio.timeout(10):
            while not await asyncio.to_thread(engines.num_running):
                assert not drawing.done()
        drawing.cancel()
        await asyncio.wait({drawing})
        assert drawing.cancelled()
        await engine.close()

    asyncio.run(leave())
    wait_until(lambda: engines.num_running() == 0, seconds=1)


def test_an_unknown_policy_is_not_answered_by_the_base(engines):
    with pytest.raises(PolicyNotServed):
        draw(engines, 2, max_tokens=4, model=UNKNOWN)


def test_a_given_completion_has_the_logprobs_it_was_sampled_with(engines):
    candidate = draw(engines, 1, max_tokens=12)[0]
    prompt = engines.tokenizer.encode_prompt(PROMPT)
    values = engines.ask(lambda engine: engine.logprobs(engines.base, prompt, candidate.token_ids))
    assert values == pytest.approx(candidate.logprobs, abs=1e-4)


@pytest.mark.stack
def test_the_base_beside_policies_that_fill_every_slot_stays_the_base(stack, tmp_path):
    """What an engine gives beside adapters has the log-probs that it has alone."""
    told = stack.stack.environment
    base, directory = told["BONSAI_BASE_POLICY_ID"], Path(told["BONSAI_POLICY_DIRECTORY"])
    prompt = read_tokenizer(directory).encode_prompt(PROMPT)
    # A fuller engine evicts adapters; one that other tests left some in would, too, and loads them again when asked.
    names = [f"pol-{number:016x}" for number in range(int(told["BONSAI_MAX_LORAS"]) + JOB_LORAS)]
    save_random_adapter(directory, tmp_path / "adapter")

    async def run() -> list[tuple[Candidate, list[float]]]:
        engine = PolicyEngine(first_engine(told))
        try:
            for name in names:
                await engine.load_adapter(name, str(tmp_path / "adapter"))
            told_of = (await engine.observe()).models
            assert {told_of[name] for name in names} == {str(tmp_path / "adapter")}
            now = asyncio.get_running_loop().time()
            window = DrawingWindow(soft=now + 30, hard=now + 60, quorum=8)
            sampling = Sampling(max_tokens=32, temperature=1.0)
            groups = await asyncio.gather(
                *(engine.sample(name, prompt, 8, sampling, window) for name in [*names, base, *names])
            )
            own = groups[len(names)]
            return [(one, await engine.logprobs(base, prompt, one.token_ids)) for one in own]
        finally:
            for name in names:
                await engine.unload_adapter(name)
            await engine.close()

    for candidate, alone in asyncio.run(run()):
        assert candidate.logprobs == pytest.approx(alone, abs=1e-3)


def save_random_adapter(model: Path, directory: Path) -> None:
    """An adapter that changes the policy beyond recognition."""
    policy = open_policy(model, BASE, rank=8, alpha=32.0, train_factor_a=True, seed=0, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    policy.load_factors({name: torch.randn(t.shape, generator=generator) for name, t in policy.factors.items()})
    policy.save_adapter(directory)


def test_unloading_what_is_not_there_is_no_error(engines):
    engines.ask(lambda engine: engine.unload_adapter(UNKNOWN))


def test_every_completion_gets_its_finite_reward(engines):
    async def run() -> tuple[str, list[Score]]:
        readers = open_readers(engines.reward_model, lambda member: read_tokenizer(member.directory))
        reward_model = RewardModel(engines.reward_model, readers)
        try:
            return await reward_model.state(), await reward_model.score(PROMPT, None, ["one", "two words", "one"])
        finally:
            await reward_model.close()

    state, scores = asyncio.run(run())
    assert state == "ok"
    rewards = [score.reward for score in scores]
    assert all(reward is not None and math.isfinite(reward) for reward in rewards)
    # The order is the request's: equal completions have equal rewards, up to the rounding of a batch.
    assert rewards[0] == pytest.approx(rewards[2], abs=1e-4)


def test_a_text_has_the_reward_of_its_tokens(engines):
    """The gateway sends texts: the engine must make the same tokens of them."""
    [member] = engines.reward_model.members
    tokenizer = read_tokenizer(member.directory)
    write = reward_writer(tokenizer, PROMPT, None)
    texts = [write(said) for said in ("one", " two  words\n", "Ünïcode, 漢字 and 🙂", "<|end|>", "")]
    ids = encode_reward_texts(tokenizer, texts)

    async def rewards_of(given: list[Any]) -> list[float]:
        http = EngineHttp(
            member.url,
            title="reward model",
            unavailable=RewardModelUnavailable,
            not_served=RewardModelUnavailable,
            broken_code="reward_model_broken",
        )
        body = classify_request(member.model, texts, add_special_tokens=not tokenizer.has_template)
        try:
            return parse_classify(json_object(await http.post("/classify", {**body, "input": given})), len(given))
        finally:
            await http.close()

    # Up to the rounding of a batch.
    assert asyncio.run(rewards_of(texts)) == pytest.approx(asyncio.run(rewards_of(ids)), abs=1e-4)


def test_a_directory_without_an_adapter_is_refused(engines, tmp_path):
    with pytest.raises(AdapterRefused):
        engines.ask(lambda engine: engine.load_adapter(UNKNOWN, str(tmp_path)))
    assert UNKNOWN not in engines.ask(lambda engine: engine.models())

"""The worker scores with the gateway's reward model: the same configuration gives the same numbers on both sides."""

from __future__ import annotations

import asyncio

import pytest

from bon_algos.contracts import HttpMember, Message, RewardConfig
from bon_algos.scoring import Completion, open_readers
from service.reward import RewardModel
from tests.fixtures.gateway import vllm_member
from tests.stubs.reward import BROKEN_SCORES, StubReward, StubScore
from tests.stubs.server import running
from tests.stubs.tokenizer import write_model_directory
from worker.engine import Engines
from worker.errors import EngineUnavailable, JobFailed
from worker.job_process import read_tokenizer

TURNS = (Message(role="user", content="what now?"),)
ASKED = [Completion("hi", None, text) for text in ("a", "bb", "x" * 300)]
ASKED += [Completion("u:what now?\na:", TURNS, text) for text in ("ccc", "")]


@pytest.fixture
def classifier():
    return StubReward("rm-" + "1" * 16)


@pytest.fixture
def judge():
    return StubScore("judge")


@pytest.fixture
def config(tmp_path, classifier, judge):
    """An ensemble of both kinds."""
    directory = write_model_directory(tmp_path / "model")
    with running(classifier.app()) as url, running(judge.app()) as judge_url:
        members = (
            vllm_member(url, directory, model=classifier.model),
            HttpMember(url=judge_url, model="judge", scale=0.25),
        )
        yield RewardConfig(members=members, caution=0.5)


def readers_of(config):
    return open_readers(config, lambda member: read_tokenizer(member.directory))


def scored_by_worker(config, completions=ASKED):
    with Engines("unix:///no-policy.sock", config, readers_of(config), lambda: None) as engines:
        return engines.score(completions)


def scored_by_gateway(config):
    async def run():
        reward_model = RewardModel(config, readers_of(config))
        try:
            plain = await reward_model.score("hi", None, [one.text for one in ASKED[:3]])
            return plain + await reward_model.score(ASKED[3].prompt, TURNS, [one.text for one in ASKED[3:]])
        finally:
            await reward_model.close()

    return asyncio.run(run())


def test_worker_and_gateway_give_one_completion_one_score(config, judge):
    judge.script.score = lambda text: None if text == "bb" else float(len(text)) ** 2
    scores = scored_by_worker(config)
    assert scores == scored_by_gateway(config)
    # "u:hi\na:a\n" is 9 characters and the judge says 1/4: mean 4.625, spread 4.375.
    assert scores[0].reward == pytest.approx(4.625 - 0.5 * 4.375)
    assert scores[0].disagreement == pytest.approx(4.375)
    assert [score.failure for score in scores] == [None, "reward_error", "too_long", None, None]
    with Engines("unix:///no-policy.sock", config, readers_of(config), lambda: None) as engines:
        reward_model_id, digest = engines.reward_model_id, engines.reward_template_digest
    assert reward_model_id == config.id

    async def told():
        reward_model = RewardModel(config, readers_of(config))
        await reward_model.close()
        return reward_model.model, reward_model.template_digest

    assert asyncio.run(told()) == (reward_model_id, digest)


@pytest.mark.parametrize("fault", [*BROKEN_SCORES, "busy", "gone"])
def test_a_member_that_fails_is_waited_for_and_never_left_out(config, judge, fault):
    judge.script.fault = fault
    with pytest.raises(EngineUnavailable, match="reward rm-"):
        scored_by_worker(config)


def test_a_request_that_is_refused_as_such_fails_the_job(config, judge):
    """405, 422 and the like are a mistake that waiting does not mend; 404 may be a server that comes back."""
    moved = config.members[1].model_copy(update={"path": "/not-there"})
    with pytest.raises(EngineUnavailable, match="404"):
        scored_by_worker(config.model_copy(update={"members": (config.members[0], moved)}))
    wrong = config.members[1].model_copy(update={"path": "/v1/models"})  # 405
    with pytest.raises(JobFailed, match="engine_refused"):
        scored_by_worker(config.model_copy(update={"members": (config.members[0], wrong)}))

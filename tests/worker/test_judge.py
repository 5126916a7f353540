"""The second reward model is asked over HTTP about what was drawn; where it says nothing, the report has the words."""

import math

import pytest

from bon_algos.contracts import HttpMember, RewardConfig
from bon_algos.scoring import open_readers
from tests.stubs.reward import StubScore
from tests.stubs.server import running
from tests.worker import drawn, world
from worker.engine import Engines
from worker.errors import LeaseLost
from worker.judge import NOT_CONFIGURED, NoOpinion, Opinion, second_opinion
from worker.settings import WorkerSettings

ROWS = [
    drawn.row(i, [drawn.rollout(1.0, text="a" * (i + 1)), drawn.rollout(0.5, text="bb")], [0.0, 0.25]) for i in range(2)
]


@pytest.fixture
def judge():
    return StubScore("judge")


@pytest.fixture
def engines(judge):
    with running(judge.app()) as url:
        config = RewardConfig(members=(HttpMember(url=url, model="judge"),))
        readers = open_readers(config, lambda member: pytest.fail("it reads texts"))
        with Engines("unix:///no-policy.sock", config, readers, lambda: None) as opened:
            yield opened


def asked(engines, patience=0.0):
    return second_opinion(engines, ROWS, lambda seconds: None, patience)


def test_it_scores_every_fresh_draw_in_order(engines, judge):
    judge.script.score = lambda text: float(len(text))
    words = float(len("It is a word."))
    assert asked(engines) == Opinion(engines.reward_model_id, [[1, 2], [2, 2]], [[words, words]] * 2)


def test_without_one_the_report_says_what_that_means():
    assert asked(None) == NoOpinion(NOT_CONFIGURED)


@pytest.mark.parametrize("worth", [None, math.nan, math.inf])
def test_more_than_a_few_completions_without_a_number_are_no_opinion(engines, judge, worth):
    judge.script.score = lambda text: worth if text == "bb" else 1.0
    assert "could not score 2 of 8 completions" in asked(engines).why


def test_one_that_is_away_costs_its_opinion_and_not_the_policy(engines, judge):
    judge.script.fault = "busy"
    assert f"The second reward model {engines.reward_model_id} did not answer" in asked(engines).why
    judge.script.fault = "no_list"
    assert isinstance(asked(engines), NoOpinion)


def test_a_job_that_must_stop_does_not_wait_for_it(engines, judge):
    judge.script.fault = "busy"

    def lost(_):
        raise LeaseLost("fenced")

    with pytest.raises(LeaseLost):
        second_opinion(engines, ROWS, lost, 60.0)


def test_what_chose_and_trained_is_no_second_opinion(tmp_path, monkeypatch):
    first, second = ({"kind": "http", "url": "http://127.0.0.1:9", "model": name} for name in ("a", "b"))
    settings = {
        "artefacts": tmp_path,
        "policy_engine_urls": ["unix:///p.sock"],
        "policy_directory": tmp_path,
        "base_policy_id": world.BASE,
        "max_model_len": 64,
        "reward_model": RewardConfig(members=(first, second)),
    }
    assert WorkerSettings(**settings).judge_reward_model is None
    another = {"kind": "http", "url": "http://127.0.0.1:9", "model": "c"}
    monkeypatch.setenv("BONSAI_JUDGE_REWARD_MODEL", RewardConfig(members=(another,)).model_dump_json())
    assert WorkerSettings(**settings).judge_reward_model == RewardConfig(members=(another,))
    with pytest.raises(ValueError, match="its opinion would be no second"):
        WorkerSettings(**settings, judge_reward_model=RewardConfig(members=(another, first)))

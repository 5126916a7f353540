"""The gateway with reward models of every kind: a program over HTTP, and ensembles, whole and failing."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from bon_algos.contracts import HttpMember, RewardConfig
from tests.fixtures.gateway import World, gateway_settings, running_gateway, vllm_member
from tests.fixtures.waiting import wait_until
from tests.stubs.reward import BROKEN_SCORES, StubReward, StubScore
from tests.stubs.server import running

HI = {"prompt": "hi"}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def judge():
    return StubScore("shorter-is-better")


def http_member(url, **more):
    return HttpMember(url=url, model="shorter-is-better", **more)


@pytest.fixture
def judged(tmp_path, engine, reward, judge, redis_url):
    """judged() -> a gateway whose reward model is one program over HTTP."""

    @contextmanager
    def opened(**more):
        with running(engine.app()) as engine_url, running(judge.app()) as judge_url:
            config = RewardConfig(members=(http_member(judge_url),))
            settings = gateway_settings(tmp_path, engine_url, judge_url, redis_url, reward_model=config, **more)
            with running_gateway(settings) as client:
                yield World(client, engine, reward, redis_url)

    return opened


@pytest.fixture
def ensemble(tmp_path, engine, reward, judge, redis_url):
    """A gateway whose reward is the mean of the stubs' less a quarter of their spread; the judge counts half."""
    with running(engine.app()) as engine_url, running(reward.app()) as url, running(judge.app()) as judge_url:
        members = (vllm_member(url, tmp_path / "model"), http_member(judge_url, scale=0.5))
        config = RewardConfig(members=members, caution=0.25)
        settings = gateway_settings(tmp_path, engine_url, url, redis_url, reward_model=config)
        with running_gateway(settings) as client:
            yield World(client, engine, reward, redis_url)


def test_a_candidate_is_served_with_its_reasoning_and_judged_without(world):
    """The longest answer wins, not the longest thought; one that never came to an answer is empty."""
    said = ["<think>" + "hm " * 9 + "</think>yes", "<think></think>no, never", "<think>" + "oh " * 20]
    world.engine.script.completions = said
    body = world.client.post("/generate?n=3", {**HI, "return_candidates": True}).json
    assert (body["completion"], body["reward"]) == (said[1], 8 + len("no, never"))
    assert body["candidates"]["failed"] == {"empty": 1}
    assert sorted(world.reward.texts) == ["u:hi\na:no, never\n", "u:hi\na:yes\n"]


# --- a program over HTTP --------------------------------------------------------------------------------------


def test_a_program_chooses(judged, judge, engine):
    engine.script.completions = ["a", "bbb", "cc"]
    with judged() as world:
        body = world.client.post("/generate?n=3", {**HI, "return_candidates": True}).json
        assert body["completion"] == "bbb"
        assert body["reward"] == 3.0
        assert [choice["reward"] for choice in body["choices"]] == [1.0, 3.0, 2.0]
        assert [choice["disagreement"] for choice in body["choices"]] == [None] * 3
        asked = {"model": judge.model, "prompt": "hi", "messages": None, "completions": ["a", "bbb", "cc"]}
        assert judge.requests == [asked]
        identity = RewardConfig(members=(http_member("unix:///elsewhere"),)).id
        assert body["selection"]["reward_model"] == identity
        [group] = world.groups()
        assert group.reward_model_id == identity
        wait_until(lambda: world.client.get("/ready").json["status"] == "ready")


def test_a_conversation_reaches_it_as_it_was_sent(judged, judge):
    turns = [{"role": "user", "content": "hi"}]
    with judged() as world:
        assert world.client.post("/generate?n=2", {"messages": turns}).status == 200
    assert judge.requests[0]["messages"] == turns
    assert judge.requests[0]["prompt"] == "u:hi\na:"


@pytest.mark.parametrize("fault", BROKEN_SCORES)
def test_an_answer_that_breaks_the_schema_is_502_and_is_not_asked_for_twice(judged, judge, fault):
    judge.script.fault = fault
    with judged() as world:
        reply = world.client.post("/generate?n=2", HI)
        assert (reply.status, reply.json["error"]["code"]) == (502, "reward_model_broken")
        [group] = world.groups()
    assert (group.selected, group.status) == (None, "reward_failed")
    assert len(judge.requests) == 1


@pytest.mark.parametrize("fault", ["busy", "gone"])
def test_a_program_that_has_no_room_or_serves_another_model_is_503(judged, judge, fault):
    judge.script.fault = fault
    with judged() as world:
        reply = world.client.post("/generate?n=2", HI)
        assert (reply.status, reply.json["error"]["code"]) == (503, "reward_model_unavailable")
        assert reply.headers["retry-after"] == "1"


def test_a_program_that_never_answers_is_504_at_the_deadline(judged, judge):
    judge.script.fault = "silent"
    with judged() as world:
        reply = world.client.post("/generate?n=2", {**HI, "timeout_ms": 300})
        assert reply.status == 504
        assert reply.json["candidates"]["failed"] == {"not_scored": 2}


def test_null_and_what_is_not_finite_is_no_reward_and_its_reason_is_logged(judged, judge, engine, caplog):
    engine.script.completions = ["a", "bb", "ccc", "dddd"]
    judge.script.score = lambda text: {1: 1.0, 2: None, 3: float("nan"), 4: float("inf")}[len(text)]
    judge.script.reasons = [None, "too vague", None, None]
    with judged() as world, caplog.at_level(logging.WARNING, "bonsai.reward"):
        body = world.client.post("/generate?n=4", HI).json
    assert body["completion"] == "a"
    failed = {"reward_error": 1, "reward_not_finite": 2}
    assert body["candidates"] == {"requested": 4, "finished": 4, "scored": 1, "failed": failed}
    said = [record.message for record in caplog.records if "have no reward" in record.message]
    assert said == ["3 of 4 completions have no reward: too vague"]


def test_a_program_of_another_name_is_not_ready(judged, judge):
    judge.model = "another"
    with judged() as world:
        reply = world.client.get("/ready")
        assert (reply.status, reply.json["reward_model"]) == (503, "serves another model")


@pytest.mark.parametrize(("longer", "state"), [(True, "passed"), (False, "the reward model ranks 1 of 1")])
def test_its_known_pairs_are_tested_too(judged, tmp_path, longer, state):
    better, worse = ("longer", "short") if longer else ("short", "longer")
    file = tmp_path / "pairs.json"
    file.write_text(f'[{{"prompt": "hi", "better": "{better}", "worse": "{worse}"}}]')
    with judged(reward_pairs=file) as world:
        wait_until(lambda: world.client.get("/ready").json["reward_test"] != "waiting")
        assert world.client.get("/ready").json["reward_test"].startswith(state)
        assert world.client.post("/generate?n=2", HI).status == (200 if longer else 503)


def test_the_program_in_the_documentation_is_one(tmp_path, engine, redis_url, unused_port):
    """The ten lines of docs/reward-models.md, started as the page says."""
    page = (ROOT / "docs" / "reward-models.md").read_text()
    program = re.search(r"```python\n(from fastapi.*?)```", page, re.DOTALL)
    assert program is not None
    assert len([line for line in program[1].splitlines() if line]) <= 10
    (tmp_path / "judge.py").write_text(program[1])
    url = f"http://127.0.0.1:{unused_port}"
    command = [sys.executable, "-m", "uvicorn", "judge:app", "--port", str(unused_port), "--log-level", "error"]
    with subprocess.Popen(command, cwd=tmp_path) as server, running(engine.app()) as engine_url:
        try:
            config = RewardConfig(members=(http_member(url),))
            settings = gateway_settings(tmp_path, engine_url, url, redis_url, reward_model=config)
            with running_gateway(settings) as client:
                wait_until(lambda: client.get("/ready").status == 200, seconds=30)
                engine.script.completions = ["long one", "short"]
                body = client.post("/generate?n=2", HI).json
                assert (body["completion"], body["reward"]) == ("short", -5.0)
        finally:
            server.terminate()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("{", "BONSAI_REWARD_MODEL: Value error, Invalid JSON"),
        ('{"members": [{"kind": "http", "url": "unix:///a"}]}', "members.0.http.model: Field required"),
        ('{"members": [{"kind": "http", "url": "http://h:1", "model": "a"}]}', "members.0.http.url: .*over a network"),
    ],
)
def test_a_gateway_told_of_no_reward_model_says_which_field(tmp_path, told, words):
    environment = {**os.environ, "BONSAI_REWARD_MODEL": told}
    command = [sys.executable, "-m", "service"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert re.search(words, ended.stderr)


# --- an ensemble ----------------------------------------------------------------------------------------------


def test_an_ensemble_chooses_by_mean_and_spread_and_shows_it(ensemble, reward, judge, engine):
    """The classifier says 1 and 4; the judge 10 and 4, of which it counts half: means 3 and 3, spreads 2 and 1, so the
    rewards are 2.5 and 2.75 with a quarter of the spread taken off."""
    engine.script.completions = ["a", "b"]
    reward.script.score = lambda text: 1.0 if "a:a" in text else 4.0
    judge.script.score = lambda text: 10.0 if text == "a" else 4.0
    body = ensemble.client.post("/generate?n=2", {**HI, "return_candidates": True}).json
    assert body["completion"] == "b"
    assert (body["selection"]["reward"], body["selection"]["disagreement"]) == (2.75, 1.0)
    assert [(choice["reward"], choice["disagreement"]) for choice in body["choices"]] == [(2.5, 2.0), (2.75, 1.0)]
    [group] = ensemble.groups()
    assert [candidate.disagreement for candidate in group.candidates] == [2.0, 1.0]
    assert group.reward_model_id == body["selection"]["reward_model"] != reward.model
    assert ensemble.client.get("/ready").json["reward_model"] == "ok"


@pytest.mark.parametrize(("fault", "status"), [("busy", 503), ("error", 502), ("one_missing", 502)])
@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_member_fails_nothing_is_scored(ensemble, reward, judge, failing, fault, status):
    (reward, judge)[failing].script.fault = fault
    reply = ensemble.client.post("/generate?n=2", HI)
    assert reply.status == status
    assert "the reward model rm-" in reply.json["detail"]
    [group] = ensemble.groups()
    assert (group.selected, group.status) == (None, "reward_failed")
    assert all(candidate.reward is None for candidate in group.candidates)


def test_a_candidate_that_one_member_cannot_score_has_no_reward(ensemble, judge, engine):
    engine.script.completions = ["a", "bb"]
    judge.script.score = lambda text: None if text == "bb" else 1.0
    body = ensemble.client.post("/generate?n=2", HI).json
    assert body["completion"] == "a"
    assert body["candidates"]["failed"] == {"reward_error": 1}


def test_an_ensemble_is_ready_when_all_its_members_are(ensemble, judge):
    judge.model = "another"
    reply = ensemble.client.get("/ready")
    assert reply.status == 503
    assert re.fullmatch("serves another model than rm-[0-9a-f]{16}", reply.json["reward_model"])


def test_a_member_that_is_away_is_named(tmp_path, engine, reward, redis_url, unused_port):
    with running(engine.app()) as engine_url, running(reward.app()) as url:
        away = http_member(f"http://127.0.0.1:{unused_port}")
        config = RewardConfig(members=(vllm_member(url, tmp_path / "model"), away))
        settings = gateway_settings(tmp_path, engine_url, url, redis_url, reward_model=config)
        with running_gateway(settings) as client:
            words = f"the reward model {away.id} cannot be reached"
            assert client.get("/ready").json["reward_model"] == words
            assert client.post("/generate?n=2", HI).json["detail"] == words


def test_a_prompt_too_long_for_one_member_is_refused_before_anything_is_drawn(ensemble, engine):
    """A window of 256 for the policy's `hi` and for the classifier's template around it."""
    reply = ensemble.client.post("/generate?n=2", {"prompt": "x" * 252, "max_tokens": 2})
    assert (reply.status, reply.json["error"]["param"]) == (422, "prompt")
    assert engine.requests == []


def test_the_stub_of_a_classifier_is_no_program(judged, engine, tmp_path, redis_url, reward):
    """A vLLM server told as `http` does not know `/score`: 404, so 503, never a reward made of something else."""
    assert isinstance(reward, StubReward)
    with running(engine.app()) as engine_url, running(reward.app()) as url:
        config = RewardConfig(members=(HttpMember(url=url, model=reward.model),))
        settings = gateway_settings(tmp_path, engine_url, url, redis_url, reward_model=config)
        with running_gateway(settings) as client:
            assert client.post("/generate?n=2", HI).json["error"]["code"] == "reward_model_unavailable"

"""A reward model that does not know better from worse is found out before it chooses anything.

The stub's reward is the length of what it reads, unless the test says otherwise.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from bon_algos.contracts import Outcome
from service.reward_test import read_pairs
from tests.fixtures.gateway import gateway_settings, read_ledger, running_gateway, wait_until
from tests.stubs.server import running

LONGER = {"prompt": "hi", "better": "a long answer", "worse": "short"}
SHORTER = {"messages": [{"role": "user", "content": "hi"}], "better": "short", "worse": "a long answer"}


@pytest.fixture
def gateway(tmp_path: Path, engine, reward, redis_url):
    """gateway(pairs) -> a client of a gateway that tests its reward model on them."""

    @contextmanager
    def opened(*pairs, reward_url=None):
        file = tmp_path / "pairs.json"
        file.write_text(json.dumps(pairs))
        with running(engine.app()) as engine_url, running(reward.app()) as own_url:
            url = own_url if reward_url is None else reward_url
            settings = gateway_settings(tmp_path, engine_url, url, redis_url, reward_pairs=file)
            with running_gateway(settings) as client:
                yield client

    return opened


def settled(client) -> str:
    wait_until(lambda: client.get("/ready").json["reward_test"] != "waiting")
    state: str = client.get("/ready").json["reward_test"]
    return state


def outcomes(redis_url: str, count: int) -> list[Outcome]:
    """What was measured after its reply, once there is so much."""

    def found() -> list[Outcome]:
        return [record for record in read_ledger(redis_url) if isinstance(record, Outcome)]

    wait_until(lambda: len(found()) == count)
    return found()


def test_a_model_that_knows_its_pairs_chooses(gateway, reward):
    with gateway(LONGER, LONGER) as client:
        assert settled(client) == "passed"
        assert client.get("/ready").status == 200
        # Each pair in one call, in the reward model's own template.
        assert reward.texts[:2] == ["u:hi\na:a long answer\n", "u:hi\na:short\n"]
        assert client.post("/generate?n=2", {"prompt": "hi"}).status == 200


@pytest.mark.parametrize(
    ("path", "body"), [("/generate?n=2", {"prompt": "hi"}), ("/v1/completions", {"model": "default", "prompt": "hi"})]
)
def test_a_model_that_ranks_a_pair_wrongly_chooses_nothing(gateway, engine, path, body):
    with gateway(LONGER, SHORTER, SHORTER) as client:
        state = settled(client)
        assert state.startswith(
            "the reward model ranks 2 of 3 known pairs wrongly, so that it chooses and measures nothing"
        )
        assert "chat template" in state
        assert "activation" in state
        assert client.get("/ready").status == 503
        refused = client.post(path, body)
        assert (refused.status, refused.json["error"]["code"]) == (503, "reward_model_refused")
        assert refused.headers["retry-after"] == "60"
        assert engine.requests == []
        # One sample is not chosen by anybody.
        assert client.post("/generate?n=1", {"prompt": "hi"}).status == 200


def test_a_model_that_ranks_a_pair_wrongly_measures_nothing(gateway, reward, redis_url):
    with gateway(LONGER, SHORTER) as client:
        assert settled(client).startswith("the reward model ranks 1 of 2")
        tested = len(reward.requests)
        assert client.post("/generate?n=1", {"prompt": "hi"}).status == 200
        assert [one.rewards for one in outcomes(redis_url, 1)] == [(None,)]
        assert len(reward.requests) == tested


def test_until_there_is_a_verdict_nothing_is_measured(gateway, reward, redis_url):
    """The stub fails over the pair and would score the answer: 21 characters of "u:hi\\na:a fine answer\\n"."""
    reward.script.score = lambda text: {}[text] if "a long answer" in text else float(len(text))
    with gateway(LONGER) as client:
        assert client.post("/generate?n=1", {"prompt": "hi"}).status == 200
        asked = len(reward.requests)
        wait_until(lambda: len(reward.requests) >= asked + 2)
        assert not any("a fine answer" in text for text in reward.texts)
        reward.script.score = lambda text: float(len(text))
        assert settled(client) == "passed"
        assert [one.rewards for one in outcomes(redis_url, 1)] == [(21.0,)]


@pytest.mark.parametrize("score", [lambda text: 1.0, lambda text: None])
def test_a_model_that_cannot_tell_has_not_passed(gateway, reward, score):
    reward.script.score = score
    with gateway(LONGER) as client:
        assert settled(client).startswith("the reward model ranks 1 of 1")


def test_until_the_engine_answers_nothing_is_chosen(gateway, reward, unused_port):
    with gateway(LONGER, reward_url=f"http://127.0.0.1:{unused_port}") as client:
        ready = client.get("/ready")
        assert (ready.status, ready.json["reward_test"]) == (503, "waiting")
        refused = client.post("/generate?n=2", {"prompt": "hi"})
        assert (refused.status, refused.json["error"]["code"]) == (503, "reward_model_unavailable")
        with running(reward.app(), unused_port):
            assert settled(client) == "passed"
            assert client.post("/generate?n=2", {"prompt": "hi"}).status == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "Invalid JSON"),
        ("[]", "at least 1"),
        ('[{"prompt": "a", "better": "b"}]', r"\[0\].worse: Field required"),
        ('[{"better": "b", "worse": "c"}]', "exactly one of prompt and messages"),
        ('[{"prompt": "a", "better": "", "worse": "c"}]', r"\[0\].better"),
    ],
)
def test_pairs_that_are_none_are_refused_in_words(tmp_path, content, words):
    file = tmp_path / "pairs.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_pairs(file)
    with pytest.raises(ValidationError, match=words):
        gateway_settings(tmp_path, "unix:///a", "unix:///b", "redis://c", reward_pairs=file)

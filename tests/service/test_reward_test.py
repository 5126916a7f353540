"""A reward model that does not know better from worse is found out before it chooses anything.

The stub's reward is the length of what it reads, unless the test says otherwise.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from bon_algos.contracts import HttpMember, Outcome, RewardConfig
from service.known_pairs import general_pairs, read_pairs
from tests.fixtures.gateway import gateway_settings, read_ledger, running_gateway, vllm_member
from tests.fixtures.waiting import wait_until
from tests.stubs.reward import StubReward, StubScore
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


CANNOT_TELL = [
    (lambda text: 1.0, r"the same reward in all of \d+ (known|built-in) pairs,.* a constant ranks nothing.* softmax"),
    (lambda text: None, r"no finite reward for any of \d+ (known|built-in) pairs.* weights"),
]


@pytest.mark.parametrize(("score", "words"), CANNOT_TELL)
def test_a_model_that_cannot_tell_has_not_passed(gateway, reward, score, words):
    reward.script.score = score
    with gateway(LONGER) as client:
        assert re.search(words, settled(client))
        assert client.get("/ready").status == 503


def test_an_own_pair_that_is_a_tie_is_ranked_wrongly(gateway):
    """The second pair's answers are equally long, so the stub gives them the same reward."""
    with gateway(LONGER, {**LONGER, "better": "other"}) as client:
        assert settled(client).startswith("the reward model ranks 0 of 2 known pairs wrongly and 1 alike")


# --- the built-in pairs -----------------------------------------------------------------------------------


def knows(pairs, otherwise=-1.0):
    """A score that is 1 for the better answers of these pairs and `otherwise` for all others."""
    better = {f"a:{pair.better}\n" for pair in pairs}
    return lambda text: 1.0 if any(text.endswith(one) for one in better) else otherwise


@pytest.fixture
def without_pairs(tmp_path: Path, engine, reward, redis_url):
    """without_pairs() -> a client of a gateway whose operator said nothing of pairs."""

    @contextmanager
    def opened(config=None, **more):
        with running(engine.app()) as engine_url, running(reward.app()) as url:
            members = (vllm_member(url, tmp_path / "model", **more),)
            config = config(url) if config else RewardConfig(members=members)
            more = {"reward_pairs": None, "reward_model": config}
            with running_gateway(gateway_settings(tmp_path, engine_url, url, redis_url, **more)) as client:
                yield client

    return opened


def test_length_is_no_cue_and_no_pair_stands_twice():
    pairs = general_pairs()
    longer = sum(len(pair.better) > len(pair.worse) for pair in pairs)
    assert 2 * longer == 2 * sum(len(pair.better) < len(pair.worse) for pair in pairs) == len(pairs)
    assert len({(pair.prompt, pair.better) for pair in pairs}) == len(pairs) >= 12


def test_a_model_that_knows_the_built_in_pairs_chooses(without_pairs, reward):
    reward.script.score = knows(general_pairs())
    with without_pairs() as client:
        assert settled(client) == "passed"
        assert client.post("/generate?n=2", {"prompt": "hi"}).status == 200


def test_a_model_with_the_wrong_sign_is_refused_with_the_usual_causes(without_pairs, reward):
    right = knows(general_pairs())
    reward.script.score = lambda text: -right(text)
    with without_pairs() as client:
        state = settled(client)
        count = len(general_pairs())
        assert state.startswith(f"the reward model ranks {count} of {count} built-in pairs wrongly, so that it chooses")
        for hint in ("chat template", "activation", "higher better", "BONSAI_REWARD_PAIRS"):
            assert hint in state
        assert client.get("/ready").status == 503
        refused = client.post("/generate?n=2", {"prompt": "hi"})
        assert (refused.status, refused.json["error"]["code"]) == (503, "reward_model_refused")


@pytest.mark.parametrize(("known", "passes"), [(6, True), (5, False)])
def test_half_of_the_built_in_pairs_is_enough(without_pairs, reward, known, passes):
    """Of the others the worse answer is preferred."""
    pairs = general_pairs()
    assert len(pairs) == 12
    right, wrong = knows(pairs[:known], 0.0), {f"a:{pair.worse}\n" for pair in pairs[known:]}
    reward.script.score = lambda text: 1.0 if any(text.endswith(one) for one in wrong) else right(text)
    with without_pairs() as client:
        state = settled(client)
        assert (state == "passed") is passes
        assert passes or state.startswith("the reward model ranks 7 of 12 built-in pairs wrongly")


@pytest.mark.parametrize(("known", "passes"), [(1, True), (0, False)])
def test_a_tie_counts_as_half(without_pairs, reward, known, passes):
    """One wrong, ten or eleven alike: 1 + 10/2 is half of twelve, 11/2 is not."""
    pairs = general_pairs()
    right = knows(pairs[:known], 0.0)
    reward.script.score = lambda text: 1.0 if text.endswith(f"a:{pairs[-1].worse}\n") else right(text)
    with without_pairs() as client:
        state = settled(client)
        assert (state == "passed") is passes
        assert passes or state.startswith("the reward model ranks 1 of 12 built-in pairs wrongly and 11 alike")


@pytest.mark.parametrize(("score", "words"), CANNOT_TELL)
def test_a_model_that_cannot_tell_has_not_passed_the_built_in_pairs_either(without_pairs, reward, score, words):
    reward.script.score = score
    with without_pairs() as client:
        assert re.search(words, settled(client))


def test_pairs_beyond_the_window_say_nothing_against_a_model(without_pairs, reward):
    reward.script.score = lambda text: -1.0
    with without_pairs(window=16) as client:
        wait_until(lambda: client.get("/ready").json["reward_test"] == "untested")
        assert client.get("/ready").status == 200


def test_one_member_of_an_ensemble_with_the_wrong_sign_is_named(without_pairs, reward, tmp_path):
    """The other one is right and outweighs it a hundred times: as a whole nothing would be seen."""
    right = knows(general_pairs())
    turned = StubReward("rm-" + "3" * 16)
    turned.script.score = lambda text: -right(text)
    reward.script.score = right
    with running(turned.app()) as turned_url:
        directory = tmp_path / "model"

        def both(url):
            members = (vllm_member(url, directory, scale=100), vllm_member(turned_url, directory, turned.model))
            return RewardConfig(members=members)

        with without_pairs(both) as client:
            assert settled(client).startswith(f"the reward model {turned.model} ranks 12 of 12 built-in pairs wrongly")


def test_a_program_is_not_asked_about_general_pairs(without_pairs, reward):
    """What it rewards may be something else altogether; that nobody has tested it is said."""
    judge = StubScore("shorter-is-better")
    with running(judge.app()) as url:
        program = RewardConfig(members=(HttpMember(url=url, model=judge.model),))
        with without_pairs(lambda _: program) as client:
            assert (client.get("/ready").status, settled(client)) == (200, "untested")
            assert client.post("/generate?n=2", {"prompt": "hi"}).status == 200
    assert {request["prompt"] for request in judge.requests} == {"hi"}


def test_none_switches_the_test_off_and_the_log_says_so(tmp_path, engine, reward, redis_url, caplog):
    reward.script.score = lambda text: -1.0
    with running(engine.app()) as engine_url, running(reward.app()) as url:
        settings = gateway_settings(tmp_path, engine_url, url, redis_url, reward_pairs="none")
        with caplog.at_level(logging.WARNING, "bonsai.reward"), running_gateway(settings) as client:
            assert (client.get("/ready").status, settled(client)) == (200, "untested")
            wait_until(lambda: "the reward model is untested" in caplog.text)
    assert reward.requests == []


# --- while there is no verdict, and pairs that are none ----------------------------------------------------


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

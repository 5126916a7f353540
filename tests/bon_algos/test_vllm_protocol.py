"""How engine answers become candidates: order by index, checked, finite, nothing silently short."""

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon_algos.contracts import Sampling
from bon_algos.vllm_protocol import (
    CANARY_PRIORITY,
    LIVE_PRIORITY,
    ROLLOUT_PRIORITY,
    CompletionStream,
    MalformedReply,
    Piece,
    canary_request,
    classify_request,
    completion_request,
    forced_token_request,
    parse_classify,
    parse_completion,
    parse_forced_token,
)


def sent(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def choice(index: int, text: str, ids: list[int], finish: str | None) -> dict[str, object]:
    return {
        "index": index,
        "text": text,
        "token_ids": ids,
        "logprobs": {"token_logprobs": [-0.5] * len(ids)},
        "finish_reason": finish,
    }


def test_a_canary_is_one_token_ahead_of_users_and_users_are_ahead_of_rollouts():
    body = canary_request("pol-1")
    assert (body["n"], body["max_tokens"], body["stream"], body["priority"]) == (1, 1, False, CANARY_PRIORITY)
    assert CANARY_PRIORITY < LIVE_PRIORITY < ROLLOUT_PRIORITY


def test_n_candidates_are_one_call_with_raw_logprobs_and_token_ids():
    body = completion_request("pol-1", [1, 2], 16, Sampling(max_tokens=32, seed=7), stream=True)
    assert (body["n"], body["prompt"], body["seed"]) == (16, [1, 2], 7)
    assert body["logprobs"] == 0
    assert body["return_token_ids"] is True
    assert body["stream_interval"] == 32  # n > 1: whole candidates; n = 1 streams token by token
    assert completion_request("pol-1", [1], 1, Sampling(max_tokens=32), stream=True)["stream_interval"] == 1


@given(st.integers(1, 8), st.randoms())
def test_chunks_in_any_interleaving_give_candidates_in_drawing_order(n, rng: random.Random):
    queues = [[choice(i, f"a{i}", [i], None), choice(i, f"b{i}", [10 + i, 2], "stop")] for i in range(n)]
    stream = CompletionStream(n)
    while any(queues):
        stream.feed(sent({"choices": [rng.choice([queue for queue in queues if queue]).pop(0)]}))
    assert stream.is_complete
    assert [c.text for c in stream.candidates()] == [f"a{i}b{i}" for i in range(n)]
    assert [c.token_ids for c in stream.candidates()] == [(i, 10 + i, 2) for i in range(n)]


def test_a_candidate_that_never_finished_says_deadline():
    heard: list[Piece] = []
    stream = CompletionStream(2, heard.append)
    stream.feed(sent({"choices": [choice(1, "done", [4, 2], "stop")]}))
    [piece] = heard
    assert piece[:3] == (1, "done", (4, 2))
    assert piece.finish_reason == "stop"
    unfinished, finished = stream.candidates()
    assert (unfinished.failure, unfinished.finish_reason) == ("deadline", None)
    assert (finished.failure, finished.finish_reason) == (None, "stop")


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "out of memory"}},
        {"choices": "none"},
        {},
        [],
        {"choices": [{**choice(0, "x", [1], "stop"), "index": True}]},
        {"choices": [{**choice(0, "x", [1], "stop"), "text": None}]},
        {"choices": [choice(2, "x", [1], "stop")]},
        {"choices": [choice(0, "x", [1], "abort")]},
        {"choices": [{**choice(0, "x", [1], "stop"), "token_ids": [1, 2]}]},
        {"choices": [{**choice(0, "x", [1], "stop"), "logprobs": {"token_logprobs": [math.nan]}}]},
        {"choices": [{**choice(0, "x", [1], "stop"), "logprobs": {"token_logprobs": [10**400]}}]},
        {"choices": [{**choice(0, "x", [1], "stop"), "logprobs": {"token_logprobs": [True]}}]},
        {"choices": [{**choice(0, "x", [1], "stop"), "logprobs": {"token_logprobs": ["-1.0"]}}]},
        {"choices": [{**choice(0, "x", [1], "stop"), "token_ids": [-1]}]},
        {"choices": [{**choice(0, "x", [1], "stop"), "token_ids": [True]}]},
        {"choices": [{**choice(0, "x", [1], "stop"), "token_ids": [1.0]}]},
        {"choices": [choice(0, "x", [1], "stop"), choice(0, "y", [1], "stop")]},
    ],
)
def test_a_malformed_answer_is_refused(body):
    with pytest.raises(MalformedReply):
        CompletionStream(2).feed(sent(body))


def test_a_missing_candidate_is_an_error_and_not_a_smaller_n():
    with pytest.raises(MalformedReply, match="1 of 2"):
        parse_completion(sent({"choices": [choice(0, "x", [1], "stop")]}), 2)


def test_scores_are_matched_by_index_not_by_position():
    body = {"data": [{"index": 1, "probs": [0.25]}, {"index": 0, "probs": [-3]}]}
    assert parse_classify(body, 2) == [-3.0, 0.25]
    assert classify_request("rm-1", ["a", "b"], add_special_tokens=True)["use_activation"] is False


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "probs": [0.1]}],
        [{"index": 0, "probs": [0.1]}, {"index": 0, "probs": [0.2]}],
        [{"index": 0, "probs": [0.1, 0.9]}, {"index": 1, "probs": [0.2]}],
        [{"index": 0, "probs": [0.1]}, {"index": 5, "probs": [0.2]}],
        "scores",
    ],
)
def test_missing_doubled_or_shapeless_scores_are_refused(data):
    with pytest.raises(MalformedReply):
        parse_classify({"data": data}, 2)


def test_a_score_that_is_no_number_comes_back_as_nan_for_its_candidate_alone():
    scores = parse_classify({"data": [{"index": 0, "probs": ["high"]}, {"index": 1, "probs": [1.5]}]}, 2)
    assert math.isnan(scores[0])
    assert scores[1] == 1.5


def test_a_forced_token_is_asked_for_alone_and_must_be_the_one_that_comes():
    request = forced_token_request("pol-1", [7, 8], 9)
    assert (request["prompt"], request["max_tokens"], request["allowed_token_ids"]) == ([7, 8], 1, [9])
    answer = sent({"choices": [choice(0, "x", [9], "length")]})
    assert parse_forced_token(answer, 9) == -0.5
    with pytest.raises(MalformedReply):
        parse_forced_token(answer, 8)

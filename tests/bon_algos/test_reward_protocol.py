"""The HTTP schema of a reward model, said and read."""

from __future__ import annotations

import json
import math

import pytest

from bon_algos.contracts import Message, ToolCall
from bon_algos.reward_protocol import LONGEST_REASON, Verdict, parse_score, score_request
from bon_algos.vllm_protocol import MalformedReply, parse_classify


def test_a_request_holds_the_prompt_the_conversation_and_the_completions():
    asked = score_request("judge", "u:hi", [Message(role="user", content="hi")], ["a", "b"])
    turns = [{"role": "user", "content": "hi"}]
    assert asked == {"model": "judge", "prompt": "u:hi", "messages": turns, "completions": ["a", "b"]}
    assert score_request("judge", "hi", None, [])["messages"] is None


def test_calls_and_what_came_of_them_are_written_as_openai_writes_them():
    call = ToolCall(id="c1", name="add", arguments='{"a": 1}')
    asked = Message(role="assistant", content="", tool_calls=(call,))
    messages = [asked, Message(role="tool", content="2", tool_call_id="c1")]
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert score_request("judge", "p", messages, [])["messages"] == [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]


def test_rewards_come_in_order_and_null_is_none():
    assert parse_score({"rewards": [1, -2.5, None]}, 3) == [Verdict(1.0), Verdict(-2.5), Verdict(None)]


def test_a_reason_is_one_line_of_bounded_length():
    [said, other] = parse_score({"rewards": [None, 1], "reasons": ["two\nlines" + "x" * 1000, None]}, 2)
    assert said.reason.startswith("two linesxxx")
    assert len(said.reason) == LONGEST_REASON
    assert other.reason == ""


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_what_no_float_holds_is_left_to_the_caller_as_not_finite(text):
    [said] = parse_score(json.loads(f'{{"rewards": [{text}]}}'), 1)
    assert said.reward is not None
    assert not math.isfinite(said.reward)
    [reward] = parse_classify(json.loads(f'{{"data": [{{"index": 0, "probs": [{text}]}}]}}'), 1)
    assert not math.isfinite(reward)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, "not a list of 2"),
        ({"rewards": None}, "not a list of 2"),
        ({"rewards": {"0": 1, "1": 2}}, "not a list of 2"),
        ({"rewards": [1]}, "not a list of 2"),
        ({"rewards": [1, 2, 3]}, "not a list of 2"),
        ({"rewards": [1, "2"]}, "neither a number nor null"),
        ({"rewards": [1, True]}, "neither a number nor null"),
        ({"rewards": [1, [2]]}, "neither a number nor null"),
        ({"rewards": [1, 2], "reasons": ["x"]}, "`reasons` is not a list of 2"),
        ({"rewards": [1, 2], "reasons": "ab"}, "`reasons` is not a list of 2"),
        ({"rewards": [1, 2], "reasons": [1, 2]}, "neither a text nor null"),
    ],
)
def test_an_answer_that_breaks_the_schema_is_malformed(answer, words):
    with pytest.raises(MalformedReply, match=words):
        parse_score(answer, 2)

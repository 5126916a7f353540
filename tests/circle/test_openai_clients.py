"""OpenAI's own client against the whole stack: chats, completions and streams of a real engine."""

from __future__ import annotations

import re
from collections.abc import Iterator

import openai
import pytest

from bonsai.demo.prompts import held_out_prompts
from tests.fixtures.real_stack import RealStack, wait_until

pytestmark = pytest.mark.stack


@pytest.fixture
def client(stack: RealStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.stack.url}/v1", api_key=stack.stack.api_key, max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def messages():
    return [{"role": "user", "content": held_out_prompts()[0]}]


def test_a_chat_is_answered_by_the_best_of_16(stack, client, messages):
    reply = client.chat.completions.create(
        model="default", messages=messages, n=4, logprobs=True, extra_body={"best_of": 16}
    )
    assert reply.model_extra["bonsai"]["candidates"]["scored"] == 16
    assert len(reply.choices) == 4
    for choice in reply.choices:
        tokens = choice.logprobs.content
        assert all(token.logprob <= 0 for token in tokens)
        # A special token in the middle, which the demo's policy draws now and then, has a name and no text.
        assert re.sub(r"<\|\w+\|>", "", "".join(token.token for token in tokens)) == choice.message.content
    group = stack.group(reply.id)
    rewards = sorted((one.reward for one in group.candidates), reverse=True)
    texts = {one.reward: one.text for one in group.candidates}
    assert [choice.message.content for choice in reply.choices] == [texts[reward] for reward in rewards[:4]]


def test_the_alternatives_to_a_token_are_the_likeliest_ones(stack, client, messages):
    reply = client.chat.completions.create(
        model="default", messages=messages, logprobs=True, top_logprobs=5, extra_body={"best_of": 4}
    )
    for token in reply.choices[0].logprobs.content:
        top = [one.logprob for one in token.top_logprobs]
        assert len(top) == 5
        assert top == sorted(top, reverse=True)
        assert token.logprob <= top[0]
        assert token.logprob < top[-1] or token.token in [one.token for one in token.top_logprobs]


def test_a_prompt_of_token_ids_is_the_prompt_it_encodes(stack, client):
    """Greedy: the same tokens go on in the same way."""
    asked = {"model": stack.base_policy, "max_tokens": 8, "temperature": 0}
    text = client.completions.create(prompt="the food was", **asked)
    ids = list(stack.group(text.id).prompt_token_ids)
    assert client.completions.create(prompt=ids, **asked).choices[0].text == text.choices[0].text


def test_a_biased_token_is_all_that_is_said(stack, client):
    free = client.completions.create(model="default", prompt="the", best_of=1, max_tokens=1, logprobs=0)
    token = stack.group(free.id).candidates[0].token_ids[0]
    biased = client.completions.create(
        model="default", prompt="the", best_of=4, max_tokens=5, logit_bias={str(token): 100}, logprobs=0
    )
    assert set(biased.choices[0].logprobs.tokens) == set(free.choices[0].logprobs.tokens)
    assert not stack.group(biased.id).is_unbiased


def test_the_winner_is_streamed_as_it_would_be_returned(stack, client, messages):
    """With a seed the engine repeats itself: the stream says what the whole reply says."""
    asked = {"model": "default", "messages": messages, "seed": 11, "extra_body": {"best_of": 8}}
    whole = client.chat.completions.create(**asked)
    *said, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == whole.choices[0].message.content
    assert said[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert last.usage == whole.usage
    assert last.model_extra["bonsai"]["candidates"]["scored"] == 8


def test_a_single_sample_comes_token_by_token(stack, client, messages):
    stream = client.chat.completions.create(model=stack.base_policy, messages=messages, stream=True)
    *said, last = list(stream)
    group = stack.group(last.id)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == group.candidates[0].text
    assert len(said) >= len(group.candidates[0].token_ids) / 2


def test_a_stream_that_is_left_stops_the_engines_work(stack, client, messages):
    """64 candidates that cannot end: the engine would be at it for a while."""
    ended = stack.group(client.chat.completions.create(model="default", messages=messages).id)
    end = str(ended.candidates[ended.best].token_ids[-1])  # complete, so the end of sequence
    stream = client.chat.completions.create(
        model="default", messages=messages, stream=True, logit_bias={end: -100}, extra_body={"best_of": 64}
    )
    wait_until(lambda: stack.engine_runs() > 1, "the engine is at work")
    stream.close()
    wait_until(lambda: stack.engine_runs() == 0, "the engine stops", seconds=1)

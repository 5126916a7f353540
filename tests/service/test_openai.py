"""`/v1` as OpenAI's own client speaks it, against engines that say what the test tells them to say.

The stub's reward is the length of what the reward model reads, so the longest candidate wins.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import openai
import pytest

from tests.fixtures.waiting import wait_until
from tests.service.records import BASE
from tests.stubs.tokenizer import text_of

HI = [{"role": "user", "content": "hi"}]
THREE = ["short", "the longest of them all", "middling one"]


@pytest.fixture
def client(world) -> Iterator[openai.OpenAI]:
    host, port = world.client.address
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=world.client.key, max_retries=0) as opened:
        yield opened


# --- keys ------------------------------------------------------------------------------------------------


def test_a_wrong_key_and_one_that_may_not_are_what_the_client_calls_them(world, client):
    with pytest.raises(openai.AuthenticationError) as unknown:
        client.with_options(api_key="sk-proj-from-elsewhere").models.list()
    assert unknown.value.code == "invalid_key"
    viewer = world.client.post("/keys", {"name": "v", "role": "viewer"}).json["key"]
    with pytest.raises(openai.PermissionDeniedError) as forbidden:
        client.with_options(api_key=viewer).chat.completions.create(model="default", messages=HI)
    assert forbidden.value.code == "role_insufficient"
    assert [card.id for card in client.with_options(api_key=viewer).models.list()] == ["default", BASE]


# --- whole replies ---------------------------------------------------------------------------------------


def test_a_chat_is_answered_by_the_best_of_n(world, client):
    world.engine.script.completions = THREE
    reply = client.chat.completions.create(model="default", messages=HI, extra_body={"best_of": 3})
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "the longest of them all")
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert (reply.object, reply.model) == ("chat.completion", BASE)
    # One token per byte: "u:hi\na:" is 7, the winner 23; all three candidates are 5 + 23 + 12.
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 23, 30)
    told = reply.model_extra["bonsai"]
    assert told["candidates"] == {"requested": 3, "finished": 3, "scored": 3, "failed": {}}
    assert told["selection"] == {
        "status": "ok",
        "strategy": "fixed",
        "stop_reason": "fixed",
        "given_up": 0.0,
        "disagreement": None,
        "tokens_saved": 0,
        "reward_model": world.reward.model,
        "reward": 8 + 23,
        "margin": 11.0,
    }
    assert (told["arm"], told["arm_reason"], told["candidate_tokens"]) == (f"{BASE}:3", "default", 40)
    [group] = world.groups()
    assert group.id == reply.id == told["log_id"]


def test_a_completion_is_answered_by_the_best_of_n(world, client):
    world.engine.script.completions = THREE
    reply = client.completions.create(model="default", prompt="hi", best_of=3, logprobs=0)
    [choice] = reply.choices
    assert (reply.object, choice.text, choice.finish_reason) == ("text_completion", "the longest of them all", "stop")
    assert choice.logprobs.tokens[:3] == ["t", "h", "e"]
    assert choice.logprobs.token_logprobs == [-0.5] * 23


def test_the_best_n_of_best_of_are_returned_in_their_order(world, client):
    world.engine.script.completions = THREE
    reply = client.chat.completions.create(model="default", messages=HI, n=2, extra_body={"best_of": 3})
    assert [choice.message.content for choice in reply.choices] == ["the longest of them all", "middling one"]
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.usage.completion_tokens == 23 + 12
    assert world.engine.requests[0]["n"] == 3


def test_n_without_best_of_draws_what_the_route_draws(world, client):
    reply = client.chat.completions.create(model="default", messages=HI, n=4)
    assert (len(reply.choices), world.engine.requests[0]["n"]) == (4, 16)


def test_an_incomplete_choice_comes_last(world, client):
    world.engine.script.completions = THREE
    world.engine.script.finish_reasons = ["stop", "length", "stop"]
    reply = client.chat.completions.create(model="default", messages=HI, n=3, extra_body={"best_of": 3})
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "stop", "length"]


def test_log_probs_of_a_chat(world, client):
    world.engine.script.completions = ["ok"]
    reply = client.chat.completions.create(model="default", messages=HI, logprobs=True, extra_body={"best_of": 1})
    told = [(entry.token, entry.logprob, entry.bytes) for entry in reply.choices[0].logprobs.content]
    assert told == [("o", -0.5, [ord("o")]), ("k", -0.5, [ord("k")])]


def test_log_probs_are_of_the_candidate_that_soft_best_of_n_drew(world, client):
    """Not of the best one: some of 30 choices, of which each is a coin, are the other."""
    soft = json.dumps({"strategy": "soft", "softness": 1e9, "default_n": 2}).encode()
    assert world.client.request("PUT", "/routes/default", soft, {"Content-Type": "application/json"}).status == 200
    world.engine.script.completions = ["a", "bb"]
    said = set()
    for _ in range(30):
        [choice] = client.chat.completions.create(model="default", messages=HI, logprobs=True).choices
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
        said.add(choice.message.content)
    assert said == {"a", "bb"}


def test_every_sampling_parameter_reaches_the_engine(world, client):
    client.chat.completions.create(
        model="default",
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        max_completion_tokens=9,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": -100},
        stop=["x", "y"],
        seed=3,
        user="u",
        metadata={"session": "s"},
        store=False,
        response_format={"type": "text"},
        extra_body={"best_of": 2, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    )
    [request] = world.engine.requests
    asked = {
        "n": 2, "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {"7": -100}, "stop": ["x", "y"], "seed": 3,
    }  # fmt: skip
    assert {name: request[name] for name in asked} == asked
    assert not {"user", "metadata", "store"} & request.keys()
    [group] = world.groups()
    assert (group.sampling.logit_bias, group.is_unbiased, group.store) == (((7, -100.0),), False, False)


def test_a_policy_may_be_asked_by_its_name(world, client):
    reply = client.chat.completions.create(model=BASE, messages=HI)
    assert reply.model_extra["bonsai"]["arm"] == f"{BASE}:1"
    assert reply.model_extra["bonsai"]["arm_reason"] == "forced"


def test_models_are_the_routes_and_what_is_served(world, client):
    assert [model.id for model in client.models.list()] == ["default", BASE]
    assert client.models.retrieve("default").object == "model"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4")
    assert refused.value.code == "model_not_found"


# --- refusals --------------------------------------------------------------------------------------------


def test_what_is_null_was_not_said(world):
    unsaid = dict.fromkeys(("n", "stop", "seed", "max_tokens", "stream", "tools", "user", "logprobs"))
    assert world.client.post("/v1/chat/completions", {"model": "default", "messages": HI, **unsaid}).status == 200


@pytest.mark.parametrize(
    ("fields", "headers", "param"),
    [
        ({"n": 5}, {}, "n"),
        ({"best_of": 5}, {}, "best_of"),
        ({"n": 2, "best_of": 5}, {}, "best_of"),
        ({"model": BASE, "n": 5}, {}, "n"),
        ({"model": BASE, "best_of": 5}, {}, "best_of"),
        ({"n": 5}, {"x-bonsai-arm": "base:5"}, "x-bonsai-arm"),
        ({"n": 5}, {"x-bonsai-arm": "base:2"}, "n"),
        ({"n": 3, "best_of": 4}, {"x-bonsai-arm": "base:2"}, "n"),
    ],
)
def test_what_is_above_the_routes_cap_is_called_as_the_caller_called_it(world, fields, headers, param):
    json_type = {"Content-Type": "application/json"}
    capped = world.client.request("PUT", "/routes/default", b'{"default_n": 2, "n_cap": 4}', json_type)
    assert capped.status == 200
    reply = world.client.post("/v1/chat/completions", {"model": "default", "messages": HI, **fields}, headers)
    assert (reply.status, reply.json["error"]["param"]) == (422, param)
    if not headers:
        assert reply.json["detail"] == f"{param} must be at least 1 and at most 4; got an integer above it"


def test_a_model_that_is_none_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-4", messages=HI)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_an_engine_without_room_is_told_as_such(world, client):
    world.engine.script.fault = "busy"
    for is_stream in (False, True):
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model="default", messages=HI, stream=is_stream)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "1"


# --- streams ---------------------------------------------------------------------------------------------


def lines_of(world, body: dict[str, object]) -> list[str]:
    """The stream's events, whole."""
    reply = world.client.post("/v1/chat/completions", {"model": "default", "messages": HI, "stream": True, **body})
    assert reply.headers["content-type"].startswith("text/event-stream")
    text: str = reply.body.decode()
    return text.strip().split("\n\n")


def test_the_winner_of_n_is_streamed_in_the_engines_pieces(world, client):
    world.engine.script.completions = THREE
    world.engine.script.finish_reasons = ["stop", "length", "stop"]
    stream = client.chat.completions.create(
        model="default", messages=HI, stream=True, stream_options={"include_usage": True}, extra_body={"best_of": 3}
    )
    *said, end, last = list(stream)
    # The truncated candidate is the longest, and does not win. The stub says the first character, then the rest.
    assert [chunk.choices[0].delta.content for chunk in said] == ["m", "iddling one"]
    assert [chunk.choices[0].delta.role for chunk in said] == ["assistant", None]
    assert [chunk.choices[0].finish_reason for chunk in [*said, end]] == [None, None, "stop"]
    assert end.choices[0].delta.to_dict() == {}
    assert {chunk.object for chunk in [*said, end, last]} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in [*said, end, last]}) == 1
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert last.model_extra["bonsai"]["selection"]["status"] == "ok"
    [group] = world.groups()
    assert group.id == last.id


def test_the_best_n_of_best_of_are_streamed_in_their_order(world, client):
    """One behind the other, as a whole reply has them; the cut one is last."""
    world.engine.script.completions = THREE
    world.engine.script.finish_reasons = ["stop", "stop", "length"]
    asked = {"model": "default", "n": 3, "extra_body": {"best_of": 3}}
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    whole = client.chat.completions.create(messages=HI, **asked)
    *said, last = client.chat.completions.create(messages=HI, **streamed)
    parts = [chunk.choices[0] for chunk in said]
    assert [part.index for part in parts] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [part.delta.role for part in parts] == ["assistant", None, None] * 3
    assert [part.delta.content for part in parts[::3]] == ["t", "s", "m"]
    assert [part.delta.content for part in parts[1::3]] == [text[1:] for text in (THREE[1], THREE[0], THREE[2])]
    ends = [None, None, "stop", None, None, "stop", None, None, "length"]
    assert [part.finish_reason for part in parts] == ends
    assert last.usage == whole.usage
    *said, last = client.completions.create(prompt="hi", **streamed)
    parts = [chunk.choices[0] for chunk in said]
    assert [part.text for part in parts[1::3]] == [text[1:] for text in (THREE[1], THREE[0], THREE[2])]
    assert [part.finish_reason for part in parts] == ends
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_single_sample_is_streamed_as_it_comes(world, client):
    world.engine.script.completions = ["hello"]
    stream = client.completions.create(model=BASE, prompt="hi", stream=True, logprobs=0)
    *said, last = list(stream)
    assert [chunk.choices[0].text for chunk in said] == ["h", "ello"]
    assert [chunk.choices[0].logprobs.token_logprobs for chunk in said] == [[-0.5], [-0.5] * 4]
    assert [chunk.choices[0].finish_reason for chunk in [*said, last]] == [None, None, "stop"]
    assert (last.choices[0].text, last.choices[0].logprobs, last.usage) == ("", None, None)


@pytest.mark.parametrize("best_of", [1, 3])
def test_the_loop_that_everybody_writes_reads_a_stream(world, client, best_of):
    """It looks at the first choice of every chunk."""
    world.engine.script.completions = ["the longest", "short"]
    more = {"model": "default", "stream": True, "extra_body": {"best_of": best_of}}
    chats = list(client.chat.completions.create(messages=HI, **more))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chats) == "the longest"
    texts = list(client.completions.create(prompt="hi", **more))
    assert "".join(chunk.choices[0].text for chunk in texts) == "the longest"
    for chunks in (chats, texts):
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * (len(chunks) - 1), "stop"]
        assert ["bonsai" in chunk.model_extra for chunk in chunks] == [*[False] * (len(chunks) - 1), True]


def test_progress_is_told_in_comments_or_events(world):
    world.engine.script.completions = ["a", "b"]
    events = lines_of(world, {"best_of": 2})
    assert events[:3] == [": ping", ": bonsai candidates=1/2", ": bonsai candidates=2/2"]
    assert events[-1] == "data: [DONE]"
    events = lines_of(world, {"best_of": 2, "stream_options": {"bonsai_progress": True}})
    name, data = events[2].split("\n")
    assert name == "event: bonsai.progress"
    assert json.loads(data.removeprefix("data: ")) == {"candidates": {"requested": 2, "finished": 2}}


def test_a_client_that_stumbles_over_comments_gets_none(world):
    events = lines_of(world, {"best_of": 2, "stream_options": {"bonsai_comments": False}})
    assert [event[:6] for event in events] == ["data: "] * len(events)
    assert len(events) >= 3


def test_a_stream_begins_before_there_is_an_answer(world):
    """The headers and the first comment come while the engine is still at work."""
    world.engine.script.delays = [5.0]
    with connected(world) as connection:
        received = b""
        while b": ping" not in received:
            received += connection.recv(65_536)
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert world.engine.active == 1


@pytest.mark.parametrize(
    ("is_stream", "seen"), [(True, b": ping"), (True, b""), (False, b"")], ids=["stream", "before it began", "whole"]
)
def test_the_engine_stops_when_the_client_goes_away(world, is_stream, seen):
    world.engine.script.delays = [30.0]
    with connected(world, is_stream=is_stream) as connection:
        wait_until(lambda: world.engine.active == 1)
        while seen and seen not in connection.recv(65_536):
            pass
        left = time.monotonic()
    wait_until(lambda: world.engine.aborted_at != [])
    assert world.engine.aborted_at[0] - left < 1.0
    wait_until(lambda: world.engine.active == 0)


def connected(world, *, is_stream: bool = True) -> socket.socket:
    """A socket on which a best-of-4 was asked for."""
    body = json.dumps({"model": "default", "messages": HI, "stream": is_stream, "best_of": 4}).encode()
    connection = socket.create_connection(world.client.address, timeout=10)
    connection.sendall(world.client.written("POST", "/v1/chat/completions", body))
    return connection


def test_what_fails_after_the_first_byte_is_told_in_the_stream(world, client):
    world.engine.script.completions = ["one", "two"]
    world.engine.script.delays = [0.7]
    world.engine.script.fault = "one_missing"
    stream = client.chat.completions.create(model="default", messages=HI, stream=True, extra_body={"best_of": 2})
    with pytest.raises(openai.APIError, match="finished 1 of 2 candidates"):
        list(stream)


# --- token ids and alternatives --------------------------------------------------------------------------


def test_a_prompt_may_be_token_ids(world, client):
    ids = list(b"hi there")
    for prompt in (ids, [ids]):
        reply = client.completions.create(model="default", prompt=prompt, best_of=2)
        assert reply.usage.prompt_tokens == 8
    [first, second] = world.groups(2)
    assert (first.prompt_token_ids, first.prompt) == (tuple(ids), text_of(ids))
    assert first.session == second.session
    assert world.engine.requests[0]["prompt"] == ids
    assert world.reward.texts[0].startswith(f"u:{text_of(ids)}\n")


def test_alternatives_to_each_token_are_told_by_their_ids(world, client):
    """Two tokens may have one text; the engine is asked for ids, the likeliest come first."""
    world.engine.script.completions = ["ab"]
    world.engine.script.alternatives = {7: -2.0, 9: -1.0, 8: -3.0}
    chat = client.chat.completions.create(
        model="default", messages=HI, logprobs=True, top_logprobs=2, extra_body={"best_of": 2}
    )
    for token in chat.choices[0].logprobs.content:
        assert [(one.token, one.logprob) for one in token.top_logprobs] == [(text_of([9]), -1.0), (text_of([7]), -2.0)]
    plain = client.completions.create(model="default", prompt="hi", best_of=2, logprobs=3)
    assert plain.choices[0].logprobs.top_logprobs == [{text_of([9]): -1.0, text_of([7]): -2.0, text_of([8]): -3.0}] * 2
    stream = client.chat.completions.create(
        model=BASE, messages=HI, logprobs=True, top_logprobs=1, stream=True, extra_body={"best_of": 1}
    )
    said = [choice.logprobs for chunk in stream for choice in chunk.choices if choice.logprobs]
    told = [token for one in said for token in one.content]
    assert [one.logprob for token in told for one in token.top_logprobs] == [-1.0, -1.0]
    assert [request["logprobs"] for request in world.engine.requests] == [2, 3, 1]
    assert [group.sampling.top_logprobs for group in world.groups(3)] == [2, 3, 1]

"""Tools and prescribed answers on `/v1/chat/completions`, by OpenAI's own client against a stub that says what it is
told. The stub's reward is the length of what the reward model reads, so the longest candidate wins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import openai
import pytest
from pydantic import BaseModel

from service.json_schema import MAX_COUNT
from tests.fixtures.gateway import World, gateway_settings, running_gateway
from tests.stubs.server import running
from tests.stubs.tokenizer import text_of, write_model_directory

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>\n{% endif %}"
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
ASK = [{"role": "user", "content": "rain?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


@pytest.fixture
def world(tmp_path, engine, reward, redis_url) -> Iterator[World]:
    """As everywhere, but with a policy whose template has a place for tools."""
    models = write_model_directory(tmp_path / "with-tools", TEMPLATE)
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(
            tmp_path, engine_url, reward_url, redis_url, policy_directory=models, max_model_len=4096,
        )  # fmt: skip
        with running_gateway(settings) as client:
            yield World(client, engine, reward, redis_url)


@pytest.fixture
def client(world) -> Iterator[openai.OpenAI]:
    host, port = world.client.address
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=world.client.key, max_retries=0) as opened:
        yield opened


# --- tools -----------------------------------------------------------------------------------------------


def test_the_winners_call_is_a_tool_call_and_the_policy_saw_the_tools(world, client):
    world.engine.script.completions = ["I do not know.", "Let me see.\n" + CALL]
    reply = client.chat.completions.create(
        model="default", messages=ASK, tools=[WEATHER, CLOCK], extra_body={"best_of": 2}
    )
    [choice] = reply.choices
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Paris"},
    )
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    [request] = world.engine.requests
    assert text_of(request["prompt"]).startswith(
        json.dumps([WEATHER, {**CLOCK, "function": {"name": "clock", "parameters": {}}}])
    )
    assert "structured_outputs" not in request
    [group] = world.groups()
    assert group.is_unbiased
    assert group.candidates[1].text.endswith(CALL)


def test_a_conversation_goes_on_behind_the_tools_answer(world, client):
    """The client's own message object goes back as it came."""
    world.engine.script.completions = [CALL]
    asked = client.chat.completions.create(model="default", messages=ASK, tools=[WEATHER], extra_body={"best_of": 1})
    message = asked.choices[0].message
    assert message.content is None
    world.engine.script.completions = ["It rains."]
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    reply = client.chat.completions.create(
        model="default", messages=[*ASK, message, answer], tools=[WEATHER], extra_body={"best_of": 2}
    )
    assert reply.choices[0].message.content == "It rains."
    prompt = text_of(world.engine.requests[-1]["prompt"])
    assert prompt.endswith('a:<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>\nt:rain\na:')
    # The reward model's template has no place for calls: they are spelled out.
    told = 'u:rain?\na:{"name": "weather", "arguments": {"city": "Paris"}}\nt:rain\na:It rains.\n'
    assert world.reward.texts[-2:] == [told, told]


def test_two_calls_at_once_unless_one_is_wanted(world, client):
    world.engine.script.completions = [CALL + CALL]
    both = client.chat.completions.create(model="default", messages=ASK, tools=[WEATHER])
    one = client.chat.completions.create(model="default", messages=ASK, tools=[WEATHER], parallel_tool_calls=False)
    assert [len(reply.choices[0].message.tool_calls) for reply in (both, one)] == [2, 1]
    assert len({call.id for call in both.choices[0].message.tool_calls}) == 2


def test_no_tool_is_shown_where_none_may_be_called(world, client):
    world.engine.script.completions = [CALL]
    reply = client.chat.completions.create(model="default", messages=ASK, tools=[WEATHER], tool_choice="none")
    assert (reply.choices[0].message.content, reply.choices[0].message.tool_calls) == (CALL, None)
    assert text_of(world.engine.requests[0]["prompt"]) == "u:rain?\na:"


@pytest.mark.parametrize(
    ("choice", "names", "most"),
    [
        ("required", [["weather"], ["clock"]], None),
        ({"type": "function", "function": {"name": "clock"}}, [["clock"]], 1),
    ],
)
def test_a_call_that_must_come_is_prescribed_to_the_engine(world, client, choice, names, most):
    world.engine.script.completions = ['[{"name": "clock", "arguments": {}}]']
    reply = client.chat.completions.create(model="default", messages=ASK, tools=[WEATHER, CLOCK], tool_choice=choice)
    assert reply.choices[0].message.tool_calls[0].function.name == "clock"
    schema = world.engine.requests[0]["structured_outputs"]["json"]
    assert [one["properties"]["name"]["enum"] for one in schema["items"]["anyOf"]] == names
    assert schema.get("maxItems") == most
    assert not world.groups()[0].is_unbiased


def test_tools_that_must_be_called_count_together_and_those_that_may_be_do_not(world, client):
    """What the policy is only shown no engine compiles."""
    count = {"type": "object", "properties": {"a": {"type": "string", "maxLength": MAX_COUNT // 2 + 1}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": count}} for name in ("f", "g")]
    ask = partial(client.chat.completions.create, model="default", messages=ASK, tools=tools)
    with pytest.raises(openai.UnprocessableEntityError, match=f"at most {MAX_COUNT} together") as refused:
        ask(tool_choice="required")
    assert refused.value.param == "tool_choice"
    ask(tool_choice={"type": "function", "function": {"name": "f"}})
    ask(tool_choice="auto")
    assert len(world.engine.requests) == 2


def test_a_cut_call_is_text_that_was_cut(world, client):
    world.engine.script.completions, world.engine.script.finish_reasons = [CALL[:40]], ["length"]
    [choice] = client.chat.completions.create(model="default", messages=ASK, tools=[WEATHER]).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL[:40], None, "length")


@pytest.mark.parametrize("best_of", [1, 3])
def test_a_streamed_call_comes_whole_behind_its_words(world, client, best_of):
    world.engine.script.completions = ["Let me see.\n" + CALL]
    chunks = list(
        client.chat.completions.create(
            model="default", messages=ASK, tools=[WEATHER], stream=True, extra_body={"best_of": best_of}
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    [(call,)] = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert (call.index, call.function.name, json.loads(call.function.arguments)) == (0, "weather", {"city": "Paris"})
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"


def test_the_calls_of_streamed_choices_are_those_of_a_whole_reply(world, client):
    """Each choice is read for itself, and its calls are numbered and named for themselves."""
    world.engine.script.completions = ["Let me see.\n" + CALL, CALL + CALL]
    asked = {"model": "default", "messages": ASK, "tools": [WEATHER], "n": 2, "extra_body": {"best_of": 2}}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    said: dict[int, list[str]] = {0: [], 1: []}
    calls: dict[int, list[tuple[int, str]]] = {0: [], 1: []}
    for [choice] in (chunk.choices for chunk in chunks):
        said[choice.index].append(choice.delta.content or "")
        calls[choice.index] += [(call.index, call.function.name) for call in choice.delta.tool_calls or ()]
    whole = client.chat.completions.create(**asked).choices
    assert ["".join(texts) for texts in said.values()] == [choice.message.content or "" for choice in whole]
    assert {len(found) for found in calls.values()} == {1, 2}
    assert all(found == [(i, "weather") for i in range(len(found))] for found in calls.values())
    ids = [call.id for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("best_of", [1, 3])
def test_a_streamed_call_that_is_told_again_is_the_same_call(world, client, best_of):
    """Its id too: the client may have answered it already."""
    world.engine.script.completions = ["Let me see.\n" + CALL + CALL]

    def told() -> tuple[str, list[dict[str, object]]]:
        chunks = client.chat.completions.create(
            model="default",
            messages=ASK,
            tools=[WEATHER],
            stream=True,
            extra_body={"best_of": best_of},
            extra_headers={"Idempotency-Key": "once"},
        )
        deltas = [chunk.choices[0].delta for chunk in chunks]
        words = "".join(delta.content or "" for delta in deltas)
        return words, [call.to_dict() for delta in deltas for call in delta.tool_calls or ()]

    words, calls = told()
    assert told() == (words, calls)
    assert words == "Let me see."
    assert [call["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2
    assert len(world.engine.requests) == 1


def test_every_call_of_every_choice_has_an_id_of_its_own(world, client):
    world.engine.script.completions = [CALL + CALL]
    asked = [client.chat.completions.create(model="default", messages=ASK, tools=[WEATHER], n=2) for _ in range(2)]
    ids = {call.id for reply in asked for choice in reply.choices for call in choice.message.tool_calls}
    assert len(ids) == 2 * 2 * 2


@pytest.mark.parametrize("best_of", [1, 3])
def test_log_probs_of_a_streamed_call_are_of_every_token_once(world, client, best_of):
    """Words are held back while they may become a call; their tokens are told as they come."""
    world.engine.script.completions = ["Let me see.\n" + CALL]
    chunks = client.chat.completions.create(
        model="default", messages=ASK, tools=[WEATHER], stream=True, logprobs=True, extra_body={"best_of": best_of}
    )
    told = [one.token for chunk in chunks if (said := chunk.choices[0].logprobs) for one in said.content]
    assert "".join(told) == "Let me see.\n" + CALL


def test_a_stream_without_a_call_says_all_of_it(world, client):
    world.engine.script.completions = ["It may <rain> "]
    chunks = client.chat.completions.create(
        model="default", messages=ASK, tools=[WEATHER], stream=True, extra_body={"best_of": 1}
    )
    said = [chunk.choices[0] for chunk in chunks]
    assert "".join(one.delta.content or "" for one in said) == "It may <rain> "
    assert said[-1].finish_reason == "stop"


# --- prescribed answers ----------------------------------------------------------------------------------


class Forecast(BaseModel):
    city: str
    rain: bool


def test_an_answer_of_a_pydantic_model_is_parsed_by_the_client(world, client):
    world.engine.script.completions = ['{"city": "Paris", "rain": true}']
    reply = client.chat.completions.parse(
        model="default", messages=ASK, response_format=Forecast, extra_body={"best_of": 2}
    )
    assert reply.choices[0].message.parsed == Forecast(city="Paris", rain=True)
    schema = world.engine.requests[0]["structured_outputs"]["json"]
    assert schema["properties"].keys() == {"city", "rain"}
    [group] = world.groups()
    assert json.loads(group.sampling.json_schema) == schema
    assert not group.is_unbiased


def test_a_json_object_may_have_any_members(world, client):
    client.chat.completions.create(model="default", messages=ASK, response_format={"type": "json_object"})
    assert world.engine.requests[0]["structured_outputs"] == {"json": {"type": "object"}}


def test_a_null_inside_a_schema_means_something(world, client):
    schema = {"type": "object", "properties": {"x": {"default": None, "enum": [None, 1]}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "description": None, "schema": schema}}
    client.chat.completions.create(model="default", messages=ASK, response_format=form)
    assert world.engine.requests[0]["structured_outputs"] == {"json": schema}


@pytest.mark.parametrize("fault", ["refused", "refused_inside"])
def test_a_schema_that_the_engine_refuses_is_the_callers_fault(world, client, fault):
    world.engine.script.fault = fault
    with pytest.raises(openai.UnprocessableEntityError, match="schema") as refused:
        client.chat.completions.create(model="default", messages=ASK, response_format={"type": "json_object"})
    assert refused.value.param == "response_format"
    with pytest.raises(openai.InternalServerError, match="refuses"):
        client.chat.completions.create(model="default", messages=ASK)

"""Any model serves: another architecture, another tokenizer, random weights, nothing of the demo's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

from bon_algos.contracts import Candidate

pytestmark = pytest.mark.stack


def test_best_of_n_answers_prompts_and_conversations_in_any_script(foreign):
    for text in ("plain words", "Ünïcödé 中文 🎬"):
        reply = foreign.generate(text, n=4, max_tokens=12, return_candidates=True)
        assert reply["candidates"]["scored"] >= 1
        assert len(reply["choices"]) == 4
        raw = foreign.http.post("/generate?n=4", json={"prompt": text, "max_tokens": 12})
        assert raw.status_code == 200, raw.text


@pytest.fixture
def client(foreign) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{foreign.stack.url}/v1", api_key=foreign.stack.api_key, max_retries=0) as opened:
        yield opened


RAIN = {
    "type": "object",
    "properties": {"rain": {"type": "boolean"}, "city": {"enum": ["Paris", "Rome"]}},
    "required": ["rain", "city"],
    "additionalProperties": False,
}
HI: Any = [{"role": "user", "content": "hi"}]


def answer_to(client: openai.OpenAI, **prescribed: Any) -> Any:
    return client.chat.completions.create(
        model="default", messages=HI, max_tokens=100, extra_body={"best_of": 4}, **prescribed
    ).choices[0]


def test_weights_that_know_nothing_answer_in_the_form_that_is_prescribed(client):
    form = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": RAIN}}
    answer = json.loads(answer_to(client, response_format=form).message.content)
    assert Draft202012Validator(RAIN).is_valid(answer)


def test_weights_that_know_nothing_call_the_tool_that_must_be_called(client):
    tool = {"type": "function", "function": {"name": "forecast", "parameters": RAIN}}
    choice = answer_to(client, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "forecast")
    assert Draft202012Validator(RAIN).is_valid(json.loads(call.function.arguments))


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": "string", "pattern": "((("}, {"enum": []}])
def test_a_schema_that_no_grammar_can_hold_is_the_callers_fault_and_the_engine_lives(client, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.UnprocessableEntityError, match="schema"):
        answer_to(client, response_format=form)
    assert answer_to(client).finish_reason


def test_a_distillation_goes_round_with_it(foreign):
    foreign.fill_ledger([f"word number {i}" for i in range(12)], 4)
    usable = [group for group in foreign.groups() if group.is_unbiased]
    assert isinstance(usable[0].candidates[0], Candidate)
    method = {"type": "bon_forward_kl", "bon_forward_kl": {"n": 4, "steps": 4, "prompts_per_step": 4, "lora_rank": 8}}
    job = foreign.finished(foreign.start_job(method, n=4, held_out_fraction=0.3))
    assert job["status"] == "succeeded", job["error"]
    assert foreign.served(job["fine_tuned_model"])["fingerprint"]["passed"]

"""The OpenAPI document: nothing is missing from it, and what it says of bodies, queries and replies is what happens."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import redis as blocking_redis
from fastapi import APIRouter
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from bon_algos.contracts import JobSpec, job_checkpoints_key
from service.access import OPEN_TO_ALL
from service.app import Gateway, create_app
from service.errors import GatewayError, InvalidField, problem
from service.generation import CompletionOptions, GenerateRequest, require_sense
from service.json_body import parse_model
from service.openai_bodies import Body, ChatBody, CompletionBody
from service.openapi import OPERATIONS, PROBLEM, document, text_of
from service.routes import health
from service.routes.admin import page_of
from service.schemas import RESPONSES, SCHEMAS
from tests.fixtures.gateway import Reply, World
from tests.fixtures.waiting import wait_until
from tests.service.training_files import line, uploaded

ROOT = Path(__file__).parents[2]
CHAT = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}


def no_gateway() -> AbstractAsyncContextManager[Gateway]:
    raise AssertionError("nothing is opened")


APP = create_app(no_gateway)
DOCUMENT = document(APP.state.rights)
ENDPOINTS = {
    (method, route.path): route.endpoint
    for route in APP.routes
    if isinstance(route, APIRoute)
    for method in route.methods
}


def validator(schema: Any) -> Draft202012Validator:
    """Of a schema that may refer to the document's components."""
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def body_validator(name: str) -> Draft202012Validator:
    return validator({"$ref": SCHEMAS + name})


# --- the document ----------------------------------------------------------------------------------------


def test_the_committed_document_is_the_one_the_code_makes():
    """python -m service.openapi > docs/openapi.json"""
    assert (ROOT / "docs" / "openapi.json").read_text() == text_of(DOCUMENT)


def test_every_route_is_in_the_document():
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == ENDPOINTS.keys()


def test_an_app_with_a_route_that_the_document_does_not_know_does_not_start(monkeypatch):
    router = APIRouter()
    router.add_api_route("/open", health.health, dependencies=[OPEN_TO_ALL])
    monkeypatch.setattr(health, "router", router)
    with pytest.raises(ValueError, match=r"'GET', '/open'"):
        create_app(no_gateway)


def parts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(inner)


def test_the_document_holds_all_that_it_refers_to_and_every_schema_is_one():
    names = {part["$ref"] for part in parts(DOCUMENT) if isinstance(part.get("$ref"), str)}
    kinds = {"schemas": SCHEMAS, "responses": RESPONSES, "headers": "#/components/headers/"}
    known = {f"{prefix}{name}" for kind, prefix in kinds.items() for name in DOCUMENT["components"][kind]}
    assert names == known
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("model", "field"), [("GenerateRequest", "top_k"), ("ChatBody", "top_k"), ("CompletionBody", "model")]
)
def test_what_stands_below_a_field_is_its_description(model, field):
    """Below one of its own, an inherited one, and one whose schema was changed for null."""
    told = DOCUMENT["components"]["schemas"][model]["properties"][field]["description"]
    sources = inspect.getsource(CompletionOptions) + inspect.getsource(Body)
    assert re.search(rf'{field}: [^"]*"""{re.escape(told)}"""', sources)


def test_every_operation_has_a_name_of_its_own():
    names = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names) == len(OPERATIONS)


def test_any_key_may_read_it_and_nobody_else(world: World):
    key = world.client.post("/keys", {"name": "test", "role": "inference"}).json["key"]
    assert world.client.with_key(key).get("/openapi.json").json == DOCUMENT
    assert world.client.with_key(None).get("/openapi.json").status == 401
    assert world.client.get("/docs").status == 404


# --- what the routes read --------------------------------------------------------------------------------


def calls(function: Callable[..., object]) -> list[ast.Call]:
    source = ast.parse(inspect.getsource(function))
    return [node for node in ast.walk(source) if isinstance(node, ast.Call)]


def models_read(endpoint: Callable[..., Any]) -> set[type[BaseModel]]:
    """The models among what the endpoint passes on."""
    names = {arg.id for call in calls(endpoint) for arg in call.args if isinstance(arg, ast.Name)}
    found = [endpoint.__globals__.get(name) for name in names]
    return {one for one in found if isinstance(one, type) and issubclass(one, BaseModel)}


def query_read(endpoint: Callable[..., Any]) -> set[str]:
    names: set[str] = set()
    for call in calls(endpoint):
        match call.func:
            case ast.Name(id="query_parameters"):
                names |= set(_value_of(call.args[1], endpoint))
            case ast.Name(id="page_of"):
                names |= query_read(page_of)
    return names


def _value_of(argument: ast.expr, endpoint: Callable[..., Any]) -> tuple[str, ...]:
    """Written out, or the name of a constant."""
    if isinstance(argument, ast.Name):
        return tuple(endpoint.__globals__[argument.id])
    return tuple(ast.literal_eval(argument))


@pytest.mark.parametrize("named", OPERATIONS, ids=" ".join)
def test_the_body_and_the_query_are_those_that_the_route_reads(named):
    operation = OPERATIONS[named]
    assert models_read(ENDPOINTS[named]) == ({operation.body.model} if operation.body else set())
    told = {one.name for one in operation.parameters if one.place == "query"}
    assert told == query_read(ENDPOINTS[named])


@pytest.mark.parametrize(
    ("model", "nulls", "body", "is_valid"),
    [
        (GenerateRequest, None, {"prompt": "p", "stop": "x"}, True),
        (GenerateRequest, None, {"prompt": "p", "stop": ["x", "y"]}, True),
        (GenerateRequest, None, {"prompt": "p", "stop": ["x"] * 17}, False),
        (GenerateRequest, None, {"prompt": "p", "stop": 1}, False),
        (GenerateRequest, None, {"prompt": "p", "seed": 2**63}, False),
        (GenerateRequest, None, {"prompt": "p", "unknown": 1}, False),
        (CompletionBody, (), {"model": "m", "prompt": ["one"]}, True),
        (CompletionBody, (), {"model": "m", "prompt": [[1, 2]]}, True),
        (CompletionBody, (), {"model": "m", "prompt": ["one", "two"]}, False),
        (CompletionBody, (), {"model": "m", "prompt": "p", "temperature": None, "metadata": {"a": None}}, True),
        (CompletionBody, (), {"model": None, "prompt": "p"}, False),
        (ChatBody, (), {**CHAT, "tools": None, "stream_options": {"include_usage": None}}, True),
        (ChatBody, (), {**CHAT, "tool_choice": "perhaps"}, False),
        (JobSpec, None, {"method": {"type": "bond"}, "n": None}, False),
        (JobSpec, None, {"method": {"type": "bond", "bond": {"n": 4}}}, True),
    ],
)
def test_a_schema_of_a_body_agrees_with_what_reads_it(model, nulls, body, is_valid):
    try:
        parse_model(json.dumps(body).encode(), model, null_means_itself_in=nulls)
        is_read = True
    except GatewayError:
        is_read = False
    assert (is_read, body_validator(model.__name__).is_valid(body)) == (is_valid, is_valid)


@pytest.mark.parametrize("named", [named for named, one in OPERATIONS.items() if one.body], ids=" ".join)
def test_an_example_of_a_body_is_read(named):
    body = OPERATIONS[named].body
    assert body is not None
    parse_model(json.dumps(body.example).encode(), body.model)
    body_validator(body.model.__name__).validate(body.example)


@pytest.mark.parametrize("body", [{"prompt": "p", "seed": None}, {}, {"prompt": "p", "prompt_token_ids": [1]}])
def test_what_generate_refuses_beyond_its_types_is_in_its_schema(body):
    with pytest.raises(InvalidField):
        require_sense(GenerateRequest.model_validate(body))
    assert not body_validator("GenerateRequest").is_valid(body)


# --- what the routes answer ------------------------------------------------------------------------------


def as_described(method: str, path: str, reply: Reply) -> Any:
    """The reply's JSON, which has the members that the document tells, and no others."""
    response = DOCUMENT["paths"][path][method.lower()]["responses"][str(reply.status)]
    content = response["content"][reply.headers["content-type"]]
    required = {name.lower() for name in response["headers"] if DOCUMENT["components"]["headers"][name].get("required")}
    assert required <= reply.headers.keys()
    closed = json.loads(json.dumps(DOCUMENT["components"]["schemas"]))
    for part in parts(closed):
        if "required" in part and isinstance(part.get("properties"), dict):
            part.setdefault("additionalProperties", False)
    schema = {**content["schema"], "components": {"schemas": closed}}
    Draft202012Validator(schema).validate(reply.json)
    return reply.json


def test_completions_are_as_described(world: World):
    world.engine.script.alternatives = {1: -0.5, 2: -1.5}
    bodies: dict[str, list[dict[str, Any]]] = {
        "/generate": [{"prompt": "p", "n": 3, "return_candidates": True}, {"prompt": "p", "n": 1}],
        "/v1/completions": [{"model": "default", "prompt": "p", "n": 2, "logprobs": 2}],
        "/v1/chat/completions": [CHAT, {**CHAT, "logprobs": True, "top_logprobs": 2}],
    }
    for path, several in bodies.items():
        for body in several:
            reply = world.client.post(path, body)
            assert reply.status == 200, reply.body
            as_described("POST", path, reply)


def test_a_reply_that_is_told_again_says_so_in_a_header_that_the_document_tells(world: World):
    for i in range(4):
        assert world.client.post("/generate", {"prompt": f"p{i}", "n": 2}).status == 200
    world.groups(4)
    job = {"method": {"type": "bon_sft", "bon_sft": {"n": 2}}}
    bodies: dict[str, Any] = {
        "/generate": {"prompt": "p", "n": 2},
        "/v1/completions": {"model": "default", "prompt": "p"},
        "/v1/chat/completions": CHAT,
        "/distill": job,
        "/v1/fine_tuning/jobs": {"model": "default", "training_file": "ledger:default", **job},
    }
    for path, body in bodies.items():
        replies = [world.client.post(path, body, {"Idempotency-Key": path}) for _ in range(2)]
        assert [reply.headers.get("idempotent-replayed") for reply in replies] == [None, "true"], replies[0].body
        told = DOCUMENT["paths"][path]["post"]["responses"][str(replies[1].status)]["headers"]
        assert "Idempotent-Replayed" in told
        as_described("POST", path, replies[1])


def test_the_control_plane_answers_as_described(world: World):
    client = world.client
    for i in range(4):
        said = client.post("/generate", {"prompt": f"p{i}", "n": 2, "route": "default"}).json["id"]
    world.groups(4)

    def ask(method: str, path: str, body: object = None, **names: str) -> Any:
        filled = re.sub(r"{(\w+)}", lambda found: names[found[1]], path)
        content, kind = (
            (None, {}) if body is None else (json.dumps(body).encode(), {"Content-Type": "application/json"})
        )
        reply = client.request(method, filled + names.get("query", ""), content, kind)
        assert reply.status < 300, reply.body
        return as_described(method, path, reply)

    key = ask("POST", "/keys", {"name": "test", "role": "viewer"})["id"]
    ask("GET", "/keys")
    ask("GET", "/keys/{key_id}", key_id=key)
    ask("DELETE", "/keys/{key_id}", key_id=key)
    ask("PUT", "/routes/{route}", {"default_n": 2}, route="other")
    ask("PUT", "/routes/{route}", {"strategy": "adaptive"}, route="other")
    ask("GET", "/routes")
    ask("GET", "/routes/{route}", route="default")
    ask("GET", "/routes/{route}/strategy", route="default")
    ask("GET", "/routes/{route}/curve", route="default", query="?n=2")
    [base] = ask("GET", "/policies")["data"]
    ask("GET", "/policies/{policy_id}", policy_id=base["id"])
    arms = [{"policy": "base", "n": 2, "weight": 9999}, {"policy": "base", "n": 1, "weight": 1}]
    ask("PUT", "/experiments/{route}", {"arms": arms}, route="default")
    for i in range(4):
        client.post("/generate", {"prompt": f"q{i}", "n": 2})
    wait_until(lambda: any(arm["reward"] for arm in client.get("/experiments/default").json["arms"]))
    ask("GET", "/experiments/{route}", route="default")
    ask("DELETE", "/experiments/{route}", route="default")
    job = ask("POST", "/distill", {"method": {"type": "bon_forward_kl", "bon_forward_kl": {"n": 2}}, "n": 2})["id"]
    body = {"model": "default", "training_file": "ledger:default", "method": {"type": "bon_sft", "bon_sft": {"n": 2}}}
    ask("POST", "/v1/fine_tuning/jobs", body)
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        store.hset(job_checkpoints_key(job), "20", json.dumps({"created_at": 1.5, "metrics": {"loss": 0.5}}))
    for jobs in ("/distill", "/v1/fine_tuning/jobs"):
        ask("GET", jobs)
        ask("GET", jobs + "/{job_id}", job_id=job)
        ask("POST", jobs + "/{job_id}/pause", job_id=job)
        ask("POST", jobs + "/{job_id}/resume", job_id=job)
        assert ask("GET", jobs + "/{job_id}/events", job_id=job)["data"]
        assert ask("GET", jobs + "/{job_id}/checkpoints", job_id=job)["data"]
    ask("POST", "/distill/{job_id}/cancel", job_id=job)
    ask("POST", "/v1/feedback", {"response": said, "value": True})
    wait_until(lambda: bool(client.get(f"/v1/feedback?response={said}").json["data"]))
    ask("GET", "/v1/feedback", query=f"?response={said}")
    told = ask("POST", "/distill", {"method": {"type": "bon_sft", "bon_sft": {"n": 2}}, "n": 2}, query="?dry_run=true")
    assert told["data"]["curve"]
    file = as_described("POST", "/v1/files", uploaded(client, line() + line(rewards=[])))["id"]
    ask("GET", "/v1/files")
    ask("GET", "/v1/files/{file_id}", file_id=file)
    content = client.get(f"/v1/files/{file}/content")
    assert content.headers["content-type"] in DOCUMENT["paths"]["/v1/files/{file_id}/content"]["get"]["responses"][
        "200"]["content"]  # fmt: skip
    ask("DELETE", "/v1/files/{file_id}", file_id=file)
    asked = {"name": "n", "url": "https://93.184.215.14/", "event_types": ["fine_tuning.job.failed"]}
    webhook = ask("POST", "/v1/webhook_endpoints", asked)["id"]
    ask("GET", "/v1/webhook_endpoints")
    one = "/v1/webhook_endpoints/{webhook_id}"
    ask("GET", one, webhook_id=webhook)
    ask("POST", one, {"bonsai": {"enabled": False}}, webhook_id=webhook)
    ask("POST", f"{one}/rotate_secret", {"keep_old_secret_active_for_24_hours": True}, webhook_id=webhook)
    ask("GET", f"{one}/deliveries", webhook_id=webhook)
    ask("DELETE", one, webhook_id=webhook)
    ask("GET", "/v1/webhook_event_types")
    ask("GET", "/v1/models")
    ask("GET", "/v1/models/{model}", model="default")
    ask("POST", "/engines/{name}/drain", name="policy-0")
    ask("GET", "/engines")
    ask("POST", "/engines/{name}/undrain", name="policy-0")
    for path in ("/health", "/ready", "/version", "/openapi.json"):
        ask("GET", path)


def test_another_method_is_told_all_that_there_are(world: World):
    for path, methods in DOCUMENT["paths"].items():
        reply = world.client.request("TRACE", path)
        assert (reply.status, reply.headers["allow"]) == (405, ", ".join(sorted(methods)).upper())


def test_a_refusal_is_as_described():
    problem_of = validator({"$ref": SCHEMAS + PROBLEM.name})
    for error in (GatewayError("words"), GatewayError("words", param="n", facts={"limit": 3})):
        assert problem_of.is_valid(problem(error, "req_1"))
    assert not problem_of.is_valid({"detail": "Not Found"})

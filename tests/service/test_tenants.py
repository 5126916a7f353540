"""One tenant's objects do not exist for another: for each route, the ids of one with the key of another."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import redis as blocking_redis

from bon_algos.contracts import (
    POLICIES_INDEX,
    Exposure,
    Feedback,
    Outcome,
    erasure_id,
    policy_key,
    subject_digest,
)
from service.access import rights
from service.app import create_app
from tests.fixtures.gateway import Client, Reply, World
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, STUDENT, policy
from tests.service.test_access import MATRIX, no_gateway
from tests.service.training_files import line, uploaded

TYPED = {"Content-Type": "application/json"}
ARMS = [{"policy": "base", "n": 2, "weight": 5000}, {"policy": "base", "n": 1, "weight": 5000}]
JOBS = ("/distill", "/v1/fine_tuning/jobs")
JOB = {"route": "chat", "n": 2, "method": {"type": "bon_sft", "bon_sft": {"n": 2}}}


class Owned(NamedTuple):
    """A tenant that has one of everything."""

    client: Client
    response: str
    job: str
    key: str
    file: str
    webhook: str
    policy: str = STUDENT


def admin_of(world: World, tenant: str) -> Client:
    reply = world.client.post("/keys", {"name": "a", "role": "admin", "tenant": tenant})
    assert reply.status == 201, reply.body
    return world.client.with_key(reply.json["key"])


def put(client: Client, path: str, body: object) -> Reply:
    return client.request("PUT", path, json.dumps(body).encode(), TYPED)


@pytest.fixture(scope="module")
def acme(still_world: World) -> Owned:
    """Has a route, an experiment on it, a policy, answers, feedback, a job and a key."""
    client = admin_of(still_world, "acme")
    assert put(client, "/routes/chat", {"default_n": 2}).status == 201
    replies = [client.post("/generate", {"prompt": f"p{i}", "route": "chat", "n": 2}) for i in range(4)]
    assert [reply.status for reply in replies] == [200] * 4
    response = replies[0].json["id"]
    wait_until(lambda: put(client, "/experiments/chat", {"arms": ARMS}).status == 200)
    assert client.post("/generate", {"prompt": "p", "route": "chat"}).status == 200
    said = {"response": response, "value": True, "comment": "kind"}
    wait_until(lambda: client.post("/v1/feedback", said).status == 201)
    assert client.post("/v1/feedback", {"session": "lunch", "value": 1}).status == 201
    wait_until(lambda: client.post("/distill", JOB).status == 202)
    assert put(client, "/routes/chat/circle", {}).status == 201
    record = policy(STUDENT).model_copy(update={"tenant": "acme"})
    with blocking_redis.Redis.from_url(still_world.redis_url) as store:
        store.hset(policy_key(STUDENT), mapping={"record": record.model_dump_json(), "version": 1})
        store.zadd(POLICIES_INDEX, {STUDENT: 1.0})
    wait_until(lambda: client.get(f"/policies/{STUDENT}").status == 200)
    assert put(client, "/tags/best", {"policy": STUDENT}).status == 201
    wait_until(lambda: len(client.get(f"/v1/feedback?response={response}").json["data"]) == 1)
    wait_until(lambda: len(client.get("/v1/feedback?session=lunch").json["data"]) == 1)
    job = client.get("/distill").json["data"][0]["id"]
    key = client.post("/keys", {"name": "b", "role": "viewer"}).json["id"]
    assert client.post("/ledger/erasures", {"user": "somebody"}).json["id"] == ERASURE
    file = uploaded(client, line()).json["id"]
    told = {"name": "n", "url": "https://93.184.215.14/", "event_types": ["fine_tuning.job.failed"]}
    webhook = client.post("/v1/webhook_endpoints", told).json["id"]
    return Owned(client, response, job, key, file, webhook)


@pytest.fixture(scope="module")
def others(still_world: World) -> dict[str, Client]:
    return {"default": still_world.client, "globex": admin_of(still_world, "globex")}


def foreign(owned: Owned) -> dict[tuple[str, str], tuple[str, object]]:
    """(method, route of the router) -> the request for an object of that tenant, and its body."""
    promote = {"route": "default", "override_reason": "r"}
    return {
        ("POST", "/generate"): ("/generate", {"prompt": "hi", "route": "chat"}),
        ("POST", "/v1/completions"): ("/v1/completions", {"prompt": "hi", "model": "chat"}),
        ("POST", "/v1/chat/completions"): (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "model": owned.policy},
        ),
        ("GET", "/v1/models/{model}"): ("/v1/models/chat", None),
        ("POST", "/v1/feedback"): ("/v1/feedback", {"response": owned.response, "value": False}),
        ("GET", "/routes/{route}"): ("/routes/chat", None),
        ("GET", "/routes/{route}/curve"): ("/routes/chat/curve", None),
        ("GET", "/routes/{route}/strategy"): ("/routes/chat/strategy", None),
        ("DELETE", "/routes/{route}"): ("/routes/chat", None),
        ("POST", "/routes/{route}/rollback"): ("/routes/chat/rollback", None),
        ("GET", "/policies/{policy_id}"): (f"/policies/{owned.policy}", None),
        ("GET", "/policies/{policy_id}/report"): (f"/policies/{owned.policy}/report", None),
        ("POST", "/policies/{policy_id}/promote"): (f"/policies/{owned.policy}/promote", promote),
        ("POST", "/policies/{policy_id}/withdraw"): (f"/policies/{owned.policy}/withdraw", {"route": "default"}),
        ("POST", "/policies/{policy_id}/retire"): (f"/policies/{owned.policy}/retire", None),
        ("PATCH", "/policies/{policy_id}"): (f"/policies/{owned.policy}", {"is_protected": True}),
        ("DELETE", "/policies/{policy_id}"): (f"/policies/{owned.policy}", None),
        ("GET", "/policies/{policy_id}/lineage"): (f"/policies/{owned.policy}/lineage", None),
        ("GET", "/policies/{policy_id}/export"): (f"/policies/{owned.policy}/export", None),
        ("GET", "/routes/{route}/trials"): ("/routes/chat/trials", None),
        ("GET", "/tags/{tag}"): ("/tags/best", None),
        ("PUT", "/tags/{tag}"): ("/tags/best", {"policy": owned.policy}),
        ("DELETE", "/tags/{tag}"): ("/tags/best", None),
        ("GET", "/routes/{route}/circle"): ("/routes/chat/circle", None),
        ("PUT", "/routes/{route}/circle"): ("/routes/chat/circle", {}),
        ("DELETE", "/routes/{route}/circle"): ("/routes/chat/circle", None),
        ("POST", "/routes/{route}/circle/start"): ("/routes/chat/circle/start", None),
        ("POST", "/routes/{route}/circle/stop"): ("/routes/chat/circle/stop", None),
        ("GET", "/experiments/{route}"): ("/experiments/chat", None),
        ("PUT", "/experiments/{route}"): ("/experiments/chat", {"arms": ARMS}),
        ("DELETE", "/experiments/{route}"): ("/experiments/chat", None),
        ("POST", "/distill"): ("/distill", JOB),
        ("POST", "/v1/fine_tuning/jobs"): (
            "/v1/fine_tuning/jobs",
            {"model": "chat", "training_file": "ledger:chat", "method": JOB["method"]},
        ),
        **{
            (method, f"{jobs}/{{job_id}}{path}"): (f"{jobs}/{owned.job}{path}", None)
            for jobs in JOBS
            for method, path in (
                *(("GET", path) for path in ("", "/events", "/checkpoints")),
                *(("POST", path) for path in ("/pause", "/resume", "/cancel")),
            )
        },
        ("GET", "/ledger/erasures/{erasure_id}"): (f"/ledger/erasures/{ERASURE}", None),
        ("GET", "/v1/files/{file_id}"): (f"/v1/files/{owned.file}", None),
        ("GET", "/v1/files/{file_id}/content"): (f"/v1/files/{owned.file}/content", None),
        ("DELETE", "/v1/files/{file_id}"): (f"/v1/files/{owned.file}", None),
        **{
            (method, f"/v1/webhook_endpoints/{{webhook_id}}{path}"): (
                f"/v1/webhook_endpoints/{owned.webhook}{path}",
                body,
            )
            for method, path, body in (
                ("GET", "", None),
                ("POST", "", {"bonsai": {"enabled": False}}),
                ("DELETE", "", None),
                ("POST", "/test", {"event_type": "fine_tuning.job.failed"}),
                ("POST", "/rotate_secret", {}),
                ("GET", "/deliveries", None),
            )
        },
        ("GET", "/keys/{key_id}"): (f"/keys/{owned.key}", None),
        ("DELETE", "/keys/{key_id}"): (f"/keys/{owned.key}", None),
    }


ERASURE = erasure_id(subject_digest("acme", "somebody"))
WITHOUT_OBJECTS = {
    # Lists, of which `test_lists_hold_what_is_ones_own` looks at each.
    ("GET", "/v1/models"), ("GET", "/v1/feedback"), ("GET", "/routes"), ("GET", "/policies"), ("GET", "/distill"),
    ("GET", "/v1/fine_tuning/jobs"), ("GET", "/circles"), ("POST", "/circles/stop"),
    ("GET", "/keys"), ("GET", "/ledger"), ("GET", "/v1/files"),
    # Of a user of the caller's own tenant, whoever else has one of that name.
    ("POST", "/ledger/erasures"),
    # Of one's own, whatever others have of the same content: test_files.py.
    ("POST", "/v1/files"),
    ("GET", "/tags"), ("GET", "/audit"), ("GET", "/v1/webhook_endpoints"), ("POST", "/v1/webhook_endpoints"),
    ("GET", "/v1/webhook_event_types"),
    # Names a directory, whose manifest says whose it is.
    ("POST", "/policies"),
    # Makes a route of the caller's own, as `test_one_name_is_as_many_routes_as_tenants` sees.
    ("PUT", "/routes/{route}"),
    ("POST", "/keys"), ("GET", "/health"), ("GET", "/ready"), ("GET", "/version"), ("GET", "/openapi.json"),
    # All tenants share the engines, and one of them runs the installation.
    ("GET", "/engines"), ("POST", "/engines/{name}/drain"), ("POST", "/engines/{name}/undrain"),
}  # fmt: skip
NAMED = sorted(set(MATRIX) - WITHOUT_OBJECTS)


def test_every_route_that_names_an_object_is_tried():
    assert set(foreign(Owned(Client("http://x:1", None), "", "", "", "", ""))) | WITHOUT_OBJECTS == set(
        rights(create_app(no_gateway))
    )


@pytest.mark.parametrize("who", ["default", "globex"])
@pytest.mark.parametrize("named", NAMED, ids=[" ".join(named) for named in NAMED])
def test_C13_another_tenants_object_is_absent(acme, others, named, who):
    if named[1] == "/keys/{key_id}" and who == "default":
        assert others[who].get(f"/keys/{acme.key}").json["tenant"] == "acme"  # the operator's own tenant
        return
    path, body = foreign(acme)[named]
    content = json.dumps(body).encode() if body is not None else None
    reply = others[who].request(named[0], path, content, TYPED)
    assert reply.status == 404, reply.body


def test_nothing_of_a_tenant_was_changed_by_those_tries(acme):
    """And the same requests with its own key find what they name."""
    assert acme.client.get("/routes/chat").json["experiment"] is not None
    assert acme.client.get("/experiments/chat").json["status"] == "running"
    assert acme.client.get(f"/distill/{acme.job}").json["status"] == "queued"
    assert acme.client.get(f"/keys/{acme.key}").json["status"] == "active"
    found = acme.client.get(f"/policies/{acme.policy}").json
    assert (found["live_on"], found["state"], found["is_protected"]) == ([], "candidate", False)
    assert acme.client.get("/tags/best").json["policy"] == acme.policy
    kept = acme.client.get(f"/v1/webhook_endpoints/{acme.webhook}").json["bonsai"]
    assert (kept["enabled"], kept["former_secret_until"], kept["waiting"]) == (True, None, 0)
    assert len(acme.client.get(f"/v1/feedback?response={acme.response}").json["data"]) == 1
    assert acme.client.get("/routes/chat/curve").status in (200, 409)


def test_the_engines_are_the_operators(acme, others):
    for method, path in (
        ("GET", "/engines"),
        ("POST", "/engines/policy-0/drain"),
        ("POST", "/engines/policy-0/undrain"),
    ):
        assert acme.client.request(method, path).status == 403
        assert others["default"].request(method, path).status == 200


@pytest.mark.parametrize("who", ["default", "globex"])
def test_lists_hold_what_is_ones_own(acme, others, who):
    def ids(client: Client, path: str) -> set[str]:
        return {row["id"] for row in client.get(path).json["data"]}

    assert ids(others[who], "/routes") == {"default"}
    assert ids(others[who], "/policies") == {BASE}
    assert ids(others[who], "/v1/models") == {"default", BASE}
    assert ids(others[who], "/distill") == ids(others[who], "/v1/fine_tuning/jobs") == set()
    assert acme.response not in ids(others[who], "/ledger?limit=1000")
    assert acme.response in ids(acme.client, "/ledger?limit=1000")
    assert ids(others[who], f"/v1/feedback?response={acme.response}") == set()
    assert ids(others[who], "/v1/feedback?session=lunch") == set()
    assert (acme.key in ids(others[who], "/keys")) == (who == "default")
    assert ids(others[who], "/tags") == ids(others[who], "/v1/webhook_endpoints") == set()
    assert ids(acme.client, "/v1/webhook_endpoints") == {acme.webhook}
    assert acme.key not in {row["about"].get("key") for row in others[who].get("/audit?limit=100").json["data"]}
    assert ids(acme.client, "/tags") == {"best"}
    assert {row["event"] for row in acme.client.get("/audit?limit=100").json["data"]} >= {"route_put", "tag_put"}
    assert ids(acme.client, "/routes") == {"chat", "default"}
    assert ids(acme.client, "/policies") == {BASE, STUDENT}
    assert ids(acme.client, "/distill") == {acme.job}
    assert {"chat", "default", BASE} <= ids(acme.client, "/v1/models")
    assert others[who].get(f"/distill?after={acme.job}").status == 422


def test_what_is_logged_says_whose_it_is(still_world, acme):
    client = acme.client
    single = client.post("/generate", {"prompt": "one", "n": 1, "route": "chat"}).json["id"]

    def of_that() -> list[Any]:
        return [one for one in still_world.records() if getattr(one, "group_id", getattr(one, "id", "")) == single]

    wait_until(lambda: any(isinstance(record, Outcome) for record in of_that()))
    assert {record.tenant for record in still_world.records()} == {"acme"}
    kinds = {type(record) for record in still_world.records()}
    assert {Exposure, Feedback, Outcome} <= kinds


def test_a_tenant_is_never_said_in_a_body(acme):
    for path, body in (
        ("/generate", {"prompt": "hi", "tenant": "default"}),
        ("/v1/feedback", {"session": "s", "value": 1, "tenant": "default"}),
        ("/distill", {**JOB, "tenant": "default"}),
    ):
        reply = acme.client.post(path, body)
        assert (reply.status, reply.json["error"]["param"]) == (422, "tenant")
    assert put(acme.client, "/routes/chat", {"tenant": "default"}).status == 422


def test_a_slash_in_a_name_leads_to_no_other_tenant(still_world, acme, others):
    for body in ({"prompt": "hi", "route": "acme/chat"}, {"prompt": "hi", "route": "acme/default"}):
        assert still_world.client.post("/generate", body).status == 404
    for path in ("/routes/acme%2Fchat", "/experiments/acme%2Fchat"):
        assert still_world.client.get(path).status == 404
        assert put(still_world.client, path, {"arms": ARMS}).status in (404, 405, 422)


# --- what a tenant begins with and shares ----------------------------------------------------------------


def test_one_name_is_as_many_routes_as_tenants(world):
    """The newcomer has a route `default` of its own, with the installation's values, and the base answers on it."""
    here, there = world.client, admin_of(world, "acme")
    assert put(here, "/routes/default", {"default_n": 3}).status == 200
    assert put(here, "/routes/chat", {"default_n": 4}).status == 201
    assert there.get("/routes/default").json["default_n"] == 16
    assert put(there, "/routes/chat", {"default_n": 5}).status == 201
    arms = [client.post("/generate", {"prompt": "hi", "route": "chat"}).json["arm"] for client in (here, there)]
    assert arms == [f"{BASE}:4", f"{BASE}:5"]
    assert there.request("DELETE", "/routes/chat").status == 204
    assert here.get("/routes/chat").json["default_n"] == 4


def test_an_idempotency_key_is_its_tenants(world):
    here, there = world.client, admin_of(world, "acme")
    once = {"Idempotency-Key": "once"}
    first = here.post("/generate", {"prompt": "hi", "n": 2}, once)
    same = here.post("/generate", {"prompt": "hi", "n": 2}, once)
    other = there.post("/generate", {"prompt": "hi", "n": 2}, once)
    assert first.json["id"] == same.json["id"] != other.json["id"]
    for path, body in (("/v1/feedback", {"session": "s", "value": 1}), ("/routes/default/rollback", None)):
        answers = [client.post(path, body, {"Idempotency-Key": f"f{path}"}) for client in (here, there)]
        assert "idempotent-replayed" not in answers[1].headers


def test_feedback_on_sessions_of_one_name_stands_side_by_side(world):
    clients = [world.client, admin_of(world, "acme")]
    for value, client in enumerate(clients):
        assert client.post("/v1/feedback", {"session": "lunch", "value": value, "author": "ann"}).status == 201

    def said(client: Client) -> list[float]:
        return [row["value"] for row in client.get("/v1/feedback?session=lunch").json["data"]]

    wait_until(lambda: [said(client) for client in clients] == [[0], [1]])


def test_a_ledger_teaches_its_own_tenant_alone(world):
    """The same route's name, the same prompts: the curve and a job look at the caller's groups."""
    here, there = world.client, admin_of(world, "acme")
    for i in range(4):
        assert there.post("/generate", {"prompt": f"p{i}", "n": 2}).status == 200
    world.groups(4)
    job = {**JOB, "route": "default"}
    refused = here.post("/distill", job)
    assert (refused.status, refused.json["error"]["code"], refused.json["groups_found"]) == (422, "empty_ledger", 0)
    assert here.get("/routes/default/curve").json["error"]["code"] == "too_few_groups"
    assert there.get("/routes/default/curve").json["groups"] == 4
    assert there.post("/distill", job).status == 202


def test_another_tenants_policy_is_not_learned_from_nor_shown_in_an_experiment(world):
    record = policy(STUDENT).model_copy(update={"tenant": "acme"})
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        store.hset(policy_key(STUDENT), mapping={"record": record.model_dump_json(), "version": 1})
        store.zadd(POLICIES_INDEX, {STUDENT: 1.0})
    for i in range(4):
        world.client.post("/generate", {"prompt": f"p{i}", "n": 2})
    world.groups(4)
    spec = {"n": 2, "method": {"type": "bon_forward_kl"}, "window": {"policies": [STUDENT]}}
    refused = world.client.post("/distill", spec)
    assert (refused.status, refused.json["error"]["param"]) == (404, "window.policies[0]")
    spec = {"n": 2, "method": {"type": "interpolation", "interpolation": {"policy": STUDENT, "share": 0.5}}}
    assert world.client.post("/distill", spec).json["error"]["code"] == "policy_not_found"
    arms = [ARMS[0], {"policy": STUDENT, "n": 1, "weight": 5000}]
    shown = put(world.client, "/experiments/default", {"arms": arms})
    assert (shown.status, shown.json["error"]["code"]) == (422, "policy_not_found")
    forced = world.client.post("/generate", {"prompt": "p"}, {"x-bonsai-arm": f"{STUDENT}:1"})
    assert forced.json["error"]["code"] == "policy_not_found"

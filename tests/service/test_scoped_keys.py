"""A key for some routes: what it is good for, and what it neither sees nor changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import redis as blocking_redis

from bon_algos.contracts import LEDGER_COUNTS, POLICIES_INDEX, Route, Window, policy_key, route_key
from tests.fixtures.gateway import Client, Reply, World
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, job_spec, manifest
from tests.service.test_access import made, refused


@pytest.fixture(scope="module")
def scoped(still_world: World) -> Client:
    """Of an operator whose key is good for the route `mine` alone."""
    for name in ("mine", "other"):
        with_route(still_world, name)
    return still_world.client.with_key(made(still_world.client, role="operator", routes=["mine"])["key"])


def with_route(world: World, name: str) -> None:
    assert about(world.client, "PUT", "/routes/%s", b'{"default_n":2}', name).status in (200, 201)


def about(client: Client, method: str, path: str, body: bytes | None, name: str) -> Reply:
    """The reply to a request about what has that name; `%s` stands for it."""
    filled = body.replace(b"%s", name.encode()) if body is not None else None
    return client.request(method, path.replace("%s", name), filled, {"Content-Type": "application/json"})


ROUTED = [
    ("POST", "/generate", b'{"prompt":"hi","route":"%s"}'),
    ("POST", "/v1/completions", b'{"prompt":"hi","model":"%s"}'),
    ("POST", "/v1/chat/completions", b'{"messages":[{"role":"user","content":"hi"}],"model":"%s"}'),
    ("GET", "/routes/%s", None),
    ("PUT", "/routes/%s", b'{"default_n":2}'),
    ("GET", "/routes/%s/curve", None),
    ("GET", "/routes/%s/strategy", None),
    ("GET", "/routes/%s/trials", None),
    ("POST", "/routes/%s/rollback", b""),
    ("GET", "/routes/%s/circle", None),
    ("PUT", "/routes/%s/circle", b"{}"),
    ("POST", "/routes/%s/circle/start", b""),
    ("POST", "/routes/%s/circle/stop", b""),
    ("DELETE", "/routes/%s/circle", b""),
    ("PUT", "/experiments/%s", b'{"arms":[{"policy":"base","n":2,"weight":1},{"policy":"base","n":1,"weight":9999}]}'),
    ("DELETE", "/experiments/%s", b""),
    ("POST", "/policies/pol-1111111111111111/promote", b'{"route":"%s","override_reason":"r"}'),
    ("POST", "/distill", b'{"route":"%s","method":{"type":"bon_sft"}}'),
    ("POST", "/v1/fine_tuning/jobs", b'{"model":"%s","training_file":"ledger:%s","method":{"type":"bon_sft"}}'),
    ("DELETE", "/routes/%s", b""),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTED, ids=[f"{method} {path}" for method, path, _ in ROUTED])
def test_a_key_for_some_routes_is_good_for_no_other(scoped: Client, method: str, path: str, body: bytes | None):
    refused(about(scoped, method, path, body, "other"), 403, "route_forbidden")
    assert about(scoped, method, path, body, "mine").status not in (401, 403, 500)


def learned_from(world: World, digit: str, *routes: str, window: Sequence[str] = ()) -> str:
    """A policy whose job was for the first route; without a route: one that was imported."""
    name = f"pol-{digit * 16}"
    spec = job_spec(route=routes[0], window=Window(routes=tuple(window))) if routes else None
    record = manifest(name).model_copy(update={"spec": spec}).as_candidate()
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        store.hset(policy_key(name), "record", record.model_dump_json())
        store.zadd(POLICIES_INDEX, {name: 1.0})
    assert world.client.get(f"/policies/{name}").status == 200
    return name


CHANGING_POLICIES = [
    ("PATCH", "/policies/%s", b'{"description":"d"}'),
    ("GET", "/policies/%s/export", None),
    ("PUT", "/tags/of-mine", b'{"policy":"%s"}'),
    ("POST", "/policies/%s/retire", b""),
    ("DELETE", "/policies/%s", b""),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGING_POLICIES, ids=lambda value: str(value)[:30])
def test_a_key_for_some_routes_changes_no_policy_that_learned_from_others(
    still_world: World, scoped: Client, method: str, path: str, body: bytes | None
):
    for name in (
        learned_from(still_world, "a", "other"),
        learned_from(still_world, "b", "mine", window=("mine", "other")),
        learned_from(still_world, "c"),
    ):
        told = refused(about(scoped, method, path, body, name), 403, "route_forbidden")
        assert told["error"]["param"] == "policy_id"
    of_mine = learned_from(still_world, "d", "mine")
    assert about(scoped, method, path, body, of_mine).status not in (401, 403, 500)


SERVING_POLICIES = [
    ("POST", "/policies/%s/promote", b'{"route":"mine","override_reason":"r"}', "policy_id"),
    ("POST", "/policies/%s/promote", b'{"route":"mine","stage":"canary","share":0.1}', "policy_id"),
    (
        "PUT",
        "/experiments/mine",
        b'{"arms":[{"policy":"base","n":2,"weight":5000},{"policy":"%s","n":1,"weight":5000}]}',
        "arms[1].policy",
    ),
]


@pytest.mark.parametrize(("method", "path", "body", "param"), SERVING_POLICIES)
def test_a_key_for_some_routes_serves_no_policy_that_learned_from_others(
    still_world: World, scoped: Client, method: str, path: str, body: bytes, param: str
):
    """An import may answer anywhere: here it fails only because no engine has shown it."""
    with_route(still_world, "mine")
    for name in (learned_from(still_world, "1", "other"), learned_from(still_world, "2", "mine", window=("other",))):
        told = refused(about(scoped, method, path, body, name), 403, "route_forbidden")
        assert told["error"]["param"] == param
    for name in (learned_from(still_world, "3", "mine"), learned_from(still_world, "4")):
        assert about(scoped, method, path, body, name).status in (409, 422)


def naming(name: str) -> list[tuple[dict[str, object], str]]:
    """What a job may want of a policy, and the field that says which one."""
    return [
        ({"method": {"type": "interpolation", "interpolation": {"policy": name}}}, "method.interpolation.policy"),
        ({"method": {"type": "bon_sft"}, "training": {"start_from": name}}, "training.start_from"),
        ({"method": {"type": "bon_forward_kl"}, "window": {"policies": [name]}}, "window.policies[0]"),
    ]


@pytest.mark.parametrize("path", ["/distill", "/distill?dry_run=true"])
@pytest.mark.parametrize("place", range(3))
def test_a_job_of_a_key_for_some_routes_is_made_from_no_policy_of_others(
    still_world: World, scoped: Client, path: str, place: int
):
    with_route(still_world, "mine")
    with blocking_redis.Redis.from_url(still_world.redis_url) as store:
        store.hset(LEDGER_COUNTS, "mine", "100")
    for theirs in (learned_from(still_world, "7", "other"), learned_from(still_world, "8")):
        spec, param = naming(theirs)[place]
        told = refused(scoped.post(path, {"route": "mine", **spec}), 403, "route_forbidden")
        assert told["error"]["param"] == param
    spec, _ = naming(learned_from(still_world, "9", "mine"))[place]
    assert scoped.post(path, {"route": "mine", **spec}).status in (200, 202)


def test_a_circle_of_a_key_for_some_routes_goes_on_from_no_policy_of_others(still_world: World, scoped: Client):
    with_route(still_world, "mine")
    theirs = learned_from(still_world, "6", "other")
    with blocking_redis.Redis.from_url(still_world.redis_url) as store:
        kept = Route.model_validate_json(store.get(route_key("mine")))
        store.set(route_key("mine"), kept.model_copy(update={"live_policy": theirs}).model_dump_json())
    try:
        wait_until(lambda: still_world.client.get("/routes/mine").json["live_policy"] == theirs)
        told = refused(about(scoped, "PUT", "/routes/%s/circle", b"{}", "mine"), 403, "route_forbidden")
        assert told["error"]["param"] == "training.start_from"
    finally:
        with blocking_redis.Redis.from_url(still_world.redis_url) as store:
            store.set(route_key("mine"), kept.model_dump_json())


def test_a_key_for_some_routes_takes_no_tag_from_a_policy_of_others(still_world: World, scoped: Client):
    theirs, own = learned_from(still_world, "e", "other"), learned_from(still_world, "f", "mine")
    typed = {"Content-Type": "application/json"}
    assert still_world.client.request("PUT", "/tags/prod", f'{{"policy":"{theirs}"}}'.encode(), typed).status == 201
    refused(scoped.request("PUT", "/tags/prod", f'{{"policy":"{own}"}}'.encode(), typed), 403, "route_forbidden")
    refused(scoped.request("DELETE", "/tags/prod"), 403, "route_forbidden")
    assert still_world.client.get("/tags/prod").json["policy"] == theirs


def test_a_key_for_some_routes_lists_no_other(still_world, scoped):
    with_route(still_world, "mine")
    assert [row["id"] for row in scoped.get("/routes").json["data"]] == ["mine"]
    listed = {row["id"] for row in scoped.get("/v1/models").json["data"]}
    assert listed == {"mine", BASE}

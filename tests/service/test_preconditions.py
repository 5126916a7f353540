"""`If-Match` on what is no policy: routes, roll-backs, experiments and circles change in the version that was seen."""

from __future__ import annotations

import json

import pytest
import redis as blocking_redis

from bon_algos.contracts import POLICIES_INDEX, Route, policy_key, route_key
from tests.fixtures.gateway import Reply, World
from tests.service.records import BASE, policy

OTHER = '"77"'
SPLIT = {"arms": [{"policy": "base", "n": 4, "weight": 5000}, {"policy": "base", "n": 2, "weight": 5000}]}
RAISED = {"arms": [{"policy": "base", "n": 4, "weight": 4000}, {"policy": "base", "n": 2, "weight": 6000}]}


def send(world: World, method: str, path: str, body: object = None, match: str | None = None) -> Reply:
    headers = {"Content-Type": "application/json"} | ({} if match is None else {"If-Match": match})
    return world.client.request(method, path, json.dumps(body or {}).encode(), headers)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/routes/default", {}),
        ("PUT", "/routes/another", {}),
        ("DELETE", "/routes/default", None),
        ("POST", "/routes/default/rollback", None),
        ("PUT", "/experiments/default", SPLIT),
        ("PUT", "/routes/default/circle", {}),
    ],
)
def test_another_version_changes_nothing(world: World, method: str, path: str, body: object):
    before = world.client.get("/routes").json
    refused = send(world, method, path, body, OTHER)
    assert (refused.status, refused.json["error"]["param"]) == (412, "If-Match"), refused.body
    assert world.client.get("/routes").json == before
    assert world.client.get("/audit").json["data"] == []


def test_a_route_is_changed_in_the_version_that_was_seen(world: World):
    seen = world.client.get("/routes/default").headers["etag"]
    changed = send(world, "PUT", "/routes/default", {"default_n": 3}, seen)
    assert changed.status == 200
    assert changed.headers["etag"] == world.client.get("/routes/default").headers["etag"] != seen
    assert send(world, "PUT", "/routes/default", {"default_n": 5}, seen).status == 412
    assert send(world, "PUT", "/routes/default", {"default_n": 5}, changed.headers["etag"]).status == 200
    made = send(world, "PUT", "/routes/another")
    assert send(world, "DELETE", "/routes/another", match=made.headers["etag"]).status == 204


def test_two_who_roll_back_the_same_policy_go_one_step(world: World):
    first, second = (f"pol-{number}" + "0" * 15 for number in (1, 2))
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        for name in (first, second):
            store.hset(policy_key(name), "record", policy(name, "retired").model_dump_json())
            store.zadd(POLICIES_INDEX, {name: 1.0})
        route = Route.model_validate_json(store.get(route_key("default")))
        moved = route.model_copy(update={"live_policy": second, "previous_policies": (None, first)})
        store.set(route_key("default"), moved.model_dump_json())
    assert send(world, "POST", "/routes/default/rollback", match=OTHER).status == 412
    # A reply of any change tells the version; this one changes nothing.
    seen = send(world, "PUT", "/routes/default").headers["etag"]
    back = send(world, "POST", "/routes/default/rollback", match=seen)
    assert (back.status, back.json["live_policy"]) == (200, first)
    late = send(world, "POST", "/routes/default/rollback", match=seen)
    assert (late.status, late.json["etag"]) == (412, back.headers["etag"])
    assert world.client.get("/routes/default").json["live_policy"] == first


def test_an_experiment_is_ramped_up_and_stopped_in_the_version_that_was_seen(world: World):
    begun = send(world, "PUT", "/experiments/default", SPLIT)
    assert begun.json["arms"][0]["policy"] == BASE
    seen = world.client.get("/experiments/default").headers["etag"]
    assert seen == begun.headers["etag"]
    raised = send(world, "PUT", "/experiments/default", RAISED, seen)
    assert (raised.status, raised.json["id"]) == (200, begun.json["id"])
    assert send(world, "PUT", "/experiments/default", SPLIT, seen).status == 412
    assert send(world, "DELETE", "/experiments/default", match=seen).status == 412
    assert send(world, "DELETE", "/experiments/default", match=raised.headers["etag"]).status == 200


def test_a_circle_is_ruled_stopped_and_started_in_the_version_that_was_seen(world: World):
    begun = send(world, "PUT", "/routes/default/circle", {"n": 4})
    assert begun.status == 201
    seen = world.client.get("/routes/default/circle").headers["etag"]
    ruled = send(world, "PUT", "/routes/default/circle", {"n": 2}, seen)
    assert ruled.status == 200
    assert send(world, "PUT", "/routes/default/circle", {"n": 3}, seen).status == 412
    assert send(world, "POST", "/routes/default/circle/stop", match=seen).status == 412
    stopped = send(world, "POST", "/routes/default/circle/stop", match=ruled.headers["etag"])
    assert (stopped.status, stopped.json["spec"]["n"]) == (200, 2)
    assert send(world, "POST", "/routes/default/circle/start", match=seen).status == 412
    assert send(world, "DELETE", "/routes/default/circle", match=seen).status == 412
    assert send(world, "DELETE", "/routes/default/circle", match=stopped.headers["etag"]).status == 204

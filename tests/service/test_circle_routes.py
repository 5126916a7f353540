"""The switch that stops every circle, over HTTP: one that cannot be stopped is told of, and keeps no other from it."""

from __future__ import annotations

import json

import redis as blocking_redis

from bon_algos.contracts import circle_key, route_key
from tests.fixtures.gateway import World
from tests.fixtures.waiting import wait_until
from tests.service.test_tenants import put


def make_newer(store: blocking_redis.Redis, key: str) -> None:
    """As a gateway of another version would have written it."""
    store.set(key, json.dumps({**json.loads(str(store.get(key))), "colour": "green"}))


def test_a_circle_that_cannot_be_stopped_is_named_and_all_others_are_stopped(world: World, store: blocking_redis.Redis):
    """It is of another version; by name it comes first."""
    for name in ("a-newer", "default", "other"):
        assert put(world.client, f"/routes/{name}", {}).status in (200, 201)
        assert put(world.client, f"/routes/{name}/circle", {}).status == 201
    make_newer(store, circle_key("a-newer"))
    reply = world.client.post("/circles/stop", {})
    assert (reply.status, reply.json["error"]["code"]) == (503, "circles_not_stopped")
    assert reply.json["not_stopped"] == ["a-newer"]
    listed = world.client.get("/circles").json["data"]
    assert [(one["route"], one["status"]) for one in listed] == [("default", "stopped"), ("other", "stopped")]


def test_a_circle_is_stopped_though_its_route_is_of_another_version(world: World, store: blocking_redis.Redis):
    for path in ("/routes/newer", "/routes/newer/circle"):
        assert put(world.client, path, {}).status == 201
    make_newer(store, route_key("newer"))
    wait_until(lambda: world.client.get("/routes/newer").status == 404)
    reply = world.client.post("/routes/newer/circle/stop", {})
    assert (reply.status, reply.json.get("status")) == (200, "stopped")

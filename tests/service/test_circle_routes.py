"""The switch that stops every circle, over HTTP: one that cannot be stopped is told of, and keeps no other from it."""

from __future__ import annotations

import json

import redis as blocking_redis

from bon_algos.contracts import circle_key
from tests.fixtures.gateway import World
from tests.service.test_tenants import put


def test_a_circle_that_cannot_be_stopped_is_named_and_all_others_are_stopped(world: World, store: blocking_redis.Redis):
    """It is of another version; by name it comes first."""
    for name in ("a-newer", "default", "other"):
        assert put(world.client, f"/routes/{name}", {}).status in (200, 201)
        assert put(world.client, f"/routes/{name}/circle", {}).status == 201
    kept = store.get(circle_key("a-newer"))
    assert isinstance(kept, str)
    store.set(circle_key("a-newer"), json.dumps({**json.loads(kept), "colour": "green"}))
    reply = world.client.post("/circles/stop", {})
    assert (reply.status, reply.json["error"]["code"]) == (503, "circles_not_stopped")
    assert reply.json["not_stopped"] == ["a-newer"]
    listed = world.client.get("/circles").json["data"]
    assert [(one["route"], one["status"]) for one in listed] == [("default", "stopped"), ("other", "stopped")]

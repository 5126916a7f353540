"""`/keys`: made, shown once, listed without the key, revoked; and what no admin may do (reliability.md 8.8)."""

from __future__ import annotations

import json
from time import time
from typing import Any

import pytest
import redis as blocking_redis

from bon_algos.contracts import AUDIT_STREAM, KEYS, KEYS_USED
from service.api_key import key_id, new_key
from service.keys import MAX_KEYS, KeyRecord
from tests.fixtures.gateway import Client, Reply, World
from tests.fixtures.waiting import wait_until


def post(client: Client, **fields: object) -> Reply:
    return client.post("/keys", {"name": "test", "role": "viewer", **fields})


def made(client: Client, **fields: object) -> dict[str, Any]:
    reply = post(client, **fields)
    assert reply.status == 201, reply.body
    return dict(reply.json)


def refused(reply: Reply, status: int, param: str | None = None, code: str | None = None) -> None:
    assert reply.status == status, reply.body
    assert len(reply.body) <= 4096
    error = reply.json["error"]
    assert param in (None, error["param"])
    assert code in (None, error["code"])


def audit(world: World) -> list[dict[str, str]]:
    with blocking_redis.Redis.from_url(world.redis_url, decode_responses=True) as client:
        return [fields for _, fields in client.xrange(AUDIT_STREAM)]


# --- the life of a key -----------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_good_at_once(world):
    until = time() + 3600
    reply = post(world.client, name="app", role="inference", routes=["default"], expires_at=until)
    shown = reply.json
    assert (reply.status, reply.headers["location"]) == (201, f"/keys/{shown['id']}")
    key = shown.pop("key")
    assert key_id(key) == shown["id"]
    assert shown == {
        "id": shown["id"],
        "object": "bonsai.key",
        "prefix": key[:22],
        "status": "active",
        "name": "app",
        "role": "inference",
        "tenant": "default",
        "routes": ["default"],
        "created_at": shown["created_at"],
        "created_by": key_id(world.client.key),
        "expires_at": until,
        "store": True,
        "revoked_at": None,
        "last_used_at": None,
    }
    assert world.client.get(f"/keys/{shown['id']}").json == shown
    assert world.client.with_key(key).post("/generate", {"prompt": "hi", "n": 2}).status == 200


def test_K6_lists_hold_public_parts_only_newest_first(world):
    keys = [made(world.client)["key"] for _ in range(3)]
    listed = world.client.get("/keys?limit=10")
    rows = listed.json["data"]
    assert [row["id"] for row in rows] == [*(key_id(key) for key in reversed(keys)), key_id(world.client.key)]
    for key in (*keys, world.client.key):
        assert key[-48:].encode() not in listed.body
    assert not any("digest" in row for row in rows)
    page = world.client.get(f"/keys?limit=1&after={rows[0]['id']}").json
    assert (page["data"], page["has_more"]) == ([rows[1]], True)


def test_the_hour_of_the_last_use_is_kept_and_no_more(world):
    one = made(world.client)
    assert world.client.with_key(one["key"]).get("/routes").status == 200

    def used() -> Any:
        return world.client.get(f"/keys/{one['id']}").json["last_used_at"]

    wait_until(lambda: used() is not None)
    assert used() % 3600 == 0
    assert 0 <= time() - used() < 7200


def test_a_revoked_key_opens_nothing_and_stays_revoked(world):
    one = made(world.client)
    for _ in range(2):
        reply = world.client.request("DELETE", f"/keys/{one['id']}")
        assert (reply.status, reply.json["status"]) == (200, "revoked")
    assert world.client.with_key(one["key"]).get("/routes").status == 401
    assert world.client.get(f"/keys/{one['id']}").json["revoked_at"] == reply.json["revoked_at"]


def test_who_made_and_who_revoked_stands_in_the_audit_and_no_secret(world):
    admin = made(world.client, role="admin", name="second")
    one = made(world.client.with_key(admin["key"]))
    world.client.request("DELETE", f"/keys/{one['id']}")
    entries = [entry for entry in audit(world) if entry["event"].startswith("key_")]
    assert [(entry["event"], entry["key"], entry["by"]) for entry in entries] == [
        ("key_create", admin["id"], key_id(world.client.key)),
        ("key_create", one["id"], admin["id"]),
        ("key_revoke", one["id"], key_id(world.client.key)),
    ]
    assert set(json.loads(entries[0]["data"])) == set(KeyRecord.model_fields) - {"digest"}
    for text in (json.dumps(entries), *(entry["data"] for entry in entries)):
        assert admin["key"][-48:] not in text
        assert one["key"][-48:] not in text


def test_traffic_is_moved_under_somebodys_name(world):
    operator = made(world.client, role="operator")
    client = world.client.with_key(operator["key"])
    json_type = {"Content-Type": "application/json"}
    assert client.request("PUT", "/routes/chat", b'{"default_n":2}', json_type).status == 201
    assert client.request("DELETE", "/routes/chat").status == 204
    moved = [(entry["event"], entry["by"], entry["tenant"]) for entry in audit(world) if "route" in entry]
    assert moved == [("route_put", operator["id"], "default"), ("route_delete", operator["id"], "default")]


# --- what is refused -------------------------------------------------------------------------------------

WRONG = {
    "K2 unknown role": ({"role": "root"}, "role"),
    "role null": ({"role": None}, "role"),
    "K3 name of 1 MB": ({"name": "n" * 2**20}, "name"),
    "no name": ({"name": ""}, "name"),
    "K4 expiry past": ({"expires_at": 1.0}, "expires_at"),
    "K4 expiry in the year 9999": ({"expires_at": 253_402_300_799}, "expires_at"),
    "expiry as a word": ({"expires_at": "tomorrow"}, "expires_at"),
    "an admin for some routes": ({"role": "admin", "routes": ["default"]}, "routes"),
    "routes empty": ({"routes": []}, "routes"),
    "route as a pattern": ({"routes": [".*"]}, "routes[0]"),
    "route of another tenant": ({"routes": ["other/default"]}, "routes[0]"),
    "K30 separators": ({"tenant": "{a}:b*"}, "tenant"),
    "tenant with a slash": ({"tenant": "a/b"}, "tenant"),
    "tenant in capitals": ({"tenant": "Acme"}, "tenant"),
    "tenant of 33": ({"tenant": "a" * 33}, "tenant"),
    "tenant empty": ({"tenant": ""}, "tenant"),
    "K9 a limit": ({"limit": -1}, "limit"),
    "C68 id": ({"id": "key_aaaaaaaaaaaa"}, "id"),
    "C68 digest": ({"digest": "0" * 64}, "digest"),
    "C68 revoked_at": ({"revoked_at": 1.0}, "revoked_at"),
    "C68 created_by": ({"created_by": "key_aaaaaaaaaaaa"}, "created_by"),
    "a key of one's own choice": ({"key": new_key()}, "key"),
}


@pytest.mark.parametrize(("fields", "param"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_field_is_422_and_named(still_world, fields, param):
    refused(post(still_world.client, **fields), 422, param)
    assert audit(still_world) == []


def test_a_body_without_name_or_role_is_422(still_world):
    refused(still_world.client.post("/keys", {"role": "viewer"}), 422, "name")
    refused(still_world.client.post("/keys", {"name": "n"}), 422, "role")


def test_an_idempotency_key_would_keep_the_key_and_is_refused(still_world):
    reply = still_world.client.post("/keys", {"name": "n", "role": "viewer"}, {"Idempotency-Key": "once"})
    refused(reply, 422, "Idempotency-Key")


def test_K1_no_role_below_admin_makes_a_key(world):
    for role in ("operator", "trainer", "inference", "viewer"):
        client = world.client.with_key(made(world.client, role=role)["key"])
        refused(post(client, role="admin"), 403, code="role_insufficient")
        refused(post(client, role=role), 403, code="role_insufficient")


def test_K5_a_tenants_admin_makes_sees_and_revokes_keys_of_its_tenant_alone(world):
    theirs = made(world.client, role="admin", tenant="acme")
    admin, stranger = world.client.with_key(theirs["key"]), made(world.client)
    refused(post(admin, tenant="default"), 403, "tenant", "tenant_forbidden")
    refused(post(admin, tenant="globex"), 403, "tenant", "tenant_forbidden")
    own = made(admin)
    assert (own["tenant"], made(admin, tenant="acme")["tenant"]) == ("acme", "acme")
    assert {row["tenant"] for row in admin.get("/keys").json["data"]} == {"acme"}
    for identity in (stranger["id"], key_id(world.client.key)):
        refused(admin.get(f"/keys/{identity}"), 404, code="key_not_found")
        refused(admin.request("DELETE", f"/keys/{identity}"), 404, code="key_not_found")
    assert world.client.request("DELETE", f"/keys/{own['id']}").status == 200


def test_K7_the_last_admin_of_a_tenant_does_not_revoke_itself(world):
    first = made(world.client, role="admin", tenant="acme")
    admin = world.client.with_key(first["key"])
    refused(admin.request("DELETE", f"/keys/{first['id']}"), 409, code="last_admin_key")
    made(admin, role="admin", expires_at=time() + 3600)
    assert admin.request("DELETE", f"/keys/{first['id']}").status == 200


def test_K7_the_key_of_the_file_is_replaced_with_the_file(still_world):
    refused(still_world.client.request("DELETE", f"/keys/{key_id(still_world.client.key)}"), 409, code="admin_key_file")


@pytest.mark.parametrize("identity", ["none", "key_aaaaaaaaaaaa", "*", "key_%00", "..%2f..", "k" * 500])
def test_an_unknown_key_is_404(still_world, identity):
    for method in ("GET", "DELETE"):
        refused(still_world.client.request(method, f"/keys/{identity}"), 404)


@pytest.mark.parametrize(("method", "path"), [("PATCH", "/keys"), ("PUT", "/keys/x"), ("POST", "/keys/x")])
def test_K28_what_is_not_there_is_405(still_world, method, path):
    refused(still_world.client.request(method, path, b"{}", {"Content-Type": "application/json"}), 405)


def test_the_number_of_keys_has_an_end_and_old_ones_make_room(world):
    def record(number: int, revoked_at: float | None) -> str:
        return KeyRecord(
            id=f"key_{number:012d}", digest="0" * 64, name="n", role="viewer", tenant="default", routes=None,
            created_at=1.0, created_by="file", revoked_at=revoked_at,
        ).model_dump_json()  # fmt: skip

    with blocking_redis.Redis.from_url(world.redis_url) as client:
        client.hset(KEYS, mapping={f"key_{i:012d}": record(i, None) for i in range(MAX_KEYS)})
        refused(post(world.client), 409, code="too_many_keys")
        client.hset(KEYS, "key_000000000000", record(0, 1.0))
        client.hset(KEYS_USED, "key_000000000000", "3600")
        made(world.client)
        assert client.hlen(KEYS) == MAX_KEYS
        assert not client.hexists(KEYS, "key_000000000000")
        assert not client.hexists(KEYS_USED, "key_000000000000")
        # An unreadable one costs nobody else the key.
        client.hset(KEYS, "key_000000000001", "{}")
        assert len(world.client.get("/keys?limit=100").json["data"]) == 100
        made(world.client)

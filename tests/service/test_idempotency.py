"""What a caller asks again with its key because the reply was lost is not done again, also where doing it again would
by now be doing something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis as blocking_redis

from bon_algos.contracts import AUDIT_STREAM
from tests.fixtures.gateway import Reply, World
from tests.service.records import policy
from tests.service.test_registry_routes import imported, proven, register, send

SHADOW = {"stage": "shadow", "share": 0.5}


def once(world: World, path: str, body: object = None) -> Reply:
    return send(world.client, "POST", path, body, idempotency_key="once")


def test_a_withdrawal_is_not_one_of_the_trial_that_began_since(world: World, tmp_path: Path):
    student = proven(world, tmp_path, 1.0)
    send(world.client, "POST", f"/policies/{student}/promote", SHADOW)
    first = once(world, f"/policies/{student}/withdraw", {})
    send(world.client, "POST", f"/policies/{student}/promote", SHADOW)
    again = once(world, f"/policies/{student}/withdraw", {})
    assert (again.status, again.json["shadow"]) == (first.status, first.json["shadow"]) == (200, None)
    assert world.client.get(f"/policies/{student}").json["shadow_on"] == ["default"]


def test_a_circle_that_was_stopped_since_is_not_started(world: World):
    send(world.client, "PUT", "/routes/default/circle", {})
    send(world.client, "POST", "/routes/default/circle/stop")
    first = once(world, "/routes/default/circle/start")
    send(world.client, "POST", "/routes/default/circle/stop")
    again = once(world, "/routes/default/circle/start")
    assert (again.status, again.headers["etag"]) == (first.status, first.headers["etag"])
    assert (first.status, first.json["status"]) == (200, "running")
    assert world.client.get("/routes/default/circle").json["status"] == "stopped"


def test_an_erasure_is_of_what_was_made_before_it_was_asked_for(world: World, store: blocking_redis.Redis):
    first = once(world, "/ledger/erasures", {"user": "ada"})
    assert once(world, "/ledger/erasures", {"user": "ada"}).json["requested_at"] == first.json["requested_at"]
    assert store.xlen(AUDIT_STREAM) == 1
    later = send(world.client, "POST", "/ledger/erasures", {"user": "ada"})
    assert (later.json["id"], store.xlen(AUDIT_STREAM)) == (first.json["id"], 2)


def test_who_retires_or_registers_a_policy_again_hears_that_it_is_done(world: World, store, tmp_path: Path):
    old, new = policy("pol-" + "1" * 16, fingerprint=None), imported(tmp_path)
    register(world, old)
    for path, body in ((f"/policies/{old.id}/retire", None), ("/policies", {"digest": new.digest})):
        first = send(world.client, "POST", path, body, idempotency_key=path)
        again = send(world.client, "POST", path, body, idempotency_key=path)
        assert (again.status, again.json["id"]) == (first.status, first.json["id"])
        assert first.status == (200 if body is None else 201), first.body
        assert send(world.client, "POST", path, body).status == 409
    assert [entry["event"] for _, entry in store.xrange(AUDIT_STREAM)] == ["retire", "policy_import"]


@pytest.mark.parametrize("path", ["/policies", "/ledger/erasures", "/policies/POLICY/withdraw"])
def test_a_key_is_of_one_request(world: World, tmp_path: Path, path: str):
    student = proven(world, tmp_path, 1.0)
    send(world.client, "POST", f"/policies/{student}/promote", SHADOW)
    bodies = {"/policies": {"digest": imported(tmp_path, 2.0).digest}, "/ledger/erasures": {"user": "ada"}}
    assert once(world, path.replace("POLICY", student), bodies.get(path, {})).status < 300
    others = {"/policies": {"digest": imported(tmp_path, 3.0).digest}, "/ledger/erasures": {"user": "bob"}}
    other = once(world, path.replace("POLICY", student), others.get(path, {"route": "other"}))
    assert (other.status, other.json["error"]["code"]) == (422, "idempotency_conflict")

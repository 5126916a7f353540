"""Who may do what: every route for every role, what is told to whom nobody knows, and what no reply ever holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from io import StringIO
from typing import Any

import pytest
import redis as blocking_redis
from fastapi import APIRouter

from service.access import GATEWAY, Role, needs, rights
from service.api_key import new_key
from service.app import Gateway, create_app
from service.errors import Unauthenticated
from service.keys import KeyRecord, KeyRequest, KeyRing, Keys, admin_record
from service.routes import health
from service.store import open_redis
from tests.fixtures.gateway import Client, Reply, World, gateway_settings, running_gateway, write_secrets
from tests.fixtures.waiting import wait_until
from tests.service.records import route
from tests.stubs.server import running

ROLES: tuple[Role, ...] = ("admin", "operator", "trainer", "inference", "viewer")
ALL = "admin operator trainer inference viewer"
READERS = "admin operator trainer viewer"
ANYBODY = "anybody"
WEBHOOK_ACTS = ("/test", "/rotate_secret")

MATRIX = {
    ("POST", "/generate"): "admin operator inference",
    ("POST", "/v1/completions"): "admin operator inference",
    ("POST", "/v1/chat/completions"): "admin operator inference",
    ("GET", "/v1/models"): ALL,
    ("GET", "/v1/models/{model}"): ALL,
    ("GET", "/openapi.json"): ALL,
    ("POST", "/v1/feedback"): "admin operator inference",
    ("GET", "/v1/feedback"): "admin operator trainer",
    ("GET", "/routes"): READERS,
    ("GET", "/routes/{route}"): READERS,
    ("GET", "/routes/{route}/curve"): READERS,
    ("GET", "/routes/{route}/strategy"): READERS,
    ("GET", "/engines"): READERS,
    ("POST", "/engines/{name}/drain"): "admin operator",
    ("POST", "/engines/{name}/undrain"): "admin operator",
    ("PUT", "/routes/{route}"): "admin operator",
    ("DELETE", "/routes/{route}"): "admin operator",
    ("POST", "/routes/{route}/rollback"): "admin operator",
    ("GET", "/policies"): READERS,
    ("GET", "/policies/{policy_id}"): READERS,
    ("GET", "/policies/{policy_id}/report"): READERS,
    ("POST", "/policies"): "admin operator",
    ("PATCH", "/policies/{policy_id}"): "admin operator",
    ("DELETE", "/policies/{policy_id}"): "admin operator",
    ("POST", "/policies/{policy_id}/promote"): "admin operator",
    ("POST", "/policies/{policy_id}/withdraw"): "admin operator",
    ("POST", "/policies/{policy_id}/retire"): "admin operator",
    ("GET", "/policies/{policy_id}/lineage"): READERS,
    ("GET", "/policies/{policy_id}/export"): "admin operator trainer",
    ("GET", "/routes/{route}/trials"): READERS,
    ("GET", "/tags"): READERS,
    ("GET", "/tags/{tag}"): READERS,
    ("PUT", "/tags/{tag}"): "admin operator",
    ("DELETE", "/tags/{tag}"): "admin operator",
    ("GET", "/audit"): "admin",
    ("GET", "/circles"): READERS,
    ("POST", "/circles/stop"): "admin operator",
    ("GET", "/routes/{route}/circle"): READERS,
    ("PUT", "/routes/{route}/circle"): "admin operator",
    ("DELETE", "/routes/{route}/circle"): "admin operator",
    ("POST", "/routes/{route}/circle/start"): "admin operator",
    ("POST", "/routes/{route}/circle/stop"): "admin operator",
    ("GET", "/experiments/{route}"): READERS,
    ("PUT", "/experiments/{route}"): "admin operator",
    ("DELETE", "/experiments/{route}"): "admin operator",
    **{
        (method, f"{jobs}{path}"): who
        for jobs in ("/distill", "/v1/fine_tuning/jobs")
        for method, path, who in (
            ("POST", "", "admin operator trainer"),
            ("GET", "", READERS),
            ("GET", "/{job_id}", READERS),
            ("GET", "/{job_id}/events", READERS),
            ("GET", "/{job_id}/checkpoints", READERS),
            ("POST", "/{job_id}/pause", "admin operator trainer"),
            ("POST", "/{job_id}/resume", "admin operator trainer"),
            ("POST", "/{job_id}/cancel", "admin operator trainer"),
        )
    },
    ("GET", "/ledger"): READERS,
    ("POST", "/ledger/erasures"): "admin",
    ("GET", "/ledger/erasures/{erasure_id}"): "admin",
    ("POST", "/v1/files"): "admin operator trainer",
    ("GET", "/v1/files"): READERS,
    ("GET", "/v1/files/{file_id}"): READERS,
    ("GET", "/v1/files/{file_id}/content"): "admin operator trainer",
    ("DELETE", "/v1/files/{file_id}"): "admin operator trainer",
    **{
        (method, f"/v1/webhook_{path}"): "admin operator"
        for method, path in (
            ("GET", "event_types"),
            *(("POST", f"endpoints{path}") for path in ("", *(f"/{{webhook_id}}{one}" for one in ("", *WEBHOOK_ACTS)))),
            *(("GET", f"endpoints{path}") for path in ("", "/{webhook_id}", "/{webhook_id}/deliveries")),
            ("DELETE", "endpoints/{webhook_id}"),
        )
    },
    ("POST", "/keys"): "admin",
    ("GET", "/keys"): "admin",
    ("GET", "/keys/{key_id}"): "admin",
    ("DELETE", "/keys/{key_id}"): "admin",
    ("GET", "/health"): ANYBODY,
    ("GET", "/ready"): ANYBODY,
    ("GET", "/version"): ANYBODY,
}
"""Written by hand: what service/access.py and the routes declare must come to this."""


def no_gateway() -> AbstractAsyncContextManager[Gateway]:
    raise AssertionError("nothing is opened")


@pytest.fixture(scope="module")
def clients(still_world: World) -> dict[str, Client]:
    """One for each role."""
    return {role: still_world.client.with_key(made(still_world.client, role=role)["key"]) for role in ROLES}


def made(client: Client, **fields: object) -> dict[str, Any]:
    reply = client.post("/keys", {"name": "test", "role": "viewer", **fields})
    assert reply.status == 201, reply.body
    return dict(reply.json)


def asked(client: Client, method: str, path: str, headers: dict[str, str] | None = None) -> Reply:
    """With a body that is never carried out, on an object that is not there."""
    for name in ("route", "policy_id", "job_id", "key_id", "model", "erasure_id", "file_id", "tag", "webhook_id"):
        path = path.replace(f"{{{name}}}", "none")
    body = None if method == "GET" else b"null"
    return client.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})


def refused(reply: Reply, status: int, code: str) -> dict[str, Any]:
    assert (reply.status, reply.json["error"]["code"]) == (status, code)
    assert reply.headers["content-type"] == "application/problem+json"
    assert len(reply.body) <= 4096
    return dict(reply.json)


# --- the matrix ------------------------------------------------------------------------------------------


def test_the_table_has_every_route_of_the_router():
    assert set(rights(create_app(no_gateway))) == set(MATRIX)


@pytest.mark.parametrize(("named", "allowed"), MATRIX.items(), ids=[" ".join(named) for named in MATRIX])
def test_every_route_is_for_the_roles_of_the_table(still_world, clients, named, allowed):
    for role in ROLES:
        reply = asked(clients[role], *named)
        if allowed == ANYBODY or role in allowed.split():
            assert reply.status not in (401, 403, 500), role
        else:
            told = refused(reply, 403, "role_insufficient")
            assert told["detail"] == f"this needs a key with one of the roles {', '.join(allowed.split())}"


@pytest.mark.parametrize(("named", "allowed"), MATRIX.items(), ids=[" ".join(named) for named in MATRIX])
def test_C1_without_a_key_nothing_is_open_but_health(still_world, named, allowed):
    reply = asked(still_world.client.with_key(None), *named)
    if allowed == ANYBODY:
        assert reply.status in (200, 503)
        return
    refused(reply, 401, "missing_key")
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), [("GET", "/nowhere"), ("DELETE", "/generate"), ("POST", "/health")])
def test_without_a_key_nobody_learns_which_paths_there_are(still_world, method, path):
    refused(asked(still_world.client.with_key(None), method, path), 401, "missing_key")
    assert asked(still_world.client, method, path).status in (404, 405)


def test_an_app_with_a_route_that_declares_no_right_does_not_start(monkeypatch):
    for declared, count in (((), 0), ((needs("read"), needs("train")), 2)):
        router = APIRouter()
        router.add_api_route("/open", health.health, dependencies=declared)
        monkeypatch.setattr(health, "router", router)
        with pytest.raises(ValueError, match=f"/open declares {count} rights instead of one"):
            create_app(no_gateway)


# --- arms, what is open --------------------------------------------------------------------------


def test_G55_an_arm_is_forced_only_by_who_may(clients):
    headers = {"x-bonsai-arm": "base:2"}
    told = refused(clients["inference"].post("/generate", {"prompt": "hi"}, headers), 403, "role_insufficient")
    assert told["error"]["param"] == "x-bonsai-arm"
    assert clients["operator"].post("/generate", {"prompt": "hi"}, headers).status == 200


def test_K15_what_is_open_tells_nothing_to_whom_nobody_knows(still_world):
    nobody = still_world.client.with_key(None)
    assert nobody.get("/health").json == {"status": "ok"}
    assert set(nobody.get("/ready").json) == {"status"}
    assert set(nobody.get("/version").json) == {"version", "schema_version"}
    for path in ("/ready", "/version"):
        assert still_world.client.with_key(new_key()).get(path).json == nobody.get(path).json
        assert len(still_world.client.get(path).json) > 2


def test_S30_every_reply_says_what_browsers_and_caches_may_do_with_it(still_world):
    nobody = still_world.client.with_key(None)
    streamed = {"prompt": "hi", "model": "default", "stream": True}
    for reply in (
        nobody.get("/health"),
        nobody.get("/routes"),
        still_world.client.get("/nowhere"),
        still_world.client.post("/generate", {"prompt": "hi", "n": 2}),
        still_world.client.post("/v1/completions", streamed),
    ):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]


# --- with Redis away, and what is written down -----------------------------------------------------------


def test_with_redis_away_the_keys_that_were_known_serve_on(tmp_path, engine, reward, own_redis):
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(tmp_path, engine_url, reward_url, own_redis.url)
        with running_gateway(settings) as client:
            key = made(client, role="inference")["key"]
            own_redis.kill()
            assert client.with_key(key).post("/generate", {"prompt": "hi", "n": 2}).status == 200
            refused(client.with_key(new_key()).post("/generate", {"prompt": "hi"}), 401, "invalid_key")
            refused(client.post("/keys", {"name": "n", "role": "viewer"}), 503, "store_unavailable")
        with running_gateway(settings) as client:
            # Which keys there are is not known: a right key is not called wrong.
            refused(client.with_key(key).get("/routes"), 503, "store_unavailable")
            assert client.get("/routes").status == 200
            own_redis.start()
            wait_until(lambda: client.with_key(key).get("/v1/models").status == 200)


@pytest.mark.anyio
async def test_another_gateway_knows_a_key_and_its_end_at_its_next_look(tmp_path, redis_url):
    """Two rings of one Redis."""
    pepper = b"p" * 32
    record = admin_record(write_secrets(tmp_path)["admin_key_file"], pepper)
    async with open_redis(redis_url) as redis:
        here, there = KeyRing(redis, pepper, record), KeyRing(redis, pepper, record)
        keys = Keys(redis, here, pepper, record, route())
        made_record, key = await keys.create(KeyRequest(name="n", role="viewer"), GATEWAY)
        await there.refresh()
        assert there.caller(key) == here.caller(key)
        await keys.revoke(made_record.id, GATEWAY)
        await there.refresh()
        with pytest.raises(Unauthenticated, match="revoked"):
            there.caller(key)


def test_S1_S17_S18_no_key_is_in_redis_and_neither_key_nor_prompt_in_a_log_or_an_error(world):
    """A canary through every route, its body, its path and its query, with right and wrong keys."""
    canary, wrong = "canary-prompt-4711", new_key()
    made_key = made(world.client, role="admin")["key"]
    owner = world.client.with_key(made_key)
    texts: list[bytes] = []
    with everything_logged() as log:
        for method, path in MATRIX:
            for client in (owner, world.client.with_key(wrong)):
                for name in ("route", "policy_id", "job_id", "key_id", "file_id", "model", "webhook_id"):
                    path = path.replace(f"{{{name}}}", canary)
                body = None if method == "GET" else f'{{"prompt":"{canary}","bad":"{canary}"}}'.encode()
                reply = client.request(
                    method, f"{path}?q={canary}", body, {"Content-Type": "application/json", "x-bonsai-arm": canary}
                )
                texts += [reply.body] if reply.status >= 400 else []
        assert owner.post("/generate", {"prompt": canary, "n": 2}).status == 200
        world.engine.script.fault = "wrong_index"
        texts.append(owner.post("/generate", {"prompt": canary, "n": 2}).body)
        world.groups(1)
    said = log.getvalue().encode() + b"".join(texts)
    secret = made_key[-48:]
    for hidden in (canary, secret, wrong[-48:], world.client.key[-48:]):
        assert hidden.encode() not in said
    kept = everything_in(world.redis_url)
    assert made_key.split("-")[2].encode() in kept  # the public part, so that the search can find what is there
    assert secret.encode() not in kept
    assert world.client.key[-48:].encode() not in kept


@contextmanager
def everything_logged() -> Iterator[StringIO]:
    """What reaches the root logger, as `python -m service` sets it up, at the lowest level. (caplog would also hear
    loggers that are turned off.)"""
    root, log = logging.getLogger(), StringIO()
    handler, level = logging.StreamHandler(log), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield log
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def everything_in(redis_url: str) -> bytes:
    """Names and values of all keys, as Redis would write them to its disk."""
    with blocking_redis.Redis.from_url(redis_url) as client:
        found: list[bytes] = []
        for name in client.scan_iter("*"):
            kind = client.type(name)
            found.append(name)
            if kind == b"string":
                found.append(client.get(name) or b"")
            elif kind == b"hash":
                found += [part for pair in client.hgetall(name).items() for part in pair]
            elif kind == b"stream":
                found += [part for _, fields in client.xrange(name) for pair in fields.items() for part in pair]
            else:
                found += list(client.smembers(name) if kind == b"set" else client.zrange(name, 0, -1))
    return b"\n".join(found)


def test_a_key_that_is_good_no_more_is_forgotten_after_a_month():
    def record(**fields: Any) -> KeyRecord:
        given = {"id": "key_a", "digest": "d", "name": "n", "role": "viewer", "tenant": "default", "routes": None}
        return KeyRecord(**given, created_at=0.0, created_by="file", **fields)

    month = 30 * 86_400
    assert not record().is_forgotten(1e12)
    assert not record(expires_at=100.0).is_forgotten(100.0 + month)
    assert record(expires_at=100.0).is_forgotten(101.0 + month)
    assert record(expires_at=1e9, revoked_at=100.0).is_forgotten(101.0 + month)

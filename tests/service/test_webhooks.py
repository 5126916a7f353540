"""`/v1/webhooks` over HTTP: made, shown without its secret, tried, changed, deleted; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as blocking_redis
from openai import OpenAI
from openai.types.webhooks import FineTuningJobCancelledWebhookEvent

from bon_algos.contracts import AUDIT_STREAM, WEBHOOKS
from service.api_key import key_id
from service.webhook_reach import MAX_URL
from service.webhook_record import MAX_DESCRIPTION
from service.webhooks import MAX_WEBHOOKS
from tests.fixtures.gateway import Client, Reply, World, gateway_settings, running_gateway, wait_until
from tests.service.receiver import Receiver
from tests.stubs.server import running

PATH = "/v1/webhooks"
ASKED = {"url": "https://93.184.215.14/hooks", "events": ["fine_tuning.job.succeeded"]}
TYPED = {"Content-Type": "application/json"}


def made(client: Client, **fields: object) -> dict[str, Any]:
    reply = client.post(PATH, {**ASKED, **fields})
    assert reply.status == 201, reply.body
    return dict(reply.json)


def patch(client: Client, webhook_id: str, **fields: object) -> Reply:
    return client.request("PATCH", f"{PATH}/{webhook_id}", json.dumps(fields).encode(), TYPED)


def refused(reply: Reply, status: int, param: str | None = None, code: str | None = None) -> None:
    assert reply.status == status, reply.body
    error = reply.json["error"]
    assert param in (None, error["param"])
    assert code in (None, error["code"])


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().listening() as one:
        yield one


@pytest.fixture
def open_world(tmp_path: Path, engine, reward, redis_url: str) -> Iterator[World]:
    """A gateway whose operator allows a receiver on loopback."""
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        allowed = {"webhook_private_addresses": True, "webhook_plain_http": True}
        with running_gateway(gateway_settings(tmp_path, engine_url, reward_url, redis_url, **allowed)) as client:
            yield World(client, engine, reward, redis_url)


# --- its life --------------------------------------------------------------------------------------------


def test_a_job_that_is_cancelled_is_told_of_within_seconds(open_world, receiver):
    """From the API to the receiver, with what runs in a gateway anyhow."""
    client = open_world.client
    webhook = made(client, url=receiver.url, events=["fine_tuning.job.cancelled"])
    for i in range(4):
        assert client.post("/generate", {"prompt": f"p{i}", "n": 2}).status == 200
    wait_until(lambda: client.post("/distill", {"n": 2, "method": {"type": "bon_sft"}}).status == 202)
    job = client.get("/distill").json["data"][0]["id"]
    assert client.post(f"/distill/{job}/cancel", None).status == 200
    wait_until(lambda: len(receiver.received) == 1)
    [came] = receiver.received
    event = OpenAI(api_key="none").webhooks.unwrap(came.body, came.headers, secret=webhook["secret"])
    assert isinstance(event, FineTuningJobCancelledWebhookEvent)
    assert event.data.id == job
    assert came.headers["content-type"] == "application/json"
    assert "authorization" not in came.headers


def test_a_test_arrives_and_the_list_of_attempts_says_so(open_world, receiver):
    client = open_world.client
    webhook = made(client, url=receiver.url)
    receiver.script = [503]
    reply = client.post(f"{PATH}/{webhook['id']}/test", None)
    event = reply.json["event"]
    assert (reply.status, reply.json["webhook"]) == (202, webhook["id"])
    attempts = f"{PATH}/{webhook['id']}/deliveries"
    wait_until(lambda: len(client.get(attempts).json["data"]) == 1)
    [attempt] = client.get(attempts).json["data"]
    assert (attempt["event"], attempt["type"], attempt["attempt"]) == (event, "webhook.test", 1)
    assert (attempt["status_code"], attempt["outcome"]) == (503, "retrying")
    assert attempt["at"] + 5 <= attempt["next_attempt_at"] <= attempt["at"] + 10
    assert receiver.received[0].event["data"] == {"id": webhook["id"]}
    assert client.get(f"{attempts}?after={attempt['id']}").json["data"] == []


def test_its_secret_is_shown_once_and_is_in_no_redis(world):
    reply = world.client.post(PATH, {**ASKED, "description": "the pager"})
    shown = reply.json
    secret = shown.pop("secret")
    assert (reply.headers["location"], secret[:6]) == (f"{PATH}/{shown['id']}", "whsec_")
    assert shown == {
        "id": shown["id"],
        "object": "bonsai.webhook",
        **ASKED,
        "description": "the pager",
        "enabled": True,
        "disabled_at": None,
        "disabled_reason": None,
        "created_at": shown["created_at"],
        "created_by": key_id(world.client.key),
        "former_secret_until": None,
        "waiting": 0,
        "last_accepted_at": None,
    }
    assert world.client.get(f"{PATH}/{shown['id']}").json == shown
    assert world.client.get(PATH).json["data"] == [shown]
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        held = repr([store.hgetall(WEBHOOKS), store.xrange(AUDIT_STREAM)])
    assert secret.removeprefix("whsec_") not in held
    assert made(world.client)["secret"] != secret


def test_what_is_changed_is_changed_and_the_rest_stays(world):
    webhook = made(world.client, description="d")
    events = ["bonsai.policy.live", "fine_tuning.job.failed"]
    changed = patch(world.client, webhook["id"], events=[*events, *events]).json
    assert (changed["events"], changed["url"], changed["description"]) == (events, webhook["url"], "d")
    disabled = patch(world.client, webhook["id"], enabled=False).json
    assert (disabled["enabled"], disabled["disabled_reason"]) == (False, "by_request")
    refused(world.client.post(f"{PATH}/{webhook['id']}/test", None), 409, code="webhook_disabled")
    enabled = patch(world.client, webhook["id"], enabled=True).json
    assert (enabled["enabled"], enabled["disabled_reason"], enabled["events"]) == (True, None, events)


def test_another_secret_is_shown_once_and_the_former_has_a_day(world):
    webhook = made(world.client)
    reply = world.client.post(f"{PATH}/{webhook['id']}/rotate", None)
    assert reply.status == 200
    assert reply.json["secret"] not in (webhook["secret"], "")
    assert 86_390 < reply.json["former_secret_until"] - webhook["created_at"] < 86_460
    assert "secret" not in world.client.get(f"{PATH}/{webhook['id']}").json


def test_a_deleted_one_is_gone_with_all_it_had(world):
    webhook = made(world.client)
    assert world.client.post(f"{PATH}/{webhook['id']}/test", None).status == 202
    assert world.client.request("DELETE", f"{PATH}/{webhook['id']}").status == 204
    refused(world.client.get(f"{PATH}/{webhook['id']}"), 404, code="webhook_not_found")
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        assert list(store.scan_iter("bonsai:webhook:*")) == []


def test_who_did_what_is_audited_without_the_path_that_may_be_a_secret(world):
    webhook = made(world.client, url="https://93.184.215.14/T0/B0/capability?token=capability")
    patch(world.client, webhook["id"], enabled=False)
    world.client.post(f"{PATH}/{webhook['id']}/rotate", None)
    world.client.request("DELETE", f"{PATH}/{webhook['id']}")
    entries = [one for one in world.client.get("/audit").json["data"] if one["event"].startswith("webhook_")]
    assert [one["event"].removeprefix("webhook_") for one in entries] == ["create", "change", "rotate", "delete"]
    assert {(one["about"]["webhook"], one["by"]) for one in entries} == {(webhook["id"], key_id(world.client.key))}
    assert entries[0]["data"]["to"] == "https://93.184.215.14"
    assert "capability" not in json.dumps(entries)


# --- what is refused -------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, object], str]] = {
    "D30 loopback": ({"url": "https://127.0.0.1/"}, "url"),
    "D30 a name for loopback": ({"url": "https://localhost/"}, "url"),
    "D30 metadata": ({"url": "https://169.254.169.254/"}, "url"),
    "D30 gopher": ({"url": "gopher://93.184.215.14/"}, "url"),
    "plain http": ({"url": "http://93.184.215.14/"}, "url"),
    "a password": ({"url": "https://u:p@93.184.215.14/"}, "url"),
    "too long": ({"url": "https://93.184.215.14/" + "a" * MAX_URL}, "url"),
    "empty": ({"url": ""}, "url"),
    "no text": ({"url": 7}, "url"),
    "null": ({"url": None}, "url"),
    "no events": ({"events": []}, "events"),
    "an unknown event": ({"events": ["batch.completed"]}, "events[0]"),
    "a pattern": ({"events": ["*"]}, "events[0]"),
    "events as one text": ({"events": "fine_tuning.job.failed"}, "events"),
    "33 events": ({"events": ["fine_tuning.job.failed"] * 33}, "events"),
    "a long description": ({"description": "d" * (MAX_DESCRIPTION + 1)}, "description"),
    "a secret of one's own": ({"secret": "whsec_x"}, "secret"),
    "C68 tenant": ({"tenant": "acme"}, "tenant"),
    "C68 id": ({"id": "wh_x"}, "id"),
}


@pytest.mark.parametrize(("fields", "param"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_field_is_422_and_named(still_world, fields, param):
    refused(still_world.client.post(PATH, {**ASKED, **fields}), 422, param)
    assert still_world.client.get(PATH).json["data"] == []


def test_a_body_without_url_or_events_is_422(still_world):
    refused(still_world.client.post(PATH, {"url": ASKED["url"]}), 422, "events")
    refused(still_world.client.post(PATH, {"events": ASKED["events"]}), 422, "url")


def test_a_change_is_looked_at_as_a_new_one_is(world):
    webhook = made(world.client)
    refused(patch(world.client, webhook["id"], url="https://10.0.0.1/"), 422, "url", "address_refused")
    refused(patch(world.client, webhook["id"], events=[]), 422, "events")
    refused(patch(world.client, webhook["id"], enabled="yes"), 422, "enabled")
    refused(patch(world.client, "wh_none", url="https://10.0.0.1/"), 404)
    refused(world.client.get(f"{PATH}/{webhook['id']}/deliveries?after=x"), 422, "after")
    refused(world.client.get(f"{PATH}/{webhook['id']}/deliveries?limit=0"), 422, "limit")
    assert world.client.get(f"{PATH}/{webhook['id']}").json["url"] == ASKED["url"]


@pytest.mark.parametrize("path", ["", "/none/rotate"])
def test_an_idempotency_key_would_keep_the_secret_and_is_refused(still_world, path):
    refused(still_world.client.post(PATH + path, ASKED, {"Idempotency-Key": "once"}), 422, "Idempotency-Key")


def test_a_key_for_some_routes_is_told_of_none(still_world):
    made_key = still_world.client.post("/keys", {"name": "n", "role": "operator", "routes": ["default"]}).json["key"]
    client = still_world.client.with_key(made_key)
    refused(client.post(PATH, ASKED), 403, code="route_forbidden")
    refused(client.get(PATH), 403, code="route_forbidden")


def test_the_number_of_a_tenants_webhooks_has_an_end(world):
    for _ in range(MAX_WEBHOOKS):
        webhook = made(world.client)
    refused(world.client.post(PATH, ASKED), 409, code="too_many_webhooks")
    other = world.client.post("/keys", {"name": "a", "role": "admin", "tenant": "acme"}).json["key"]
    made(world.client.with_key(other))
    assert world.client.request("DELETE", f"{PATH}/{webhook['id']}").status == 204
    made(world.client)

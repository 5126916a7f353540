"""`/v1/webhook_endpoints` over HTTP, with OpenAI's client: made, shown without its secret, tried, changed, deleted; and
what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import redis as blocking_redis
from openai import APIStatusError, InvalidWebhookSignatureError, OpenAI
from openai.types.webhooks import (
    FineTuningJobCancelledWebhookEvent,
    FineTuningJobFailedWebhookEvent,
    WebhookEndpoint,
    WebhookEndpointWithSecret,
)

from bon_algos.contracts import AUDIT_STREAM, WEBHOOKS
from service.api_key import key_id
from service.webhook_events import EventType
from service.webhook_reach import MAX_URL
from service.webhook_record import MAX_NAME
from service.webhooks import MAX_WEBHOOKS
from tests.fixtures.gateway import Client, Reply, World, gateway_settings, running_gateway
from tests.fixtures.waiting import wait_until
from tests.service.receiver import Receiver
from tests.stubs.server import running

PATH = "/v1/webhook_endpoints"
FAILED = "fine_tuning.job.failed"
ASKED: dict[str, Any] = {
    "name": "the pager",
    "url": "https://93.184.215.14/hooks",
    "event_types": ["fine_tuning.job.succeeded"],
}


def made(client: Client, **fields: object) -> dict[str, Any]:
    reply = client.post(PATH, {**ASKED, **fields})
    assert reply.status == 200, reply.body
    return dict(reply.json)


def changed(client: Client, webhook_id: str, **fields: object) -> Reply:
    return client.post(f"{PATH}/{webhook_id}", fields)


def own(webhook: WebhookEndpointWithSecret) -> dict[str, Any]:
    """What OpenAI has no member for."""
    shown: dict[str, Any] = webhook.to_dict()
    return dict(shown["bonsai"])


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


def client_of(world: World) -> OpenAI:
    """OpenAI's own, with the retries that it comes with."""
    host, port = world.client.address
    return OpenAI(base_url=f"http://{host}:{port}/v1", api_key=world.client.key)


@pytest.fixture
def openai(world: World) -> Iterator[OpenAI]:
    with client_of(world) as client:
        yield client


@pytest.fixture
def open_openai(open_world: World) -> Iterator[OpenAI]:
    with client_of(open_world) as client:
        yield client


# --- its life --------------------------------------------------------------------------------------------


def test_a_job_that_is_cancelled_is_told_of_within_seconds(open_world, open_openai, receiver):
    """From the API to the receiver, with what runs in a gateway anyhow."""
    client = open_world.client
    types = ["fine_tuning.job.cancelled"]
    webhook = open_openai.webhooks.create(name="n", url=receiver.url, event_types=types)
    for i in range(4):
        assert client.post("/generate", {"prompt": f"p{i}", "n": 2}).status == 200
    wait_until(lambda: client.post("/distill", {"n": 2, "method": {"type": "bon_sft"}}).status == 202)
    job = client.get("/distill").json["data"][0]["id"]
    assert client.post(f"/distill/{job}/cancel", None).status == 200
    wait_until(lambda: len(receiver.received) == 1)
    [came] = receiver.received
    event = open_openai.webhooks.unwrap(came.body, came.headers, secret=webhook.signing_secret)
    assert isinstance(event, FineTuningJobCancelledWebhookEvent)
    assert event.data.id == job
    assert came.headers["content-type"] == "application/json"
    assert "authorization" not in came.headers
    attempts = f"{PATH}/{webhook.id}/deliveries"
    wait_until(lambda: len(client.get(attempts).json["data"]) == 1)
    [attempt] = client.get(attempts).json["data"]
    assert (attempt["event"], attempt["type"], attempt["attempt"]) == (event.id, *types, 1)
    assert (attempt["status_code"], attempt["outcome"]) == (204, "delivered")
    assert client.get(f"{attempts}?after={attempt['id']}").json["data"] == []


def test_its_secret_is_shown_once_and_is_in_no_redis(world, openai):
    webhook = openai.webhooks.create(**ASKED)
    assert isinstance(webhook, WebhookEndpointWithSecret)
    secret = webhook.signing_secret
    shown = {
        "id": webhook.id,
        "object": "webhook_endpoint",
        **ASKED,
        "signing_secret_hint": f"{secret[:10]}...",
        "created_at": webhook.created_at,
        "updated_at": webhook.created_at,
        "bonsai": {
            "enabled": True,
            "disabled_at": None,
            "disabled_reason": None,
            "former_secret_until": None,
            "waiting": 0,
            "last_accepted_at": None,
            "created_by": key_id(world.client.key),
        },
    }
    assert webhook.to_dict() == {**shown, "signing_secret": secret}
    assert secret.startswith("whsec_")
    assert openai.webhooks.retrieve(webhook.id).to_dict() == shown
    assert [one.to_dict() for one in openai.webhooks.list()] == [shown]
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        held = repr([store.hgetall(WEBHOOKS), store.xrange(AUDIT_STREAM)])
    assert secret.removeprefix("whsec_") not in held
    assert openai.webhooks.create(**ASKED).signing_secret != secret


def test_the_list_is_of_pages_and_begins_with_the_newest(openai):
    ids = [openai.webhooks.create(**ASKED).id for _ in range(3)]
    page = openai.webhooks.list(limit=2)
    assert [one.id for one in page.data] == ids[:0:-1]
    told = page.to_dict()
    assert (told["first_id"], told["last_id"], told["has_more"]) == (ids[2], ids[1], True)
    assert [one.id for one in openai.webhooks.list(after=ids[1])] == ids[:1]
    assert [one.id for one in page] == ids[::-1]  # the client turns the page by itself


def test_what_there_is_to_be_told_of_is_listed(openai):
    listed = openai.webhooks.event_types.list()
    assert (listed.object, listed.data) == ("list", [*get_args(EventType)])


def test_what_is_changed_is_changed_and_the_rest_stays(world, openai):
    webhook = openai.webhooks.create(**ASKED)
    types = ["bonsai.policy.live", FAILED]
    shown = openai.webhooks.update(webhook.id, event_types=[*types, *types])
    assert isinstance(shown, WebhookEndpoint)
    assert (shown.event_types, shown.url, shown.name) == (types, webhook.url, webhook.name)
    assert openai.webhooks.update(webhook.id, name="another").name == "another"
    disabled = changed(world.client, webhook.id, bonsai={"enabled": False}).json
    assert (disabled["bonsai"]["enabled"], disabled["bonsai"]["disabled_reason"]) == (False, "by_request")
    enabled = changed(world.client, webhook.id, bonsai={"enabled": True}).json
    assert (enabled["bonsai"]["enabled"], enabled["bonsai"]["disabled_reason"]) == (True, None)
    assert (enabled["name"], enabled["event_types"]) == ("another", types)


def test_another_secret_is_shown_once_and_the_former_one_has_a_day_if_that_is_asked_for(openai):
    first = openai.webhooks.create(**ASKED)
    second = openai.webhooks.rotate_secret(first.id, keep_old_secret_active_for_24_hours=True)
    assert isinstance(second, WebhookEndpointWithSecret)
    assert 86_390 < own(second)["former_secret_until"] - first.created_at < 86_460
    third = openai.webhooks.rotate_secret(first.id)
    assert own(third)["former_secret_until"] is None
    assert len({one.signing_secret for one in (first, second, third)}) == 3
    shown = openai.webhooks.retrieve(first.id).to_dict()
    assert "signing_secret" not in shown
    assert shown["signing_secret_hint"] == third.signing_secret_hint == f"{third.signing_secret[:10]}..."


def test_a_deleted_one_is_gone_with_all_it_had(world, openai):
    webhook = openai.webhooks.create(**ASKED)
    assert openai.webhooks.delete(webhook.id).to_dict() == {
        "id": webhook.id,
        "object": "webhook_endpoint.deleted",
        "deleted": True,
    }
    refused(world.client.get(f"{PATH}/{webhook.id}"), 404, code="webhook_not_found")
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        assert list(store.scan_iter("bonsai:webhook:*")) == []


def test_who_did_what_is_audited_without_the_path_that_may_be_a_secret(world, openai):
    webhook = openai.webhooks.create(
        **{**ASKED, "url": "https://93.184.215.14/T0/B0/capability?token=capability"},
    )
    openai.webhooks.update(webhook.id, name="another")
    openai.webhooks.rotate_secret(webhook.id)
    openai.webhooks.delete(webhook.id)
    entries = [one for one in world.client.get("/audit").json["data"] if one["event"].startswith("webhook_")]
    assert [one["event"].removeprefix("webhook_") for one in entries] == ["create", "change", "rotate", "delete"]
    assert {(one["about"]["webhook"], one["by"]) for one in entries} == {(webhook.id, key_id(world.client.key))}
    assert entries[0]["data"]["to"] == "https://93.184.215.14"
    assert "capability" not in json.dumps(entries)


# --- a test ----------------------------------------------------------------------------------------------


def test_a_sample_is_sent_at_once_signed_and_the_receivers_answer_told(open_openai, receiver):
    webhook = open_openai.webhooks.create(**{**ASKED, "url": receiver.url})
    receiver.script = [204, 503, "redirects"]
    for status in (204, 503, 307):
        told = open_openai.webhooks.test(webhook.id, event_type=FAILED)
        assert told.to_dict() == {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": webhook.id,
            "event_type": FAILED,
            "success": True,
            "status_code": status,
        }
    assert [one.path for one in receiver.received] == ["/hooks"] * 3
    assert len(set(receiver.ids)) == 3
    came = receiver.received[0]
    event = open_openai.webhooks.unwrap(came.body, came.headers, secret=webhook.signing_secret)
    assert isinstance(event, FineTuningJobFailedWebhookEvent)
    assert (event.id, event.data.id) == (came.id, "job_sample")
    with pytest.raises(InvalidWebhookSignatureError):
        open_openai.webhooks.unwrap(came.body, came.headers, secret=f"{webhook.signing_secret[:-4]}AAA=")


def test_a_sample_of_a_policys_event_has_the_form_of_one(open_openai, receiver):
    webhook = open_openai.webhooks.create(**{**ASKED, "url": receiver.url})
    for state, former in (("live", "candidate"), ("candidate", "canary")):
        open_openai.webhooks.test(webhook.id, event_type=f"bonsai.policy.{state}")
        data = receiver.received[-1].event["data"]
        assert data == {"id": "policy_sample", "route": None, "from": former, "to": state}


def test_whatever_comes_of_a_sample_changes_nothing_and_is_not_tried_again(open_world, open_openai, receiver):
    webhook = open_openai.webhooks.create(**{**ASKED, "url": receiver.url})
    changed(open_world.client, webhook.id, bonsai={"enabled": False})
    before = open_openai.webhooks.retrieve(webhook.id)
    receiver.script = [410, 204]
    for _ in range(2):
        open_openai.webhooks.test(webhook.id, event_type=FAILED)
    assert open_openai.webhooks.retrieve(webhook.id) == before
    assert open_world.client.get(f"{PATH}/{webhook.id}/deliveries").json["data"] == []
    with blocking_redis.Redis.from_url(open_world.redis_url) as store:
        assert list(store.scan_iter("bonsai:webhook:*")) == []


@pytest.mark.parametrize(("url", "reason"), [(None, "the connection broke"), ("http://127.0.0.1:1/", "no connection")])
def test_no_answer_is_an_error_after_one_try(open_openai, receiver, url, reason):
    """OpenAI's client, which tries a 5xx again by itself, does not."""
    webhook = open_openai.webhooks.create(**{**ASKED, "url": url or receiver.url})
    receiver.script = ["breaks"]
    with pytest.raises(APIStatusError, match=f"gave no answer: {reason}") as failed:
        open_openai.webhooks.test(webhook.id, event_type=FAILED)
    assert (failed.value.status_code, failed.value.code) == (424, "receiver_unreached")
    assert len(receiver.received) == (url is None)


def test_an_address_that_is_private_by_now_gets_no_sample(world, openai, receiver):
    """As its record would stand after the operator forbade what was allowed before."""
    webhook = openai.webhooks.create(**ASKED)
    with blocking_redis.Redis.from_url(world.redis_url, decode_responses=True) as store:
        record = json.loads(store.hget(WEBHOOKS, webhook.id))
        store.hset(WEBHOOKS, webhook.id, json.dumps({**record, "url": receiver.url}))
    refused(world.client.post(f"{PATH}/{webhook.id}/test", {"event_type": FAILED}), 424, code="receiver_unreached")
    assert receiver.received == []


def test_a_receiver_that_hangs_has_one_test_at_a_time(open_world: World, open_openai, receiver):
    webhook = open_openai.webhooks.create(**{**ASKED, "url": receiver.url})
    receiver.script = ["waits"]

    def ask() -> Reply:
        return open_world.client.post(f"{PATH}/{webhook.id}/test", {"event_type": FAILED})

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask)
        wait_until(lambda: len(receiver.received) == 1)
        refused(ask(), 409, code="webhook_test_under_way")
        receiver.goes_on.set()
        assert first.result().json["status_code"] == 204
    assert ask().status == 200


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
    "no events": ({"event_types": []}, "event_types"),
    "an event that is never sent": ({"event_types": ["batch.completed"]}, "event_types[0]"),
    "a pattern": ({"event_types": ["*"]}, "event_types[0]"),
    "events as one text": ({"event_types": FAILED}, "event_types"),
    "33 events": ({"event_types": [FAILED] * 33}, "event_types"),
    "no name": ({"name": ""}, "name"),
    "a name that is null": ({"name": None}, "name"),
    "a long name": ({"name": "n" * (MAX_NAME + 1)}, "name"),
    "a secret of one's own": ({"signing_secret": "whsec_x"}, "signing_secret"),
    "C68 tenant": ({"tenant": "acme"}, "tenant"),
    "C68 id": ({"id": "wh_x"}, "id"),
}


@pytest.mark.parametrize(("fields", "param"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_field_is_422_and_named(still_world, fields, param):
    refused(still_world.client.post(PATH, {**ASKED, **fields}), 422, param)
    assert still_world.client.get(PATH).json["data"] == []


@pytest.mark.parametrize("member", ASKED)
def test_a_body_without_one_of_its_members_is_422(still_world, member):
    refused(still_world.client.post(PATH, {name: one for name, one in ASKED.items() if name != member}), 422, member)


def test_a_change_is_looked_at_as_a_new_one_is(world):
    webhook = made(world.client)
    refused(changed(world.client, webhook["id"], url="https://10.0.0.1/"), 422, "url", "address_refused")
    refused(changed(world.client, webhook["id"], event_types=[]), 422, "event_types")
    refused(changed(world.client, webhook["id"], bonsai={"enabled": "yes"}), 422, "bonsai.enabled")
    refused(changed(world.client, webhook["id"], enabled=False), 422, "enabled")
    refused(changed(world.client, "wh_none", url="https://10.0.0.1/"), 404)
    refused(world.client.get(f"{PATH}/{webhook['id']}/deliveries?after=x"), 422, "after")
    refused(world.client.get(f"{PATH}/{webhook['id']}/deliveries?limit=0"), 422, "limit")
    assert world.client.get(f"{PATH}/{webhook['id']}").json["url"] == ASKED["url"]


def test_what_is_tried_or_rotated_is_looked_at_too(world):
    path = f"{PATH}/{made(world.client)['id']}"
    refused(world.client.post(f"{path}/test", {}), 422, "event_type")
    refused(world.client.post(f"{path}/test", {"event_type": "batch.completed"}), 422, "event_type")
    refused(world.client.post(f"{path}/test", {"event_type": FAILED, "url": ASKED["url"]}), 422, "url")
    refused(world.client.post(f"{PATH}/wh_none/test", {"event_type": FAILED}), 404, code="webhook_not_found")
    days = "keep_old_secret_active_for_24_hours"
    refused(world.client.post(f"{path}/rotate_secret", {days: "yes"}), 422, days)
    refused(world.client.post(f"{path}/rotate_secret", {"seconds": 1}), 422, "seconds")
    refused(world.client.post(f"{path}/rotate_secret", b"null"), 422, "body")
    refused(world.client.post(f"{PATH}/wh_none/rotate_secret", {}), 404, code="webhook_not_found")


@pytest.mark.parametrize("path", ["", "/none/rotate_secret"])
def test_an_idempotency_key_would_keep_the_secret_and_is_refused(still_world, path):
    refused(still_world.client.post(PATH + path, ASKED, {"Idempotency-Key": "once"}), 422, "Idempotency-Key")


def test_a_key_for_some_routes_is_told_of_none(still_world):
    made_key = still_world.client.post("/keys", {"name": "n", "role": "operator", "routes": ["default"]}).json["key"]
    client = still_world.client.with_key(made_key)
    refused(client.post(PATH, ASKED), 403, code="route_forbidden")
    refused(client.get(PATH), 403, code="route_forbidden")
    for path, body in (("", {}), ("/test", {"event_type": FAILED}), ("/rotate_secret", {})):
        refused(client.post(f"{PATH}/none{path}", body), 403, code="route_forbidden")


def test_the_number_of_a_tenants_webhooks_has_an_end(world):
    for _ in range(MAX_WEBHOOKS):
        webhook = made(world.client)
    refused(world.client.post(PATH, ASKED), 409, code="too_many_webhooks")
    other = world.client.post("/keys", {"name": "a", "role": "admin", "tenant": "acme"}).json["key"]
    made(world.client.with_key(other))
    assert world.client.request("DELETE", f"{PATH}/{webhook['id']}").status == 200
    made(world.client)

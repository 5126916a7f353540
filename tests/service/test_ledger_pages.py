"""`GET /ledger` over a stream and an archive; `POST /ledger/erasures`. A real gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis

from archive.reading import Archive
from bon_algos.contracts import LEDGER_STREAM
from service.ledger_query import LedgerQuery, served_reward
from tests.fixtures.gateway import Client, gateway_settings, running_gateway
from tests.fixtures.waiting import wait_until
from tests.service.bad_ledger_input import ERASURES, QUERIES
from tests.service.records import group
from tests.service.test_access import made, refused
from tests.stubs.server import running
from worker.compaction import Compaction, Limits

BATCHES_OF_TWO = Limits(entries=2, bytes=2**20, seconds=600.0, hot_groups=2, hot_seconds=0.0)


@pytest.fixture
def served(tmp_path, engine, reward, redis_url):
    """A gateway, and the place of its archive."""
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(tmp_path, engine_url, reward_url, redis_url)
        with running_gateway(settings) as client:
            yield client, settings.artefacts / "ledger"


def ask(client: Client, count: int, **fields: Any) -> list[str]:
    replies = [client.post("/generate", {"prompt": f"question {i}", "n": 2, **fields}) for i in range(count)]
    return [reply.json["id"] for reply in replies]


def logged(redis_url: str, count: int) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        wait_until(lambda: connection.xlen(LEDGER_STREAM) >= count)


def archive_all_but_two(redis_url: str, directory: Path) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        compaction = Compaction(connection, Archive.at(str(directory)), BATCHES_OF_TWO)
        compaction.open()
        while compaction.step(wait_seconds=0.01) is not None:
            pass
        assert connection.xlen(LEDGER_STREAM) == 2


def page(client: Client, query: str = "") -> dict[str, Any]:
    reply = client.get(f"/ledger?{query}")
    assert reply.status == 200, reply.body
    return dict(reply.json)


def ids(client: Client, query: str = "") -> list[str]:
    return [row["id"] for row in page(client, query)["data"]]


def test_pages_go_on_from_the_stream_into_the_archive(served, redis_url):
    client, directory = served
    made_ids = ask(client, 6)
    logged(redis_url, 6)
    archive_all_but_two(redis_url, directory)
    assert ids(client) == made_ids[::-1]
    found, query = [], "limit=2"
    while True:
        reply = page(client, query)
        found += [row["id"] for row in reply["data"]]
        if reply["next_cursor"] is None:
            break
        query = f"limit=2&cursor={reply['next_cursor']}"
    assert found == made_ids[::-1]


def test_nobody_was_served_what_a_shadow_said():
    drawn = group([(2.0, 1)])
    assert served_reward(drawn) == 2.0
    assert served_reward(drawn.model_copy(update={"arm_reason": "shadow"})) is None
    assert not LedgerQuery(min_reward=1.0).matches(drawn.model_copy(update={"arm_reason": "shadow"}))


@pytest.mark.parametrize(("reward", "least", "matches"), [(0.0, 0.0, True), (0.0, 0.5, False), (-1.0, -1.0, True)])
def test_a_reward_of_nothing_is_a_reward(reward, least, matches):
    assert LedgerQuery(min_reward=least).matches(group([(reward, 1)])) == matches


def test_filters(served, redis_url):
    client, directory = served
    ada = ask(client, 2, user="ada", metadata={"session": "tea"})
    bob = ask(client, 2, user="bob")
    logged(redis_url, 4)
    archive_all_but_two(redis_url, directory)
    # As late as it is: Redis no longer has this reply.
    assert client.post("/v1/feedback", {"response": ada[0], "value": True, "comment": "fine"}).status == 201
    wait_until(lambda: ids(client, "has_feedback=true") == [ada[0]])
    assert ids(client, "user=ada") == ids(client, "session=tea") == ada[::-1]
    assert ids(client, "user=bob&has_feedback=true") == []
    (row,) = page(client, "has_feedback=true")["data"]
    assert row["feedback"][0]["comment"] == "fine"
    best = max(row["reward"] for row in page(client)["data"])
    assert {row["reward"] for row in page(client, f"min_reward={best}")["data"]} == {best}
    assert ids(client, f"until={page(client, 'user=ada')['data'][0]['created_at']}") == ada[::-1]
    assert ids(client, "route=default&since=0") == [*bob[::-1], *ada[::-1]]
    assert ids(client, "route=other") == []


def test_L9_without_the_right_to_content_texts_are_withheld(served, redis_url):
    client, _ = served
    ask(client, 1, user="ada")
    logged(redis_url, 1)
    told = page(client)
    assert told["content"] == "shown"
    assert told["data"][0]["prompt"].startswith("question 0") or "question 0" in told["data"][0]["prompt"]
    viewer = client.with_key(made(client, role="viewer")["key"])
    reply = page(viewer)
    assert reply["content"] == "withheld"
    (row,) = reply["data"]
    assert row["prompt"] is row["messages"] is None
    assert {one["text"] for one in row["candidates"]} == {None}
    assert row["reward"] is not None
    assert b"question" not in viewer.get("/ledger").body


def test_fields_are_what_was_asked_for(served, redis_url):
    client, _ = served
    ask(client, 1)
    logged(redis_url, 1)
    assert set(page(client, "fields=reward,route")["data"][0]) == {"object", "id", "reward", "route"}


def test_L4_a_cursor_is_good_for_its_own_question_alone(served, redis_url):
    client, _ = served
    ask(client, 2)
    logged(redis_url, 2)
    cursor = page(client, "limit=1")["next_cursor"]
    assert len(ids(client, f"limit=1&cursor={cursor}")) == 1
    for query in (f"route=default&cursor={cursor}", f"cursor={cursor[:-1]}", f"cursor=A{cursor[1:]}"):
        assert refused(client.get(f"/ledger?{query}"), 422, "invalid_field")["error"]["param"] == "cursor"


def test_a_key_for_one_route_sees_that_route(served, redis_url):
    client, _ = served
    for name in ("mine", "other"):
        client.request("PUT", f"/routes/{name}", b'{"default_n":2}', {"Content-Type": "application/json"})
        ask(client, 1, route=name)
    logged(redis_url, 2)
    scoped = client.with_key(made(client, role="operator", routes=["mine"])["key"])
    assert {row["route"] for row in page(scoped)["data"]} == {"mine"}
    refused(scoped.get("/ledger?route=other"), 403, "route_forbidden")


@pytest.mark.parametrize("row", QUERIES, ids=[row.name for row in QUERIES])
def test_a_bad_question_is_422_and_names_the_parameter(still_world, row):
    reply = still_world.client.get(f"/ledger?{row.query}")
    assert reply.status == 422, reply.body
    assert reply.json["error"]["param"] == row.param


@pytest.mark.parametrize("row", ERASURES, ids=[row.name for row in ERASURES])
def test_an_erasure_of_nobody_is_422(still_world, row):
    reply = still_world.client.post("/ledger/erasures", row.body.encode())
    assert reply.status == 422, reply.body
    assert reply.json["error"]["param"] == row.param


def test_L21_asked_twice_it_is_the_same_receipt_about_all_until_then(still_world):
    first = still_world.client.post("/ledger/erasures", {"user": "zoë"})
    assert (first.status, first.json["state"]) == (202, "requested")
    again = still_world.client.post("/ledger/erasures", {"user": "zoe\u0308"})  # L26: another form of the same name
    assert again.json == first.json | {"requested_at": again.json["requested_at"]}
    assert again.json["requested_at"] > first.json["requested_at"]
    assert still_world.client.get(first.headers["location"]).json == again.json
    assert "zo" not in still_world.client.get(first.headers["location"]).body.decode()


@pytest.mark.parametrize("name", ["erasure_" + "0" * 32, "none", "..%2f", "*"])
def test_L25_an_unknown_receipt_is_404(still_world, name):
    assert still_world.client.get(f"/ledger/erasures/{name}").status == 404


def test_an_archive_that_does_not_answer_is_503(served, redis_url):
    client, directory = served
    directory.parent.mkdir(parents=True, exist_ok=True)
    (directory / "_manifest").mkdir(parents=True)
    (directory / "_manifest" / "2026-11-22.json").write_text("{")
    refused(client.get("/ledger"), 503, "archive_unavailable")

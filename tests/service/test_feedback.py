"""`/v1/feedback`: what may be said of which answer, what is logged, and what counts when it is said again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis as blocking_redis
from uuid_utils import uuid7

from archive.reading import Archive
from bon_algos.contracts import LEDGER_STREAM, Feedback, seen_key
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE
from worker.compaction import Compaction, Limits

PATH = "/v1/feedback"


def answered(world, **fields):
    """The id of an answer of three candidates, of which the second is served."""
    world.engine.script.completions = ["short", "the longest of them all", "never"]
    told = world.client.post("/generate?n=3", {"prompt": "hi", **fields})
    assert told.status == 200, told.body
    return told.json["id"]


@pytest.fixture
def reply(world):
    return answered(world)


@pytest.fixture(scope="module")
def unfinished(still_world):
    """A gateway and a reply whose third candidate never finished."""
    still_world.engine.script.delays = [0.0, 0.0, 30.0]
    return still_world, answered(still_world, timeout_ms=4000, quorum=2)


def said(world, **fields):
    told = world.client.post(PATH, fields)
    assert told.status == 201, told.body
    return told.json


def counting(world, count: int, query: str):
    """What counts, once so many are delivered."""

    def rows():
        return world.client.get(f"{PATH}?{query}").json["data"]

    wait_until(lambda: len(rows()) == count)
    return rows()


def test_feedback_on_a_reply_is_about_what_was_served(world, reply):
    told = said(world, response=reply, value=True, comment="kind", author="ann")
    assert told["id"].startswith("fb_")
    assert (told["object"], told["response"], told["candidate"], told["arm"]) == (
        "bonsai.feedback",
        reply,
        1,
        f"{BASE}:3",
    )
    assert counting(world, 1, f"response={reply}") == [told]
    wait_until(lambda: any(isinstance(record, Feedback) for record in world.records()))
    [logged] = [record for record in world.records() if isinstance(record, Feedback)]
    assert (logged.id, logged.group_id, logged.value, logged.comment) == (told["id"], reply, True, "kind")
    assert (logged.arm_reason, logged.route) == ("default", "default")


@pytest.mark.parametrize("value", [True, False, 4, -0.5, "spam"])
def test_a_value_is_yes_or_no_a_number_or_a_category(world, reply, value):
    told = said(world, response=reply, value=value)["value"]
    assert told == value
    assert isinstance(told, bool) == isinstance(value, bool)


def test_of_one_authors_answers_the_newest_counts_and_the_log_has_all(world, reply):
    said(world, response=reply, value=True, author="ann")
    said(world, response=reply, value=True, author="bob")
    said(world, response=reply, value=True, author="ann", name="short")
    said(world, response=reply, value=True, author="ann", candidate=0)
    last = said(world, response=reply, value=False, author="ann")
    wait_until(lambda: sum(isinstance(record, Feedback) for record in world.records()) == 5)
    rows = counting(world, 4, f"response={reply}")
    assert last in rows
    assert [
        row["value"] for row in rows if (row["author"], row["name"], row["candidate"]) == ("ann", "quality", 1)
    ] == [False]


def test_a_preference_names_two_candidates(world, reply):
    told = said(world, response=reply, better=0, worse=1)
    assert (told["candidate"], told["better"], told["worse"]) == (None, 0, 1)


def test_a_correction_and_a_session(world, reply):
    said(world, response=reply, correction="better so")
    told = said(world, session="a {strange} name|", value=5)
    assert (told["response"], told["arm"], told["session"]) == (None, None, "a {strange} name|")
    assert counting(world, 1, "session=a%20%7Bstrange%7D%20name%7C") == [told]


def test_feedback_under_a_key_is_logged_once(world, reply):
    key = {"Idempotency-Key": "once"}
    first, second = (world.client.post(PATH, {"response": reply, "value": 1}, key) for _ in range(2))
    assert (first.status, second.status) == (201, 201)
    assert first.json == second.json


UNKNOWN = "resp_" + "0" * 32
REFUSED = {
    "B3 malformed id": ({"response": "resp_1", "value": 1}, 422, "response"),
    "B1 unknown id": ({"response": UNKNOWN, "value": 1}, 404, "response"),
    "neither": ({"value": 1}, 422, "response"),
    "both": ({"session": "s", "value": 1}, 422, "response"),
    "B4 NaN": (b'{"response":"%s","value":NaN}', 400, None),
    "B4 a list": ({"value": [1]}, 422, "value"),
    "B4 beyond numbers": ({"value": 1e300}, 422, "value"),
    "empty category": ({"value": ""}, 422, "value"),
    "B5 nothing said": ({}, 422, "value"),
    "B6 candidate = n": ({"value": 1, "candidate": 3}, 422, "candidate"),
    "candidate -1": ({"value": 1, "candidate": -1}, 422, "candidate"),
    "B7 a candidate that failed": ({"value": 1, "candidate": 2}, 422, "candidate"),
    "B8 better = worse": ({"better": 1, "worse": 1}, 422, "worse"),
    "half a preference": ({"better": 1}, 422, "worse"),
    "a preference of one": ({"better": 1, "worse": 0, "candidate": 1}, 422, "candidate"),
    "worse = n": ({"better": 1, "worse": 3}, 422, "worse"),
    "B10 comment of 1 MB": ({"comment": "x" * 2**20}, 422, "comment"),
    "B25 a name of its own kind": ({"value": 1, "name": "A {b}"}, 422, "name"),
    "B17 a time": ({"value": 1, "created_at": 1e12}, 422, "created_at"),
    "B21 user": ({"value": 1, "user": "root"}, 422, "user"),
    "B28 metadata": ({"value": 1, "metadata": {}}, 422, "metadata"),
    "B27 empty body": (b"", 400, None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_feedback_that_means_nothing_is_refused_by_name(unfinished, case):
    world, reply = unfinished
    body, status, param = REFUSED[case]
    if isinstance(body, dict) and case != "neither":
        body = {"response": reply, **body}
    refused = world.client.post(PATH, body)
    assert refused.status == status, refused.body
    assert refused.json["error"]["param"] == param
    assert not any(isinstance(record, Feedback) for record in world.records())


def test_a_session_has_no_candidates(world):
    assert world.client.post(PATH, {"session": "s", "value": 1, "candidate": 0}).json["error"]["param"] == "session"


def test_what_was_not_to_be_stored_gets_no_texts(world):
    reply = world.client.post("/generate?n=2", {"prompt": "hi", "store": False}).json["id"]
    assert world.client.post(PATH, {"response": reply, "comment": "so-so"}).json["error"]["param"] == "comment"
    assert said(world, response=reply, value=False)["value"] is False


@pytest.mark.parametrize("query", ["", "response=a&session=b", "response=a&response=b", "limit=3"])
def test_a_list_is_of_one_reply_or_session(world, query):
    assert world.client.get(f"{PATH}?{query}").status == 422


# --- finding the reply ------------------------------------------------------------------------------------


@pytest.fixture
def client_of_redis(redis_url) -> Iterator[blocking_redis.Redis]:
    with blocking_redis.Redis.from_url(redis_url) as client:
        yield client


def readings(client: blocking_redis.Redis) -> int:
    """How often a range of a stream was read."""
    told: dict[str, Any] = client.info("commandstats")
    return sum(told.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("xrange", "xrevrange"))


def test_a_reply_is_found_among_20_000_others_and_an_unknown_one_is_not_searched_for(world, client_of_redis):
    """The others are there a moment before the reply, and the readings of a search would be 100."""
    with client_of_redis.pipeline(transaction=False) as pipe:
        for number in range(20_001):
            pipe.xadd(LEDGER_STREAM, {"kind": "other", "id": str(number), "data": b""})
        pipe.execute()
    reply = answered(world)
    wait_until(lambda: client_of_redis.exists(seen_key(reply)) == 1)
    before = readings(client_of_redis)
    said(world, response=reply, value=1)
    for unknown in (f"resp_{uuid7().hex}", UNKNOWN):
        assert world.client.post(PATH, {"response": unknown, "value": 1}).status == 404
    assert readings(client_of_redis) - before <= 10


def test_a_reply_that_an_older_gateway_delivered_is_searched_for(world, client_of_redis, reply):
    wait_until(lambda: client_of_redis.exists(seen_key(reply)) == 1)
    client_of_redis.set(seen_key(reply), "1", keepttl=True)
    assert said(world, response=reply, value=1)["candidate"] == 1


@pytest.mark.parametrize("is_mark_gone", [False, True])
def test_a_reply_that_left_the_stream_is_found_in_the_archive(world, tmp_path, client_of_redis, reply, is_mark_gone):
    wait_until(lambda: client_of_redis.exists(seen_key(reply)) == 1)
    nothing_hot = Limits(entries=1, bytes=2**20, seconds=600.0, hot_groups=0, hot_seconds=0.0)
    compaction = Compaction(client_of_redis, Archive.at(str(tmp_path / "artefacts" / "ledger")), nothing_hot)
    compaction.open()
    while compaction.step(wait_seconds=0.01) is not None:
        pass
    assert client_of_redis.xlen(LEDGER_STREAM) == 0
    if is_mark_gone:
        client_of_redis.delete(seen_key(reply))
    assert said(world, response=reply, value=1)["candidate"] == 1

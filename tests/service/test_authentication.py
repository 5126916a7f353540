"""Keys that open nothing: what is told to whom nobody knows, how often may be guessed, and how long that takes."""

from __future__ import annotations

import socket
import statistics
from time import perf_counter_ns, time

import pytest

from service.api_key import key_id, new_key
from service.keys import KeyRing, admin_record
from service.store import open_redis
from service.wrong_keys import PER_ADDRESS, PER_KEY
from tests.fixtures.gateway import write_secrets
from tests.fixtures.waiting import wait_until
from tests.service.test_access import asked, made, refused

WRONG = {
    "C2 basic": ({"Authorization": "Basic YTpi"}, 401, "missing_key"),
    "C3 empty": ({"Authorization": "Bearer "}, 401, "missing_key"),
    "no scheme": ({"Authorization": "sk-bonsai-x"}, 401, "missing_key"),
    "C4 of the right length": ({"Authorization": f"Bearer {new_key()}"}, 401, "invalid_key"),
    "C11 not ASCII": ({"Authorization": "Bearer \u00fc"}, 401, "invalid_key"),
    "C12 4 KiB": ({"Authorization": "Bearer " + "k" * 4096}, 401, "invalid_key"),
}


@pytest.mark.parametrize(("headers", "status", "code"), WRONG.values(), ids=WRONG.keys())
def test_a_header_that_holds_no_key_of_ours(still_world, headers, status, code):
    reply = asked(still_world.client, "GET", "/routes", headers)
    refused(reply, status, code)
    assert reply.headers["www-authenticate"] == "Bearer"


def test_C5_one_character_off_is_another_key(still_world):
    key = still_world.client.key
    off = key[:-1] + ("a" if key[-1] != "a" else "b")
    refused(still_world.client.with_key(off).get("/routes"), 401, "invalid_key")


def test_the_scheme_is_read_in_any_case(still_world):
    headers = {"Authorization": f"bearer {still_world.client.key}"}
    assert asked(still_world.client, "GET", "/routes", headers).status == 200


def test_C6_C7_only_who_has_all_of_a_key_is_told_that_it_ended(still_world):
    expiring = made(still_world.client, expires_at=time() + 0.5)
    revoked = made(still_world.client)
    assert still_world.client.with_key(revoked["key"]).get("/routes").status == 200
    assert still_world.client.request("DELETE", f"/keys/{revoked['id']}").json["status"] == "revoked"
    refused(still_world.client.with_key(revoked["key"]).get("/routes"), 401, "revoked_key")
    late = still_world.client.with_key(expiring["key"])
    wait_until(lambda: late.get("/routes").status == 401)
    refused(late.get("/routes"), 401, "expired_key")
    for one in (expiring, revoked):
        guessed = one["key"][:-48] + "a" * 48
        refused(still_world.client.with_key(guessed).get("/routes"), 401, "invalid_key")


def test_C9_a_key_in_the_query_is_none(still_world):
    refused(still_world.client.with_key(None).get(f"/routes?api_key={still_world.client.key}"), 401, "missing_key")


def test_C10_two_headers_are_400_whatever_they_say(still_world):
    key = still_world.client.key
    with socket.create_connection(still_world.client.address, timeout=10) as connection:
        twice = f"Authorization: Bearer {key}"
        connection.sendall(still_world.client.written("GET", "/routes", b"", twice))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 400 ")


def test_C11_a_NUL_ends_the_connection_or_is_4xx(still_world):
    with socket.create_connection(still_world.client.address, timeout=10) as connection:
        connection.sendall(b"GET /routes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\x00b\r\n\r\n")
        answer = connection.recv(65_536)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


def test_C17_another_host_changes_neither_path_nor_right(still_world):
    headers = {"Host": "evil/health?x="}
    refused(asked(still_world.client.with_key(None), "GET", "/routes", headers), 401, "missing_key")
    assert asked(still_world.client, "GET", "/routes", headers).json["object"] == "list"


def test_K13_a_thousand_wrong_keys_are_told_to_wait_and_right_ones_are_not(world):
    wrong = world.client.with_key("x").get
    answers = [wrong("/routes") for _ in range(PER_ADDRESS + 5)]
    assert [reply.status for reply in answers] == [401] * PER_ADDRESS + [429] * 5
    refused(answers[-1], 429, "rate_limit_exceeded")
    assert answers[-1].json["type"].endswith(":too_many_wrong_keys")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    forged = {"X-Forwarded-For": "10.9.8.7"}
    assert asked(world.client.with_key("x"), "GET", "/routes", forged).status == 429
    assert world.client.get("/routes").status == 200
    assert world.client.with_key("x").get("/health").status == 200


def test_one_key_is_guessed_at_only_so_often(world):
    guess = world.client.with_key(world.client.key[:-48] + "a" * 48)
    assert [guess.get("/routes").status for _ in range(PER_KEY + 1)] == [401] * PER_KEY + [429]
    assert world.client.get("/routes").status == 200


def test_C5_an_unknown_key_takes_as_long_as_a_known_one(tmp_path, redis_url):
    """Medians of 10,000 calls each, by turns: without the digest of an unknown key it would take half as long."""
    files = write_secrets(tmp_path)
    record = admin_record(files["admin_key_file"], b"p" * 32)
    ring = KeyRing(open_redis(redis_url), b"p" * 32, record)
    ring._was_read = True
    known = files["admin_key_file"].read_text()[:-48] + "a" * 48
    unknown = new_key()
    assert key_id(known) == record.id

    def nanoseconds(key: str) -> int:
        began = perf_counter_ns()
        with pytest.raises(Exception, match="not known"):
            ring.caller(key)
        return perf_counter_ns() - began

    pairs = [(nanoseconds(known), nanoseconds(unknown)) for _ in range(10_000)]
    ratio = statistics.median(one for one, _ in pairs) / statistics.median(other for _, other in pairs)
    assert 0.9 < ratio < 1.1

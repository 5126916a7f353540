"""What an operator and a load balancer are told, and when."""

from __future__ import annotations

from tests.fixtures.gateway import gateway_settings, running_gateway
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, REWARD_MODEL
from tests.stubs.server import running


def test_a_whole_gateway_is_ready(world):
    wait_until(lambda: world.client.get("/ready").json["status"] == "ready")
    reply = world.client.get("/ready")
    assert reply.status == 200
    assert reply.json == {
        "status": "ready",
        "engine": "ok",
        "engines": {"in_rotation": 1, "of": 1},
        "reward_model": "ok",
        "reward_test": "untested",
        "redis": "ok",
        "routes": 1,
        "spool": {"has_room": True, "pending_bytes": 0, "dropped": 0, "damaged": 0, "refusals": 0},
        "measurements_waiting": 0,
        "limits": {
            "max_tokens_in_flight": 2**18,
            "tokens_in_flight": 0,
            "requests_in_flight": 0,
            "tokens_waiting": 0,
            "requests_waiting": 0,
            "refused": {"overloaded": 0, "rate_limited": 0, "over_budget": 0},
        },
    }


def test_the_gateway_starts_before_its_engines_and_says_what_is_missing(
    tmp_path, engine, reward, redis_url, unused_port
):
    settings = gateway_settings(tmp_path, f"http://127.0.0.1:{unused_port}", f"unix://{tmp_path}/away.sock", redis_url)
    with running_gateway(settings) as client:
        assert client.get("/health").status == 200
        reply = client.get("/ready")
        assert reply.status == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json["status"] == "starting"
        assert reply.json["engine"] == "the policy engine cannot be reached"
        assert reply.json["reward_model"] == "the reward model cannot be reached"
        refused = client.post("/generate?n=2", {"prompt": "hi"})
        assert (refused.status, refused.json["error"]["code"]) == (503, "engine_unavailable")
        assert refused.headers["retry-after"] == "1"
        with running(engine.app(), unused_port):
            wait_until(lambda: client.get("/ready").json["engine"] == "ok")
            refused = client.post("/generate?n=2", {"prompt": "hi"})
            assert (refused.status, refused.json["error"]["code"]) == (503, "reward_model_unavailable")


def test_an_engine_with_another_model_is_not_ready(world):
    world.engine.script.models = ["pol-" + "9" * 16]
    reply = world.client.get("/ready")
    assert (reply.status, reply.json["engine"]) == (503, "serves another model")


def test_version_names_what_answers_depend_on(world):
    body = world.client.get("/version").json
    assert (body["base_policy"], body["reward_model"], body["schema_version"]) == (BASE, REWARD_MODEL, 1)
    assert len(body["settings_digest"]) == 16


def test_redis_away_from_the_start_is_degraded_and_serves(tmp_path, engine, reward):
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(tmp_path, engine_url, reward_url, f"unix://{tmp_path}/no-redis.sock")
        with running_gateway(settings) as client:
            assert client.post("/generate?n=2", {"prompt": "hi"}).status == 200
            wait_until(lambda: client.get("/ready").json["redis"] == "away")
            reply = client.get("/ready")
            assert (reply.status, reply.json["status"]) == (200, "degraded")
            assert reply.json["spool"]["pending_bytes"] > 0


def test_the_gateway_may_listen_beyond_loopback_and_still_asks_for_a_key(tmp_path, redis_url):
    settings = gateway_settings(tmp_path, "unix:///away", "unix:///away", redis_url, host="0.0.0.0")
    with running_gateway(settings) as client:
        assert client.address[0] == "0.0.0.0"
        assert client.get("/routes").status == 200
        assert client.with_key(None).get("/routes").status == 401
